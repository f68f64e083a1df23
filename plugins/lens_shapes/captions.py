"""A scene in words, always true of it.

`prompt` is the benchmark's wording, `phrasings` are its other wordings, `caption` (rules 1: `brief`) is one of them for
training, `dense` names everything.

The vocabulary is closed: lower case, but for the capitals of a quoted word.
"""

from __future__ import annotations

import numpy as np
from attrs import evolve

from lens_shapes.scenes import OPPOSITE, Scene, Thing, prompt_facts, relation

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
FORM = {
    "circle": "round, with no corners at all",
    "square": "made of four equal sides and four right corners",
    "triangle": "made of three sides, with one corner pointing up",
    "star": "made of five sharp points around a middle",
    "cross": "made of two equal bars, like a plus sign",
    "heart": "curved, with two round lobes above and a point below",
    "ring": "round, with a round hole through its middle",
    "diamond": "made of four equal sides and stands on one corner",
    "moon": "a circle with a round bite on its right",
}
_EXTENT = {
    "small": "takes up only a little of the picture",
    "medium": "takes up a fair part of the picture",
    "large": "takes up much of the picture",
}
COMMON = (
    "every edge is sharp and clean.",
    "the colours are flat and even, without any shading.",
    "nothing has an outline or a shadow.",
    "the rest of the picture is left empty.",
    "the style is simple and geometric, like cut paper seen straight from the front.",
    "the light is even everywhere.",
    "the picture looks calm, tidy and easy to read.",
    "there is no frame around the picture.",
    "nothing is cut off by the edge of the picture.",
    "there are no other objects and no people.",
)


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def group_words(shape: str, count: int, colour: str | None) -> str:
    words = f"{colour} " if colour else ""
    return with_article(words + shape) if count == 1 else f"{NUMBERS[count]} {words}{plural(shape)}"


