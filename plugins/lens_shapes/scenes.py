"""What a picture shows. A scene knows no picture size: positions are fractions of width and height, radii of the
shorter side. A layout without overlap in the square therefore has none at any aspect ratio.

`splits` says which scenes are trained on and tested with. `sample` here keeps the first rules ("rules 1"), under which
the embedded checkpoints were trained. By these, two things are kept from training:
- content: the multiset of (shape, colour) with the word. No held-out content is ever drawn in training, under any task.
- prompt: what the brief prompt names (a pair of shapes, a count of a shape, two shapes and their relation, a word) is
  never the brief prompt of a training scene *of the same task*. A scene of another task may show it: a held-out pair
  does occur in training with its colours named. Prompts of "single", "colours" and "attribution" have contents alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from attrs import frozen

Split = Literal["train", "heldout"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
NOVEL = ("moon",)
"""Shapes that scenes hold only where the kind "novel" is asked for: for a trained model to be taught."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 20),
    "green": (20, 145, 45),
    "cyan": (0, 205, 220),
    "blue": (30, 65, 220),
    "purple": (125, 25, 160),
    "pink": (255, 110, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "grey": (155, 155, 155),
    "beige": (225, 210, 180),
    "mint": (190, 222, 200),
    "lavender": (205, 195, 228),
    "brown": (120, 92, 68),
}
INK = (0, 0, 0)
"""Words, and nothing else, are black."""

SIZES = {"small": 0.09, "medium": 0.13, "large": 0.18}
"""Half-extents, in shorter sides: 23, 33 and 46 px wide at 128 px."""
GAP = 0.05
"""Least free space between two things and to the edge, in shorter sides."""
CELL = 0.03
"""A glyph is 5 x 7 cells of this side, in shorter sides: letters are 27 px high at 128 px."""
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BAND = 7 * CELL + 2 * GAP
"""Height of the band that a word keeps for itself, in shorter sides."""

GENEVAL = ("single", "two", "counting", "colours", "position", "attribution")
RICH = ("counted colours", "coloured position", "groups", "word and thing")
TASKS: dict[str, float] = {
    "single": 0.06,
    "two": 0.12,
    "counting": 0.2,
    "colours": 0.06,
    "position": 0.17,
    "attribution": 0.14,
    "words": 0.09,
    "counted colours": 0.05,
    "coloured position": 0.04,
    "groups": 0.04,
    "word and thing": 0.03,
    "novel": 0.0,
}
"""Kinds of scene and how often training draws each. The first six mirror GenEval; `RICH` exist in training only."""

HELDOUT = 0.2
"""Share of contents, and of prompts, kept from training."""
_SALT = "lens shapes 621"
"""The first numbered salt that keeps single things of every shape and colour, and counts of each number from 2 to 6."""


@frozen
class Thing:
    """One shape. `x`, `y`: centre, fractions of width and height. `size`: a key of `SIZES`."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half-extent in shorter sides."""
        return SIZES[self.size]


@frozen
class Scene:
    """What a picture shows. Things of one group (same shape and colour) stand together, the subject's group first.

    `background`: one colour, or two, split `"across"` (top, bottom) or `"down"` (left, right). `word`: "" for none,
    else 1-5 capitals, at `word_at` ("top", "middle", "bottom"). `relation`: of the first group to the second, or "".
    """

    task: str
    things: tuple[Thing, ...]
    background: tuple[str, ...]
    split: str = ""
    word: str = ""
    word_at: str = ""
    relation: str = ""
    named: bool = False  # whether the prompt names the background

    def groups(self) -> list[tuple[Thing, int]]:
        """(one of the group, how many) in order."""
        groups: dict[tuple[str, str], list[Thing]] = {}
        for thing in self.things:
            groups.setdefault((thing.shape, thing.colour), []).append(thing)
        return [(group[0], len(group)) for group in groups.values()]


