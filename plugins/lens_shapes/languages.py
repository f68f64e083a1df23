"""The requests of the proving ground in French, German and Spanish, from the facts that they name.

`request(facts, language)` words the facts of a prompt (`scenes.prompt_facts`) as `captions.prompt` does in English.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

LANGUAGES = ("en", "fr", "de", "es")


@frozen
class Noun:
    """A shape's name: `gender` m, f or n; `dative`: of the plural, where a language has one."""

    one: str
    many: str
    gender: str
    dative: str = ""


@frozen
class Adjective:
    """A colour's name: as it stands with a masculine noun, with a feminine one, and with each in the plural."""

    m: str
    f: str
    mm: str
    ff: str


def _nouns(text: str) -> dict[str, Noun]:
    """Lines of `shape: one many gender [dative plural]`."""
    rows = (line.split(":") for line in text.strip().splitlines())
    return {shape.strip(): Noun(*words.split()) for shape, words in rows}


def _adjectives(text: str) -> dict[str, Adjective]:
    """Lines of `colour: m [f mm ff]`; one form alone never changes."""
    rows = (line.split(":") for line in text.strip().splitlines())
    return {name.strip(): Adjective(*(forms.split() * 4)[:4]) for name, forms in rows}


NOUNS = {
    "fr": _nouns("""
        circle: cercle cercles m
        square: carré carrés m
        triangle: triangle triangles m
        star: étoile étoiles f
        cross: croix croix f
        heart: cœur cœurs m
        ring: anneau anneaux m
        diamond: losange losanges m
        moon: lune lunes f
    """),
    "es": _nouns("""
        circle: círculo círculos m
        square: cuadrado cuadrados m
        triangle: triángulo triángulos m
        star: estrella estrellas f
        cross: cruz cruces f
        heart: corazón corazones m
        ring: anillo anillos m
        diamond: rombo rombos m
        moon: luna lunas f
    """),
    "de": _nouns("""
        circle: Kreis Kreise m Kreisen
        square: Quadrat Quadrate n Quadraten
        triangle: Dreieck Dreiecke n Dreiecken
        star: Stern Sterne m Sternen
        cross: Kreuz Kreuze n Kreuzen
        heart: Herz Herzen n Herzen
        ring: Ring Ringe m Ringen
        diamond: Raute Rauten f Rauten
        moon: Mond Monde m Monden
    """),
}
COLOURS = {
    "fr": _adjectives("""
        red: rouge rouge rouges rouges
        orange: orange
        yellow: jaune jaune jaunes jaunes
        green: vert verte verts vertes
        cyan: cyan
        blue: bleu bleue bleus bleues
        purple: violet violette violets violettes
        pink: rose rose roses roses
        white: blanc blanche blancs blanches
        grey: gris grise gris grises
        beige: beige beige beiges beiges
        mint: menthe
        lavender: lavande
        brown: marron
    """),
    "es": _adjectives("""
        red: rojo roja rojos rojas
        orange: naranja naranja naranjas naranjas
        yellow: amarillo amarilla amarillos amarillas
        green: verde verde verdes verdes
        cyan: cian
        blue: azul azul azules azules
        purple: morado morada morados moradas
        pink: rosa rosa rosas rosas
        white: blanco blanca blancos blancas
        grey: gris gris grises grises
        beige: beige
        mint: menta
        lavender: lavanda
        brown: marrón marrón marrones marrones
    """),
}
STEMS = {
    "red": "rot", "orange": "orangefarben", "yellow": "gelb", "green": "grün", "cyan": "cyanfarben", "blue": "blau",
    "purple": "violett", "pink": "rosafarben", "white": "weiß", "grey": "grau", "beige": "beigefarben",
    "mint": "mintfarben", "lavender": "lavendelfarben", "brown": "braun",
}  # fmt: skip
"""German colours without their endings."""
ENDINGS = {
    "nominative": {"m": "er", "f": "e", "n": "es", "many": "e"},
    "dative": {"m": "en", "f": "en", "n": "en", "many": "en"},
}
"""Of a German adjective after "ein", or after a number."""
ARTICLES = {
    "nominative": {"m": "ein", "f": "eine", "n": "ein"},
    "dative": {"m": "einem", "f": "einer", "n": "einem"},
}
NUMBERS = {
    "fr": ("", "", "deux", "trois", "quatre", "cinq", "six"),
    "es": ("", "", "dos", "tres", "cuatro", "cinco", "seis"),
    "de": ("", "", "zwei", "drei", "vier", "fünf", "sechs"),
}
SIDES = {
    "fr": {"left of": "à gauche", "right of": "à droite", "above": "au-dessus", "below": "en dessous"},
    "es": {
        "left of": "a la izquierda", "right of": "a la derecha", "above": "encima", "below": "debajo",
    },
    "de": {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"},
}  # fmt: skip
WORD = {"fr": "le mot", "es": "la palabra", "de": "das Wort"}
AND = {"fr": "et", "es": "y", "de": "und"}
HALVES = {  # first and second half, by how a background is split
    "fr": {"across": ("supérieure", "inférieure"), "down": ("gauche", "droite")},
    "es": {"across": ("superior", "inferior"), "down": ("izquierda", "derecha")},
    "de": {"across": ("oberen", "unteren"), "down": ("linken", "rechten")},
}


def request(facts: Mapping[str, Any], language: str) -> str:
    """The facts of a prompt in words of `language`: fr, de or es."""
    case = "dative" if facts["relation"] and language == "de" else "nominative"
    groups = facts["groups"]
    words = [_group(group, language, case if number else "nominative") for number, group in enumerate(groups)]
    if facts["relation"]:
        side = SIDES[language][facts["relation"]]
        text = f"{words[0]} {side} {words[1]}" if language == "de" else f"{words[0]} {side} {_of(words[1], language)}"
    else:
        words += [f'{WORD[language]} "{facts["word"]}"'] if facts["word"] else []
        text = f" {AND[language]} ".join(words)
    return text + (_background(facts["background"], language) if facts.get("background") else "")


def _of(words: str, language: str) -> str:
    """French elides "de" before a vowel: d'un, de trois."""
    return f"d'{words}" if language == "fr" and words.startswith("un") else f"de {words}"


def _group(group: Mapping[str, Any], language: str, case: str) -> str:
    noun, count, colour = NOUNS[language][group["shape"]], group["count"], group["colour"]
    if language == "de":
        form = noun.gender if count == 1 else "many"
        number = ARTICLES[case][noun.gender] if count == 1 else NUMBERS["de"][count]
        looks = f"{STEMS[colour]}{ENDINGS[case][form]} " if colour else ""
        name = noun.one if count == 1 else noun.dative if case == "dative" else noun.many
        return f"{number} {looks}{name}"
    number = ("un" if noun.gender == "m" else "una" if language == "es" else "une") if count == 1 else ""
    number = number or NUMBERS[language][count]
    looks = f" {_agreeing(colour, language, noun.gender, count)}" if colour else ""
    return f"{number} {noun.one if count == 1 else noun.many}{looks}"


def _agreeing(colour: str, language: str, gender: str, count: int = 1) -> str:
    form = COLOURS[language][colour]
    return (form.m if gender == "m" else form.f) if count == 1 else (form.mm if gender == "m" else form.ff)


def _background(background: Mapping[str, Any], language: str) -> str:
    names, halves = background["names"], background["halves"]
    if len(names) == 1:
        colour = f"{STEMS[names[0]]}em" if language == "de" else _agreeing(names[0], language, "m")
        return {
            "fr": f" sur un fond {colour}",
            "es": f" sobre un fondo {colour}",
            "de": f" auf {colour} Hintergrund",
        }[language]
    one, two = HALVES[language][halves]
    if language == "de":
        first, second = (f"{STEMS[name]}en" for name in names)
        return f" auf einem Hintergrund mit einer {first} {one} Hälfte und einer {second} {two} Hälfte"
    first, second = (_agreeing(name, language, "f") for name in names)
    if language == "fr":
        return f" sur un fond avec une moitié {one} {first} et une moitié {two} {second}"
    return f" sobre un fondo con una mitad {one} {first} y una mitad {two} {second}"