def enumeration(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _group_phrases(scene: Scene) -> list[str]:
    return [group_words(group["shape"], group["count"], group["colour"]) for group in prompt_facts(scene)["groups"]]


def prompt(scene: Scene) -> str:
    """The benchmark's words: "a circle", "three stars", "a star left of a circle", 'the word "CAT"'; with "on a white
    background", or "on a background with a white top half and a brown bottom half", where it is named too."""
    return _plain(scene) + (_background_phrase(scene) if scene.named else "")


def _plain(scene: Scene) -> str:
    parts = _group_phrases(scene)
    if scene.relation:
        return f"{parts[0]} {scene.relation} {parts[1]}"
    return enumeration(parts + ([f'the word "{scene.word}"'] if scene.word else []))


def _background_phrase(scene: Scene) -> str:
    if len(scene.background) == 1:
        return f" on {with_article(scene.background[0])} background"
    one, two = ("top", "bottom") if scene.split == "across" else ("left", "right")
    first, second = (with_article(colour) for colour in scene.background)
    return f" on a background with {first} {one} half and {second} {two} half"


def _stems(scene: Scene) -> list[str]:
    """Every way to name the facts of the prompt, without the background; the benchmark's own first."""
    parts, side = _group_phrases(scene), scene.relation
    if side:
        ways = [(parts[0], side, parts[1]), (parts[1], OPPOSITE[side], parts[0])]
        return [
            f"{one} {lead}{way} {other}"
            for lead in ("", "to the ")
            for one, way, other in ways
            if not lead or way in ("left of", "right of")
        ]
    if len(parts) == 2:
        return [f"{parts[0]} {link} {parts[1]}" for link in ("and", "with", "together with")]
    if scene.word and not parts:
        return [f'{lead} "{scene.word}"' for lead in ("the word", "the text", "the letters")]
    return [_plain(scene)]


def _wrapped(words: str, parts: list[str]) -> tuple[str, ...]:
    verb = "is" if not parts or parts[0].startswith(("a ", "an ")) else "are"
    return (
        words,
        f"a picture of {words}",
        f"an image of {words}",
        f"there {verb} {words}",
        f"{words}, simple and flat",
    )


def phrasings(scene: Scene) -> list[str]:
    """Every wording of a prompt, each with its frames; `prompt` itself is the first. At least five."""
    behind, parts = _background_phrase(scene) if scene.named else "", _group_phrases(scene)
    return [words for stem in _stems(scene) for words in _wrapped(stem + behind, parts)]


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One short phrase as `phrasings` words it: half of the time the plain one; one in four names the background."""
    shown = evolve(scene, named=scene.named or bool(rng.random() < 0.25))
    return prompt(shown) if rng.random() < 0.5 else pick(rng, tuple(phrasings(shown)))


def brief(scene: Scene, rng: np.random.Generator) -> str:
    """One short phrase by rules 1: half of the time the benchmark's own, else a rephrasing of it."""
    plain = prompt(scene)
    if rng.random() < 0.5:
        return plain
    parts, words = _group_phrases(scene), plain
    if scene.relation:
        side = scene.relation
        if rng.random() < 0.4:  # seen from the other side
            parts, side = parts[::-1], OPPOSITE[side]
        if side in ("left of", "right of") and rng.random() < 0.5:
            side = f"to the {side}"
        words = f"{parts[0]} {side} {parts[1]}"
    elif len(parts) == 2:
        words = f"{parts[0]} {pick(rng, ('and', 'with', 'together with'))} {parts[1]}"
    elif scene.word and not parts:
        words = f'{pick(rng, ("the word", "the text", "the letters"))} "{scene.word}"'
    if len(scene.background) == 1 and rng.random() < 0.25:
        return f"{words} on {with_article(scene.background[0])} background"
    return pick(rng, _wrapped(words, parts))


def _third(value: float) -> int:
    return min(2, int(value * 3))


def place(thing: Thing) -> str:
    """Which ninth of the picture holds the centre of a thing."""
    tall, wide = ("top", "", "bottom")[_third(thing.y)], ("left", "", "right")[_third(thing.x)]
    return f"{tall} {wide}".strip() or "centre"


def dense(scene: Scene, rng: np.random.Generator) -> str:
    """80-140 words, about 109 on average: each thing's looks and place, relations, counts, the background, the word."""
    things = list(scene.things)
    if rng.random() < 0.5:  # described from left to right
        things.sort(key=lambda thing: thing.x)
    must = [opening(scene, rng)]
    descriptions = [_thing(thing, number, len(things), rng) for number, thing in enumerate(things)]
    behind = backdrop(scene, rng)
    must += [behind, *descriptions] if rng.random() < 0.4 else [*descriptions, behind]
    if scene.word:
        must.insert(1 if rng.random() < 0.5 else len(must), spelled_word(scene, rng))
    links = relation_sentences(scene, things, rng)
    must += links[:1] if len(things) > 4 else links[:2]
    spare = [*links[2:3]] if len(things) <= 4 else []
    if len(things) > 1:
        spare.append("no two objects touch or overlap.")
    for shape in dict.fromkeys(thing.shape for thing in things):
        lead = f"the {shape} is" if sum(t.shape == shape for t in things) == 1 else f"each {shape} is"
        spare.append(f"{lead} {FORM[shape]}.")
    if len(things) == 1:
        spare.append(f"the {things[0].shape} {_EXTENT[things[0].size]}.")
        spare.append(f"it is {things[0].colour} all over.")
    if not scene.word:
        spare.append(pick(rng, ("there is no text anywhere.", "no words or letters are written in the picture.")))
    common = list(COMMON)
    rng.shuffle(common)
    target = float(np.clip(rng.normal(106, 8), 92, 122))
    length = sum(len(line.split()) for line in must)
    for line in spare + common:
        if length >= target:
            break
        must.append(line)
        length += len(line.split())
    return " ".join(must)


def opening(scene: Scene, rng: np.random.Generator) -> str:
    groups = [group_words(thing.shape, count, thing.colour) for thing, count in scene.groups()]
    lead = pick(
        rng, ("the picture shows", "this image shows", "in this picture there is seen", "a simple picture with")
    )
    if not groups:
        return f'{lead} one word and nothing else: "{scene.word}".'
    also = f' and the word "{scene.word}"' if scene.word else ""
    total = len(scene.things)
    count = f"{NUMBERS[total]} objects in all" if total > 1 else "a single object"
    return f"{lead} {count}: {enumeration(groups)}{also}."


def _thing(thing: Thing, number: int, total: int, rng: np.random.Generator) -> str:
    looks, where = f"{thing.size} {thing.colour} {thing.shape}", place(thing)
    spot = "in the centre" if where == "centre" else pick(rng, (f"at the {where}", f"in the {where} part"))
    if total == 1:
        return pick(rng, (
            f"the object is {with_article(looks)}, and it lies {spot} of the picture.",
            f"{with_article(looks)} stands alone {spot} of the picture.",
            f"{spot} of the picture there is {with_article(looks)}.",
        ))  # fmt: skip
    name = ORDINALS[number]
    return pick(rng, (
        f"the {name} object is {with_article(looks)} {spot}.",
        f"the {name} one, {with_article(looks)}, lies {spot}.",
        f"{spot} there is the {name} object, {with_article(looks)}.",
    ))  # fmt: skip


def backdrop(scene: Scene, rng: np.random.Generator) -> str:
    if len(scene.background) == 1:
        colour = scene.background[0]
        return pick(rng, (
            f"the background is plain {colour}.",
            f"behind everything lies an even {colour} background.",
            f"one flat {colour} colour fills the whole background.",
        ))  # fmt: skip
    one, two = ("top", "bottom") if scene.split == "across" else ("left", "right")
    first, second = scene.background
    return pick(rng, (
        f"the background has two colours: the {one} half is {first} and the {two} half is {second}.",
        f"the background is split into {with_article(first)} {one} half and {with_article(second)} {two} half.",
    ))  # fmt: skip


def spelled_word(scene: Scene, rng: np.random.Generator) -> str:
    where = "across the middle" if scene.word_at == "middle" else f"along the {scene.word_at}"
    letters = enumeration([f'"{letter}"' for letter in scene.word])
    size = f"{NUMBERS[len(scene.word)]} letter{'s' if len(scene.word) > 1 else ''}"
    return pick(rng, (
        f'the word "{scene.word}" is written {where} in bold black capitals. it has {size}: {letters}.',
        f'bold black capitals {where} of the picture spell the word "{scene.word}", {size} in order: {letters}.',
    ))  # fmt: skip


def relation_sentences(scene: Scene, things: list[Thing], rng: np.random.Generator) -> list[str]:
    """The clear relations between things, the scene's own first, named by looks where these are unique."""
    looks = [(thing.shape, thing.colour) for thing in things]
    pairs = [(a, b) for a in range(len(things)) for b in range(len(things)) if a != b]
    rng.shuffle(pairs)
    sentences, seen = [], set()
    for a, b in pairs:
        side = relation([things[a]], [things[b]])
        if not side or (b, a) in seen:
            continue
        seen.add((a, b))
        names = [
            f"the {things[n].colour} {things[n].shape}" if looks.count(looks[n]) == 1 else f"the {ORDINALS[n]} object"
            for n in (a, b)
        ]
        words = f"to the {side}" if side in ("left of", "right of") else side
        sentences.append(f"{names[0]} is {words} {names[1]}.")
    return sentences
