"""Which combinations are trained on, selected by and tested with (rules 2); the scenes and questions of each split.

A scene shows *facts*: a shape has a colour, two shapes stand in one picture, there are n of a shape, one shape lies on
a side of another, each with and without colours; and a word. Every fact has one label, "train", "select" or "test":

- A scene of training holds train facts alone, whatever its task, whatever its caption names.
- A question of test asks for exactly one unseen combination, the one that its task is about; the parts of that
  combination are seen in training, and its scenes show nothing else that is unseen. Select likewise.
- A fact that contains a kept one is kept too: with the pair star + circle goes every red star + blue circle.

The task "single" ("a circle") cannot be held out: its parts are the shapes themselves. It is reported apart.
Backgrounds, sizes and places are never kept back; a question may name the background, to be asked more than once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, islice, permutations, product
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen

from lens_shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NOVEL,
    OPPOSITE,
    SHAPES,
    TASKS,
    Scene,
    Thing,
    choose,
    layout,
    sizes_for,
    two_of,
    word_of,
)

Split = Literal["train", "select", "test"]
SPLITS: tuple[Split, ...] = ("train", "select", "test")

Fact = tuple[Any, ...]
Look = tuple[str, str]
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
MOST_WORDS, MOST_GROUPS = 20_000, 5_000
"""Distinct words, and groups, that a benchmark may ask for; a split has more."""


def facts_of(groups: Sequence[Group], relations: Iterable[tuple[int, str, int]] = (), word: str = "") -> set[Fact]:
    """Every fact that these groups show. `relations`: (number of a group, "left of" or "above", number of another)."""
    found: set[Fact] = {("word", word)} if word else set()
    for shape, colour, count in groups:
        if colour:
            found.add(("colour", shape, colour))
        if count > 1:
            found.add(("count", count, shape))
        if count > 1 and colour:
            found.add(("coloured count", count, shape, colour))
    for one, other in combinations(sorted(groups), 2):
        found.add(("pair", one[0], other[0]))
        if one[1] and other[1]:
            found.add(("coloured pair", one[:2], other[:2]))
        if one[2] + other[2] > 2:
            found.add(("counted pair", (one[0], one[2]), (other[0], other[2])))
    for first, side, second in relations:
        a, b = groups[first], groups[second]
        found.add(("relation", a[0], side, b[0]))
        if a[1] and b[1]:
            found.add(("coloured relation", a[:2], side, b[:2]))
    return found


def facts(scene: Scene) -> set[Fact]:
    """Every fact that a picture of `scene` shows at any aspect ratio from 1:2 to 2:1, told or not."""
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


def parts(fact: Fact) -> tuple[Fact, ...]:
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
    kept = {label(part) for part in parts(fact)} - {"train"}
    if kept:
        return kept.pop() if len(kept) == 1 else "none"
    return _own(fact)


def _own(fact: Fact) -> str:
    """The label of a fact whose parts are all seen. The small kinds are tables, in which all shapes have their turn."""
    kind, *rest = fact
    if kind == "colour":
        return _by(_index(rest[0]) ^ list(COLOURS).index(rest[1]))
    if kind == "pair":
        return _by(_index(rest[0]) ^ _index(rest[1]))
    if kind == "count":
        place = (_index(rest[1]) + 3 * (rest[0] - 2)) % 8
        return "test" if place in (0, 4) else "select" if place == 2 else "train"
    if kind == "relation":
        return _side(rest[0], rest[1], rest[2])
    if kind == "coloured relation":
        return _coloured_side(rest[0], rest[1], rest[2])
    test, select = _HASHED[kind]
    share = _share(fact)
    return "test" if share < test else "select" if share < test + select else "train"


def _share(fact: Fact, turn: int = 0) -> float:
    """A number in [0, 1) that looks random and hangs on the fact alone."""
    digest = hashlib.sha256(f"{_SALT} {fact}".encode()).digest()
    return int.from_bytes(digest[4 * turn : 4 * turn + 4], "big") / 2**32


def _index(shape: str) -> int:
    return (*SHAPES, *NOVEL).index(shape) % len(SHAPES)


def _by(value: int) -> str:
    return "test" if value in _TEST else "select" if value == _SELECT else "train"


def _side(one: str, side: str, other: str) -> str:
    """Of the four ways that two shapes may lie, one is kept for test, and of every second pair one for select."""
    low, high = sorted((one, other), key=_index)
    seen = [pair for pair in combinations(SHAPES, 2) if label(("pair", *sorted(pair))) == "train"]
    number = seen.index((low, high))
    way = 2 * (side == "above") + (one != low)
    kept = (number + number // 4) % 4
    return "test" if way == kept else "select" if number % 2 and way == (kept + 2) % 4 else "train"


def _coloured_side(one: Look, side: str, other: Look) -> str:
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


@frozen
class Question:
    """What a prompt asks for, whatever its words. `relation`: "left of", "above" or "". `background`: one or two names
    where the prompt names it, two of them split `halves`, "across" or "down"."""

    task: str
    groups: tuple[Group, ...]
    relation: str = ""
    word: str = ""
    background: tuple[str, ...] = ()
    halves: str = ""

    def __str__(self) -> str:
        things = f" {self.relation or '+'} ".join(" ".join(map(str, filter(None, group))) for group in self.groups)
        behind = f" on {' '.join(self.background)} {self.halves}".rstrip() if self.background else ""
        return " ".join(filter(None, (f"{self.task}:", things, self.word))) + behind

    def key(self) -> Fact | None:
        """The combination that the task is about; None for a single shape."""
        one, other = (*self.groups, *[("", None, 0)] * 2)[:2]
        low, high = sorted((one, other))
        if self.word:
            return ("word", self.word)
        if self.task in ("colours", "novel"):
            return ("colour", *one[:2])
        if self.task == "two":
            return ("pair", low[0], high[0])
        if self.task == "counting":
            return ("count", one[2], one[0])
        if self.task == "counted colours":
            return ("coloured count", one[2], *one[:2])
        if self.task == "position":
            return ("relation", one[0], self.relation, other[0])
        if self.task == "coloured position":
            return ("coloured relation", one[:2], self.relation, other[:2])
        if self.task == "attribution":
            return ("coloured pair", low[:2], high[:2])
        return ("counted pair", (low[0], low[2]), (high[0], high[2])) if self.task == "groups" else None

    def asked(self) -> set[Fact]:
        """Every fact that the prompt names."""
        return facts_of(self.groups, [(0, self.relation, 1)] if self.relation else [], self.word)


def _contains(fact: Fact, other: Fact | None) -> bool:
    return fact == other or any(_contains(part, other) for part in parts(fact))


def permitted(shown: Iterable[Fact], split: Split, key: Fact | None) -> bool:
    """Whether scenes of `split` may show these facts: seen ones, and in select and test those that contain `key`."""
    return all(label(fact) == "train" or (split != "train" and _contains(fact, key)) for fact in shown)


@cache
def questions(task: str, split: Split) -> tuple[Question, ...]:
    """Every distinct question of a task in a split, in a fixed order, with no background named; words apart."""
    found = []
    for question in _all(task, split):
        key = question.key()
        if key is not None and label(key) != split:
            continue
        if permitted(question.asked(), split, key) and colourings(question, split):
            found.append(question)
    return tuple(found)


def _all(task: str, split: Split) -> Iterator[Question]:
    """Every question of a task that could be asked. Those with kept parts are left out early where there are many."""
    ones = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    if task == "single":
        yield from (Question(task, ((shape, None, 1),)) for shape in SHAPES)
    elif task in ("colours", "novel"):
        shapes = NOVEL if task == "novel" else SHAPES
        yield from (Question(task, ((shape, colour, 1),)) for shape in shapes for colour in COLOURS)
    elif task == "two":
        yield from (Question(task, ((a, None, 1), (b, None, 1))) for a, b in combinations(SHAPES, 2))
    elif task == "counting":
        yield from (Question(task, ((shape, None, count),)) for shape in SHAPES for count in range(2, 7))
    elif task == "counted colours":
        yield from (Question(task, ((*one, count),)) for one in ones for count in range(2, 7))
    elif task == "position":
        for (a, b), side in product(permutations(SHAPES, 2), ("left of", "above")):
            yield Question(task, ((a, None, 1), (b, None, 1)), side)
    elif task in ("attribution", "coloured position"):
        pairs = combinations(ones, 2) if task == "attribution" else permutations(ones, 2)
        for (a, b), side in product(pairs, ("",) if task == "attribution" else ("left of", "above")):
            if a[0] != b[0] and a[1] != b[1]:
                yield Question(task, ((*a, 1), (*b, 1)), side)
    elif task == "groups":
        yield from _all_groups(task, split)
    else:
        raise ValueError(f"the questions of {task!r} cannot be listed")


def _all_groups(task: str, split: Split) -> Iterator[Question]:
    for a, b in permutations(SHAPES, 2):
        for first, second in product(range(1, 6), range(1, 6)):
            plain: tuple[Group, ...] = ((a, None, first), (b, None, second))
            key = Question(task, plain).key()
            if not 2 < first + second < 7 or not permitted(facts_of(plain), split, key):
                continue
            for c, d in permutations(COLOURS, 2):
                for side in ("", "left of", "above"):
                    if side or a < b:  # without a side, the order says nothing
                        yield Question(task, ((a, c, first), (b, d, second)), side)


@cache
def colourings(question: Question, split: Split) -> tuple[tuple[str, ...], ...]:
    """Every way to colour the groups of a question with seen colours (or the one that it asks for)."""
    found = []
    for colours in product(*((colour,) if colour else tuple(COLOURS) for _, colour, _ in question.groups)):
        groups = [(shape, colour, count) for (shape, _, count), colour in zip(question.groups, colours, strict=True)]
        shown = facts_of(groups, [(0, question.relation, 1)] if question.relation else [], question.word)
        if permitted(shown, split, question.key()) and (
            question.relation or len(groups) < 2 or _free(groups, question, split)
        ):
            found.append(colours)
    return tuple(found)


def _free(groups: Sequence[Group], question: Question, split: Split) -> list[str]:
    """The sides of the second group on which the first may lie."""
    ways = {
        "left of": (0, "left of", 1),
        "right of": (1, "left of", 0),
        "above": (0, "above", 1),
        "below": (1, "above", 0),
    }
    return [side for side, way in ways.items() if permitted(facts_of(groups, [way]), split, question.key())]


def draw_question(rng: np.random.Generator, split: Split, task: str) -> Question:
    """A question of a task, at random."""
    if task not in TASKS:
        raise ValueError(f"no kind of scene is called {task!r}; the kinds are {', '.join(TASKS)}")
    if task not in ("words", "word and thing"):
        known = questions(task, split)
        return known[int(rng.integers(len(known)))]
    while True:
        word = word_of(rng)
        if label(("word", word)) == split:
            break
    if task == "words":
        return Question(task, (), "", word)
    seen = questions("colours", "train")
    return Question(task, seen[int(rng.integers(len(seen)))].groups, "", word)


def backgrounds(rng: np.random.Generator) -> list[tuple[tuple[str, ...], str]]:
    """Every background that a prompt may name, none first, then the plain ones, then the split ones, each shuffled."""
    plain: list[tuple[tuple[str, ...], str]] = [((name,), "") for name in BACKGROUNDS]
    split = list(product(permutations(BACKGROUNDS, 2), ("across", "down")))
    return [
        ((), ""),
        *(plain[n] for n in rng.permutation(len(plain))),
        *(split[n] for n in rng.permutation(len(split))),
    ]


NAMED = 1 + len(BACKGROUNDS) + 2 * len(BACKGROUNDS) * (len(BACKGROUNDS) - 1)
"""How many ways `backgrounds` has."""


def capacity(task: str, split: Split) -> int:
    """How many distinct questions a task has in a split, those that name a background included."""
    if task in ("words", "word and thing"):
        return MOST_WORDS
    return min(MOST_GROUPS if task == "groups" else MOST_WORDS, NAMED * len(questions(task, split)))


def distinct(split: Split, task: str, count: int, seed: int) -> list[Question]:
    """`count` different questions, at most `capacity`: every combination in turn, first with no background named."""
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    if task in ("words", "word and thing"):
        words: dict[str, Question] = {}
        while len(words) < count:
            question = draw_question(rng, split, task)
            words.setdefault(question.word, question)
        return list(words.values())
    listed = questions(task, split)
    shuffled = (listed[n] for n in rng.permutation(len(listed)))
    known = list(islice((q for q in shuffled if task != "groups" or _drawable(q, split)), count))
    found, behind = known[:count], [backgrounds(rng) for _ in known] if count > len(known) else []
    for number in range(len(known), count):
        names, halves = behind[number % len(known)][number // len(known)]
        found.append(evolve(known[number % len(known)], background=names, halves=halves))
    return found


@cache
def _drawable(question: Question, split: Split) -> bool:
    """Whether many things find places that show no kept side: not where only one side is free to five of them."""
    rng = np.random.default_rng(0)
    return any(realise(rng, question, split) is not None for _ in range(60))


def realise(rng: np.random.Generator, question: Question, split: Split, largest: bool = False) -> Scene | None:
    """A scene of `split` that a question is true of, told from either side; None where luck ran out."""
    options = colourings(question, split)
    colours = options[int(rng.integers(len(options)))]
    total = sum(count for _, _, count in question.groups)
    sizes, things = sizes_for(total, largest), []
    for (shape, _, count), colour in zip(question.groups, colours, strict=True):
        things.append([Thing(shape, colour, choose(rng, sizes), 0.0, 0.0)] * count)
    relation = question.relation
    if len(things) == 2 and rng.random() < 0.5:  # the same fact, told from the other side
        things, relation = things[::-1], OPPOSITE.get(relation, "")
    word_at = ""
    if question.word:
        word_at = choose(rng, ("top", "bottom") if things else ("top", "middle", "bottom"))
    draft = Scene(question.task, tuple(t for group in things for t in group), (), "", question.word, word_at, relation)
    helped = draft
    if len(things) == 2 and not relation and rng.random() < 0.5:  # few layouts of many things keep to the free sides
        told: list[Group] = [(group[0].shape, group[0].colour, len(group)) for group in things]
        helped = evolve(draft, relation=choose(rng, _free(told, question, split)))
    placed = layout(rng, helped)
    if placed is None or not permitted(facts(evolve(draft, things=placed)), split, question.key()):
        return None
    background, halves = question.background, question.halves
    if not background:
        background = two_of(rng, BACKGROUNDS)
        halves = choose(rng, ("across", "down")) if rng.random() < 0.3 else ""
        background = background if halves else background[:1]
    return evolve(draft, things=placed, background=background, split=halves, named=bool(question.background))


def sample(
    rng: np.random.Generator,
    split: Split,
    task: str | None = None,
    tasks: Mapping[str, float] = TASKS,
    largest: bool = False,
) -> Scene:
    """One scene of `split`, of kind `task` or else of one drawn with the weights `tasks`. Same state, same scene.

    `largest`: all things have the largest size that as many of them may have, instead of any.
    """
    if task is None:
        names, weights = list(tasks), np.cumsum(list(tasks.values()))
        task = names[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    while True:  # some colourings leave two things hardly a way to lie: then another question
        question = draw_question(rng, split, task)
        for _ in range(20):
            scene = realise(rng, question, split, largest)
            if scene is not None:
                return scene


def scene_for(rng: np.random.Generator, question: Question, split: Split, largest: bool = False) -> Scene:
    """One scene that the question is true of."""
    while True:
        scene = realise(rng, question, split, largest)
        if scene is not None:
            return scene