def prompt_facts(scene: Scene) -> dict[str, Any]:
    """The facts that the brief prompt names, as plain data for the reader: groups (shape, count, colour or None),
    relation, word, and background (names, halves) where it is named."""
    coloured = scene.task in ("colours", "attribution", "novel", *RICH)
    behind = {"background": {"names": list(scene.background), "halves": scene.split}} if scene.named else {}
    return {
        "groups": [
            {"shape": thing.shape, "count": count, "colour": thing.colour if coloured else None}
            for thing, count in scene.groups()
        ],
        "relation": scene.relation,
        "word": scene.word,
        **behind,
    }


def content(scene: Scene) -> str:
    """The combination a picture shows, whatever its prompt names: its multiset of (shape, colour), and its word."""
    return f"{sorted((thing.shape, thing.colour) for thing in scene.things)} {scene.word}"


def prompt_combination(scene: Scene) -> str:
    """The combination a brief prompt names; "" where it cannot be unseen, or where it is the content itself."""
    if scene.word:
        return f"word {scene.word}"
    if scene.task == "two":
        return f"two {sorted(thing.shape for thing in scene.things)}"
    if scene.task == "counting":
        return f"counting {len(scene.things)} {scene.things[0].shape}"
    if scene.task == "position":
        names, relation = [thing.shape for thing in scene.things], scene.relation
        if relation in ("right of", "below"):  # the same fact, seen from the other side
            names, relation = names[::-1], OPPOSITE[relation]
        return f"position {names[0]} {relation} {names[1]}"
    return ""


