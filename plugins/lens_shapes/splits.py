"""Which combinations are trained on, selected by and tested with (rules 2); the scenes and questions of each split.

A scene shows *facts*: a shape has a colour, two shapes stand in one picture, there are n of a shape, one shape lies on
a side of another, each with and without colours; and a word. Every fact has one label, "train", "select" or "test":

- A scene of training holds train facts alone, whatever its task, whatever its caption names.
- A question of test asks for exactly one unseen combination, the one that its task is about; the parts of that
  combination are seen in training, and its scenes show nothing else that is unseen. Select likewise.
- A fact that contains a kept one is kept too: with the pair star + circle goes every red star + blue circle.

The task "single" ("a circle") cannot be held out: its parts are the shapes themselves. It is reported apart.
Backgrounds, sizes and places are never kept back. A question may name the background: so one combination gives several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, islice, permutations, product

import numpy as np
from attrs import evolve, frozen

from lens_shapes.facts import SPLITS, Fact, Group, Split, facts_of, label, permitted, shown_facts
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
    choose_weighted,
    layout,
    sizes_for,
    two_of,
    word_of,
)

__all__ = ["SPLITS", "Split"]

MOST_WORDS, MOST_GROUPS = 20_000, 5_000
"""Distinct words, and groups, that a benchmark may ask for; a split has more."""


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

    def named_facts(self) -> set[Fact]:
        """Every fact that the prompt names."""
        return facts_of(self.groups, [(0, self.relation, 1)] if self.relation else [], self.word)


@cache
def questions(task: str, split: Split) -> tuple[Question, ...]:
    """Every distinct question of a task in a split, in a fixed order, with no background named; words apart."""
    listed = []
    for question in _candidates(task, split):
        key = question.key()
        if key is not None and label(key) != split:
            continue
        if permitted(question.named_facts(), split, key) and colourings(question, split):
            listed.append(question)
    return tuple(listed)


def _candidates(task: str, split: Split) -> Iterator[Question]:
    """Every question of a task; where there are many, those with kept facts are left out early."""
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
        for (first, second), side in product(pairs, ("",) if task == "attribution" else ("left of", "above")):
            if first[0] != second[0] and first[1] != second[1]:
                yield Question(task, ((*first, 1), (*second, 1)), side)
    elif task == "groups":
        yield from _group_candidates(task, split)
    else:
        raise ValueError(f"the questions of {task!r} cannot be listed")


def _group_candidates(task: str, split: Split) -> Iterator[Question]:
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
    ways = []
    for colours in product(*((colour,) if colour else tuple(COLOURS) for _, colour, _ in question.groups)):
        groups = [(shape, colour, count) for (shape, _, count), colour in zip(question.groups, colours, strict=True)]
        shown = facts_of(groups, [(0, question.relation, 1)] if question.relation else [], question.word)
        if permitted(shown, split, question.key()) and (
            question.relation or len(groups) < 2 or _permitted_sides(groups, question, split)
        ):
            ways.append(colours)
    return tuple(ways)


def _permitted_sides(groups: Sequence[Group], question: Question, split: Split) -> list[str]:
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


BACKGROUND_CHOICES = 1 + len(BACKGROUNDS) + 2 * len(BACKGROUNDS) * (len(BACKGROUNDS) - 1)
"""How many ways `backgrounds` has."""


def capacity(task: str, split: Split) -> int:
    """How many distinct questions a task has in a split, those that name a background included."""
    if task in ("words", "word and thing"):
        return MOST_WORDS
    return min(MOST_GROUPS if task == "groups" else MOST_WORDS, BACKGROUND_CHOICES * len(questions(task, split)))


def distinct_questions(split: Split, task: str, count: int, seed: int) -> list[Question]:
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
    chosen, behind = known[:count], [backgrounds(rng) for _ in known] if count > len(known) else []
    for number in range(len(known), count):
        names, halves = behind[number % len(known)][number // len(known)]
        chosen.append(evolve(known[number % len(known)], background=names, halves=halves))
    return chosen


@cache
def _drawable(question: Question, split: Split) -> bool:
    """Whether many things find places that show no kept side: not where only one side is free to five of them."""
    rng = np.random.default_rng(0)
    return any(try_scene(rng, question, split) is not None for _ in range(60))


def try_scene(rng: np.random.Generator, question: Question, split: Split, largest: bool = False) -> Scene | None:
    """A scene of `split` that a question is true of, seen from either side; None where luck ran out."""
    options = colourings(question, split)
    colours = options[int(rng.integers(len(options)))]
    total = sum(count for _, _, count in question.groups)
    sizes, things = sizes_for(total, largest), []
    for (shape, _, count), colour in zip(question.groups, colours, strict=True):
        things.append([Thing(shape, colour, choose(rng, sizes), 0.0, 0.0)] * count)
    relation = question.relation
    if len(things) == 2 and rng.random() < 0.5:  # the same fact, seen from the other side
        things, relation = things[::-1], OPPOSITE.get(relation, "")
    word_at = ""
    if question.word:
        word_at = choose(rng, ("top", "bottom") if things else ("top", "middle", "bottom"))
    draft = Scene(question.task, tuple(t for group in things for t in group), (), "", question.word, word_at, relation)
    guided = draft
    if len(things) == 2 and not relation and rng.random() < 0.5:  # few layouts of many things keep to the free sides
        coloured_groups: list[Group] = [(group[0].shape, group[0].colour, len(group)) for group in things]
        guided = evolve(draft, relation=choose(rng, _permitted_sides(coloured_groups, question, split)))
    placed = layout(rng, guided)
    if placed is None or not permitted(shown_facts(evolve(draft, things=placed)), split, question.key()):
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
        task = choose_weighted(rng, tasks)
    while True:  # some colourings leave two things hardly a way to lie: then another question
        question = draw_question(rng, split, task)
        for _ in range(20):
            scene = try_scene(rng, question, split, largest)
            if scene is not None:
                return scene


def scene_for(rng: np.random.Generator, question: Question, split: Split, largest: bool = False) -> Scene:
    """One scene that the question is true of."""
    while True:
        scene = try_scene(rng, question, split, largest)
        if scene is not None:
            return scene
