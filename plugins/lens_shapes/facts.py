"""The facts that a scene shows, and which split each belongs to (rules 2).

A fact is a tuple whose first entry is its kind: a shape has a colour, two shapes stand in one picture, there are n of a
shape, one shape lies on a side of another, each with and without colours; and a word. `label` puts every fact into one
split. A fact that contains one kept from training is kept too: with the pair star + circle goes every red star + blue
circle. How much of each kind is kept, and why in tables, stands beside the tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations, permutations
from typing import Any, Literal

from lens_shapes.scenes import COLOURS, NOVEL, SHAPES, Scene, Thing

Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = ("train", "select", "test")

Fact = tuple[Any, ...]
ColouredShape = tuple[str, str]
"""Shape and colour."""
Group = tuple[str, str | None, int]
"""Shape, colour (None: any) and how many."""

_SALT = "lens shapes, rules 2"
_TEST, _SELECT = (3, 5), 6
"""Of the exclusive or of two indices in 0..7. Each value pairs every shape with exactly one other, or one colour."""
_HASHED = {
    "coloured pair": (0.25, 0.1),
    "coloured count": (0.25, 0.1),
    "counted pair": (0.2, 0.1),
    "word": (0.2, 0.1),
}
"""Shares of test and select among the facts of a kind whose parts are all seen in training."""


def facts_of(groups: Sequence[Group], relations: Iterable[tuple[int, str, int]] = (), word: str = "") -> set[Fact]:
    """Every fact that these groups show. `relations`: (number of a group, "left of" or "above", number of another)."""
    facts: set[Fact] = {("word", word)} if word else set()
    for shape, colour, count in groups:
        if colour:
            facts.add(("colour", shape, colour))
        if count > 1:
            facts.add(("count", count, shape))
        if count > 1 and colour:
            facts.add(("coloured count", count, shape, colour))
    for one, other in combinations(sorted(groups), 2):
        facts.add(("pair", one[0], other[0]))
        if one[1] and other[1]:
            facts.add(("coloured pair", one[:2], other[:2]))
        if one[2] + other[2] > 2:
            facts.add(("counted pair", (one[0], one[2]), (other[0], other[2])))
    for first, side, second in relations:
        a, b = groups[first], groups[second]
        facts.add(("relation", a[0], side, b[0]))
        if a[1] and b[1]:
            facts.add(("coloured relation", a[:2], side, b[:2]))
    return facts


def shown_facts(scene: Scene) -> set[Fact]:
    """Every fact that a picture of `scene` shows at any aspect ratio from 1:2 to 2:1, named or not."""
    groups: list[Group] = [(thing.shape, thing.colour, count) for thing, count in scene.groups()]
    number = {(shape, colour): place for place, (shape, colour, _) in enumerate(groups)}
    relations = {
        (number[a.shape, a.colour], side, number[b.shape, b.colour])
        for a, b in permutations(scene.things, 2)
        if a.shape != b.shape
        for side in _sides(a, b)
    }
    return facts_of(groups, relations, scene.word)


def _sides(a: Thing, b: Thing) -> Iterator[str]:
    """On which sides of `b` thing `a` lies, "left of" or "above", by the larger axis of a picture of some ratio."""
    x, y = b.x - a.x, b.y - a.y
    if x > 0 and 2 * x > abs(y):
        yield "left of"
    if y > 0 and 2 * y > abs(x):
        yield "above"


def sub_facts(fact: Fact) -> tuple[Fact, ...]:
    """The smaller facts that a fact contains, one step down."""
    kind, *rest = fact
    if kind == "coloured count":
        count, shape, colour = rest
        return ("count", count, shape), ("colour", shape, colour)
    if kind == "coloured pair":
        return ("pair", rest[0][0], rest[1][0]), ("colour", *rest[0]), ("colour", *rest[1])
    if kind == "counted pair":
        counts = tuple(("count", count, shape) for shape, count in rest if count > 1)
        return ("pair", rest[0][0], rest[1][0]), *counts
    if kind == "relation":
        return (("pair", *sorted((rest[0], rest[2]))),)
    if kind == "coloured relation":
        one, side, other = rest
        return ("relation", one[0], side, other[0]), ("coloured pair", *sorted((one, other)))
    return ()


@cache
def label(fact: Fact) -> str:
    """ "train", "select" or "test"; "none" for a fact that contains kept ones of both, which is never shown."""
    kept = {label(part) for part in sub_facts(fact)} - {"train"}
    if kept:
        return kept.pop() if len(kept) == 1 else "none"
    return _direct_label(fact)


def _direct_label(fact: Fact) -> str:
    """The label of a fact whose sub-facts are all seen. The small kinds are tables: every shape has its turn."""
    kind, *rest = fact
    if kind == "colour":
        return _table_label(_index(rest[0]) ^ list(COLOURS).index(rest[1]))
    if kind == "pair":
        return _table_label(_index(rest[0]) ^ _index(rest[1]))
    if kind == "count":
        place = (_index(rest[1]) + 3 * (rest[0] - 2)) % 8
        return "test" if place in (0, 4) else "select" if place == 2 else "train"
    if kind == "relation":
        return _relation_label(rest[0], rest[1], rest[2])
    if kind == "coloured relation":
        return _coloured_relation_label(rest[0], rest[1], rest[2])
    test, select = _HASHED[kind]
    share = _share(fact)
    return "test" if share < test else "select" if share < test + select else "train"


def _share(fact: Fact, turn: int = 0) -> float:
    """A number in [0, 1) that looks random and depends on the fact alone."""
    digest = hashlib.sha256(f"{_SALT} {fact}".encode()).digest()
    return int.from_bytes(digest[4 * turn : 4 * turn + 4], "big") / 2**32


def _index(shape: str) -> int:
    return (*SHAPES, *NOVEL).index(shape) % len(SHAPES)


def _table_label(value: int) -> str:
    return "test" if value in _TEST else "select" if value == _SELECT else "train"


def _relation_label(one: str, side: str, other: str) -> str:
    """Of the four ways that two shapes may lie, one is kept for test, and of every second pair one for select."""
    low, high = sorted((one, other), key=_index)
    seen = [pair for pair in combinations(SHAPES, 2) if label(("pair", *sorted(pair))) == "train"]
    number = seen.index((low, high))
    way = 2 * (side == "above") + (one != low)
    kept = (number + number // 4) % 4
    return "test" if way == kept else "select" if number % 2 and way == (kept + 2) % 4 else "train"


def _coloured_relation_label(one: ColouredShape, side: str, other: ColouredShape) -> str:
    """Of the ways that two coloured shapes may lie, if their shapes may: one is kept for test (three times in five),
    one of three for select (a third of the times); at least one is left, so that training does show the two."""
    low, high = sorted((one, other))
    ways = [(low, "left of", high), (high, "left of", low), (low, "above", high), (high, "above", low)]
    free = [way for way in ways if label(("relation", way[0][0], way[1], way[2][0])) == "train"]
    pair = ("coloured pair", low, high)
    first, place = int(_share(pair, 1) * len(free)), free.index((one, side, other))
    if place == first:
        return "test" if _share(pair, 2) < 0.6 else "train"
    select = len(free) > 2 and place == (first + 1) % len(free) and _share(pair, 3) < 0.35
    return "select" if select else "train"


def contains(fact: Fact, other: Fact | None) -> bool:
    return fact == other or any(contains(part, other) for part in sub_facts(fact))


def permitted(shown: Iterable[Fact], split: Split, key: Fact | None) -> bool:
    """Whether scenes of `split` may show these facts: seen ones, and in select and test those that contain `key`."""
    return all(label(fact) == "train" or (split != "train" and contains(fact, key)) for fact in shown)