def _is_heldout(key: str) -> bool:
    digest = hashlib.sha256(f"{_SALT} {key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT * 2**32


def is_in_split(scene: Scene, split: Split) -> bool:
    """Whether `scene` may be drawn in `split`. Some scenes belong to neither: one of their two keys is kept back."""
    marks = [_is_heldout(content(scene))] + (
        [_is_heldout(prompt_combination(scene))] if prompt_combination(scene) else []
    )
    return all(marks) if split == "heldout" else not any(marks)


def sample(
    rng: np.random.Generator,
    split: Split,
    task: str | None = None,
    tasks: Mapping[str, float] = TASKS,
    largest: bool = False,
) -> Scene:
    """One scene of `split` by rules 1, of kind `task` or else of one drawn with the weights `tasks`. Same state, same
    scene.

    `largest`: all things have the largest size that as many of them may have, instead of any.
    """
    if task is None:
        task = choose_weighted(rng, tasks)
    while True:  # a fifth of the combinations is kept back, so this ends soon
        draft = _draft(rng, task, largest)
        if is_in_split(draft, split):
            break
    while True:
        things = layout(rng, draft)
        if things is not None:
            break
    background: tuple[str, ...] = two_of(rng, BACKGROUNDS)
    halves = choose(rng, ("across", "down")) if rng.random() < 0.3 else ""
    background = background if halves else background[:1]
    return Scene(task, things, background, halves, draft.word, draft.word_at, draft.relation)


def choose(rng: np.random.Generator, options: Iterable[str]) -> str:
    """One of the names, at random."""
    names = tuple(options)
    return names[int(rng.integers(len(names)))]


def choose_weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the names, at random with these weights."""
    names, sums = list(weights), np.cumsum(list(weights.values()))
    return names[int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))]


def two_of(rng: np.random.Generator, options: Iterable[str]) -> tuple[str, str]:
    """Two different names, at random."""
    first = choose(rng, options)
    return first, choose(rng, [name for name in options if name != first])


def word_of(rng: np.random.Generator) -> str:
    """1-5 letters, consonants and vowels in turn: pronounceable, and no list to learn by heart."""
    length, vowel = (1, 2, 3, 3, 4, 4, 5, 5)[int(rng.integers(8))], bool(rng.random() < 0.4)
    letters = ("AEIOUY", "BCDFGHJKLMNPQRSTVWXZ")
    return "".join(choose(rng, letters[(step + (0 if vowel else 1)) % 2]) for step in range(length))


def _draft(rng: np.random.Generator, task: str, largest: bool) -> Scene:
    """What the scene holds, before anything has a place."""
    shapes, colours = two_of(rng, SHAPES), two_of(rng, COLOURS)
    counts, relation, word, word_at = [1, 1], "", "", ""
    if task == "novel":
        shapes, counts = (choose(rng, NOVEL), ""), [1, 0]
    elif task in ("single", "colours"):
        counts = [1, 0]
    elif task in ("two", "position"):  # the prompt names no colours: the two may match
        colours = (colours[0], choose(rng, COLOURS))
    elif task in ("counting", "counted colours"):
        counts = [int(rng.integers(2, 7)), 0]
    elif task == "groups":
        first = int(rng.integers(1, 5))
        counts = [first, int(rng.integers(1 if first > 1 else 2, 7 - first))]
        relation = choose(rng, RELATIONS) if rng.random() < 0.5 else ""
    elif task == "words":
        counts, word, word_at = [0, 0], word_of(rng), choose(rng, ("top", "middle", "bottom"))
    elif task == "word and thing":
        counts, word, word_at = [1, 0], word_of(rng), choose(rng, ("top", "bottom"))
    elif task != "attribution" and task != "coloured position":
        raise ValueError(f"no kind of scene is called {task!r}; the kinds are {', '.join(TASKS)}")
    if task in ("position", "coloured position"):
        relation = choose(rng, RELATIONS)
    total = sum(counts)
    choices = sizes_for(total, largest)
    things: list[Thing] = []
    for shape, colour, count in zip(shapes, colours, counts, strict=True):
        things += [Thing(shape, colour, choose(rng, choices), 0.0, 0.0)] * count
    return Scene(task, tuple(things), (), "", word, word_at, relation)


def sizes_for(total: int, largest: bool) -> tuple[str, ...]:
    """The sizes that each of `total` things may have; `largest`: the largest of them alone."""
    choices = ("small", "medium", "large") if total <= 2 else ("small", "medium") if total <= 4 else ("small",)
    return choices[-1:] if largest else choices


def layout(rng: np.random.Generator, draft: Scene) -> tuple[Thing, ...] | None:
    """The things with their places: apart, inside, clear of the word, and in their relation; None if luck ran out."""
    low, high = 0.0, 1.0
    if draft.word_at == "top":
        low = BAND
    elif draft.word_at == "bottom":
        high = 1 - BAND
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}.get(draft.relation)
    subject = draft.things[0].shape if draft.things else ""
    placed: list[Thing] = []
    for thing in draft.things:
        margin = thing.radius + GAP / 2
        span = [[margin, 1 - margin], [low + margin, high - margin]]
        if axis is not None:  # each group keeps its half, off the middle
            first = (thing.shape == subject) == (draft.relation in ("left of", "above"))
            span[axis] = [margin, 0.5 - margin / 2] if first else [0.5 + margin / 2, 1 - margin]
        for _ in range(30):
            x, y = (float(rng.uniform(side[0], side[1])) for side in span)
            if all(max(abs(x - o.x), abs(y - o.y)) > thing.radius + o.radius + GAP for o in placed):
                break
        else:
            return None
        placed.append(Thing(thing.shape, thing.colour, thing.size, round(x, 4), round(y, 4)))
    if axis is not None:
        groups = [[t for t in placed if (t.shape == subject) is mine] for mine in (True, False)]
        if relation(*groups) != draft.relation:
            return None
    return tuple(placed)


def relation(subject: Sequence[Thing], other: Sequence[Thing]) -> str:
    """How `subject` lies to `other`, where it is clear at any aspect ratio from 1:2 to 2:1; else ""."""
    x = sum(t.x for t in subject) / len(subject) - sum(t.x for t in other) / len(other)
    y = sum(t.y for t in subject) / len(subject) - sum(t.y for t in other) / len(other)
    if abs(y) <= 0.4 * abs(x) and all((a.x - b.x) * x > 0 for a in subject for b in other):
        return "right of" if x > 0 else "left of"
    if abs(x) <= 0.4 * abs(y) and all((a.y - b.y) * y > 0 for a in subject for b in other):
        return "below" if y > 0 else "above"
    return ""
