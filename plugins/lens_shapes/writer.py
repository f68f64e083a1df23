"""The llm `shapes_writer`: rewrites requests about shapes by rules, in the style that a system prompt asks for.

A stand-in for a language model where the proving ground needs one that makes no mistakes: it reads a request in
English, French, German or Spanish, makes up a scene that the request is true of, and describes it in English
(`styles`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from lens_core.types import Message
from lens_core.validators import SEED
from lens_shapes import languages, splits
from lens_shapes.captions import NUMBERS, group_words, plural
from lens_shapes.facts import SPLITS, Group
from lens_shapes.scenes import BACKGROUNDS, COLOURS, NOVEL, RELATIONS, SHAPES, Scene
from lens_shapes.styles import FULL, Style, describe, style_of

DETAILED = "detailed prompt"
"""Words of a system prompt that ask for everything without the sentences of `styles`."""
_WORD = re.compile(r'"([A-Z]{1,5})"')
_BEHIND = re.compile(r"\b(?:on an? (?:\w+ )?background|sur un fond|sobre un fondo|auf (?:\w+ |einem )Hintergrund)")


class ShapesWriter:
    """A scripted model that writes captions of shapes, to test reasoners.

    Answers a conversation of a reasoner. The same conversation gets the same answer.
    """

    @frozen
    class Config:
        seed: int = field(default=0, validator=SEED)  # of what a request leaves open
        other_scene: bool = False  # describe another scene than the request's, as a control

    def __init__(self, config: Config) -> None:
        self.config = config

    def chat(self, messages: Sequence[Message]) -> str:
        """The description; the request itself where it names nothing that is known here."""
        system = messages[0].text if messages[0].role == "system" else ""
        text = messages[-1].text.strip().removeprefix("<request>").removesuffix("</request>").strip()
        digest = hashlib.sha256(f"{self.config.seed} {text}".encode()).digest()
        rng = np.random.default_rng(list(digest[:16]))
        style = FULL if DETAILED in system else style_of(system)
        if self.config.other_scene:
            return describe(splits.sample(rng, "train", largest=True), style, rng)
        facts = read_request(text)
        if facts is None:
            return text
        scene = scene_of(facts, rng)
        return english(facts) if scene is None or style == Style(phrase=True) else describe(scene, style, rng)


def read_request(text: str) -> dict[str, Any] | None:
    """The facts that a request names, as `scenes.prompt_facts` has them; None where it names none."""
    quoted = _WORD.search(text)
    rest = _WORD.sub(" ", text)
    behind = _BEHIND.search(rest)
    front, back = (rest[: behind.start()], rest[behind.start() :]) if behind else (rest, "")
    for language in languages.LANGUAGES:
        groups = _groups(front, language)
        if groups:
            break
    if not groups and not quoted:
        return None
    relation = _relation(front, language) if len(groups) == 2 else ""
    facts = {"groups": groups, "relation": relation, "word": quoted[1] if quoted else ""}
    return facts | ({"background": background} if (background := _background(back)) else {})


def scene_of(facts: Mapping[str, Any], rng: np.random.Generator) -> Scene | None:
    """A scene that the facts are true of, with the largest things; None where no split shows such a one."""
    groups: list[Group] = [(g["shape"], g["colour"], g["count"]) for g in facts["groups"]]
    relation = facts["relation"]
    if relation in ("right of", "below"):  # questions know two sides
        groups, relation = groups[::-1], {"right of": "left of", "below": "above"}[relation]
    background = facts.get("background", {"names": [], "halves": ""})
    for split in SPLITS:
        question = splits.Question(
            _task(facts), tuple(groups), relation, facts["word"], tuple(background["names"]), background["halves"]
        )
        for _ in range(40):
            try:
                scene = splits.try_scene(rng, question, split, largest=True)
            except (IndexError, ValueError):  # no colours that this split may show
                break
            if scene is not None:
                return scene
    return None


def english(facts: Mapping[str, Any]) -> str:
    """The facts as a short phrase."""
    parts = [group_words(g["shape"], g["count"], g["colour"]) for g in facts["groups"]]
    text = f"{parts[0]} {facts['relation']} {parts[1]}" if facts["relation"] else " and ".join(parts)
    if facts["word"]:
        text = f'{text} and the word "{facts["word"]}"' if text else f'the word "{facts["word"]}"'
    return text


def _task(facts: Mapping[str, Any]) -> str:
    """The kind of question with these facts."""
    groups, coloured = facts["groups"], any(g["colour"] for g in facts["groups"])
    if facts["word"]:
        return "word and thing" if groups else "words"
    if any(g["count"] > 1 for g in groups):
        return "groups" if len(groups) == 2 else "counted colours" if coloured else "counting"
    if len(groups) == 1:
        return "colours" if coloured else "single"
    if facts["relation"]:
        return "coloured position" if coloured else "position"
    return "attribution" if coloured else "two"


def _forms(language: str) -> tuple[dict[str, str], dict[str, str], dict[str, int]]:
    """Words of a language -> shapes, colours and numbers."""
    if language == "en":
        shapes = {form: shape for shape in (*SHAPES, *NOVEL) for form in (shape, plural(shape))}
        numbers = {"a": 1, "an": 1, **{word: n for n, word in enumerate(NUMBERS) if n}}
        return shapes, {colour: colour for colour in COLOURS}, numbers
    nouns = languages.NOUNS[language].items()
    shapes = {form.lower(): shape for shape, noun in nouns for form in (noun.one, noun.many, noun.dative) if form}
    numbers = {word: n for n, word in enumerate(languages.NUMBERS[language]) if word}
    if language == "de":
        ends = sorted({end for case in languages.ENDINGS.values() for end in case.values()})
        stems = {stem: colour for colour, stem in languages.STEMS.items() if colour in COLOURS}
        colours = {stem + end: colour for stem, colour in stems.items() for end in ends}
        ones = {word: 1 for case in languages.ARTICLES.values() for word in case.values()}
    else:
        adjectives = {k: v for k, v in languages.COLOURS[language].items() if k in COLOURS}
        colours = {form: colour for colour, a in adjectives.items() for form in (a.m, a.f, a.mm, a.ff)}
        ones = dict.fromkeys(("un", "une", "una"), 1)
    return shapes, colours, {**numbers, **ones}


def _groups(text: str, language: str) -> list[dict[str, Any]]:
    """The groups of things in a text, in order: each noun with the number before it and the colour beside it."""
    shapes, colours, numbers = _forms(language)
    words = re.findall(r"[^\W\d_]+", text.lower().replace("'", " "))
    places = [n for n, word in enumerate(words) if word in shapes]
    groups, start = [], 0
    for rank, place in enumerate(places):
        end = places[rank + 1] if rank + 1 < len(places) else len(words)
        before = words[start:place]
        counted = [numbers[word] for word in before if word in numbers]
        if not counted:
            return []
        # An adjective stands before its noun in English and German, right after it in French and Spanish.
        near = before if language in ("en", "de") else words[place + 1 : min(place + 2, end)]
        coloured = [colours[word] for word in near if word in colours]
        groups.append(
            {"shape": shapes[words[place]], "count": counted[-1], "colour": coloured[-1] if coloured else None}
        )
        start = place + 1
    return groups


def _relation(text: str, language: str) -> str:
    sides = {side: side for side in RELATIONS} if language == "en" else languages.SIDES[language]
    return next((side for side in RELATIONS if re.search(rf"\b{re.escape(sides[side])}\b", text)), "")


def _background(text: str) -> dict[str, Any] | None:
    """The background in the end of a request, in any language."""
    names = {name: name for name in BACKGROUNDS}
    for adjectives in languages.COLOURS.values():
        names |= {form: c for c, a in adjectives.items() if c in BACKGROUNDS for form in (a.m, a.f, a.mm, a.ff)}
    stems = {stem: c for c, stem in languages.STEMS.items() if c in BACKGROUNDS}
    words = re.findall(r"[^\W\d_]+", text.lower())
    listed = [names.get(w) or next((c for s, c in stems.items() if re.fullmatch(rf"{s}e[mn]", w)), None) for w in words]
    colours = [name for name in listed if name]
    across = {"top", *(half for halves in languages.HALVES.values() for half in halves["across"])}
    if not colours:
        return None
    return {"names": colours[:2], "halves": "" if len(colours) == 1 else "across" if across & set(words) else "down"}
