"""A prompt's facts as rubrics, {id, kind, q, weight, check}, and the reward that answers them from pixels.

A language model can be asked the same questions; `ShapesRubrics` is the exact reader in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import within
from lens_shapes.captions import NUMBERS, group_words, plural
from lens_shapes.reader import read
from lens_shapes.reading import NAMES, Reading, check_facts, lies_behind
from lens_shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS
from lens_shapes.scoring import check_one_each


def rubrics(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `scenes.prompt_facts` as `rubrics`, one each, and the `global` one: plain data, as in `lens-rl/1`.

    A picture has a yes to every rubric exactly where it has every fact, in the sense of `reading.check_facts`.
    """
    questions: list[dict[str, Any]] = []

    def ask(kind: str, q: str, op: str, **args: Any) -> None:
        questions.append(
            {"id": f"r{len(questions):02}", "kind": kind, "q": q, "weight": 1.0, "check": {"op": op, "args": args}}
        )

    total = 0
    for shape in dict.fromkeys(group["shape"] for group in facts["groups"]):
        mine = [group for group in facts["groups"] if group["shape"] == shape]
        count = sum(group["count"] for group in mine)
        total += count
        ask("object", f"Is there at least {group_words(shape, 1, None)}?", "count_least", shape=shape, n=1)
        ask("count", f"Is the number of {plural(shape)} exactly {NUMBERS[count]}?", "count_eq", shape=shape, n=count)
        for group in mine:
            if group["colour"] is not None:
                colour, n = group["colour"], group["count"]
                words = f"Is the number of {colour} {plural(shape)} exactly {NUMBERS[n]}?"
                ask("colour", words, "count_eq", shape=shape, colour=colour, n=n)
    ask("count", f"Is the number of shapes in the whole picture exactly {NUMBERS[total]}?", "total_eq", n=total)
    if facts["relation"]:
        one, two = facts["groups"]
        first, second = (group_words(g["shape"], g["count"], g["colour"]) for g in (one, two))
        verb = "Is" if one["count"] == 1 else "Are"
        q = f"{verb} {first} {facts['relation']} {second}?"
        ask("spatial", q, "lies", subject=one, relation=facts["relation"], other=two)
    word = facts["word"]
    q = (
        f'Does the writing in the picture say "{word}", letter by letter?'
        if word
        else "Is the picture without writing?"
    )
    ask("text", q, "word_eq", word=word)
    behind = facts.get("background")
    if behind:
        names, halves = behind["names"], behind["halves"]
        one, two = ("top", "bottom") if halves == "across" else ("left", "right")
        words = f"all {names[0]}" if not halves else f"{names[0]} in its {one} half and {names[1]} in its {two} half"
        ask("background", f"Is the background {words}?", "background_eq", names=names, halves=halves)
    whole = {"op": "all_named", "args": {}}
    q = "Is every shape whole, of one plain colour and clearly outlined?"
    return {"rubrics": questions, "global": {"id": "g", "q": q, "weight": 1.0, "check": whole}}


def _count(reading: Reading, shape: str, colour: str | None = None) -> int | None:
    if shape not in NAMES or colour not in (None, *COLOURS):
        return None  # the reader knows no such thing
    return sum(t.shape == shape and colour in (None, t.colour) for t in reading.things)


def _lies(reading: Reading, subject: Mapping[str, Any], relation: str, other: Mapping[str, Any]) -> bool | None:
    groups = [{"count": 1, "colour": None, **group} for group in (subject, other)]
    if relation not in RELATIONS or any(_count(reading, g["shape"], g["colour"]) is None for g in groups):
        return None
    return bool(check_facts(reading, {"groups": groups, "relation": relation, "word": ""})["relation"])


def _equal(count: int | None, n: int) -> bool | None:
    return None if count is None else count == n


OPS: dict[str, Callable[..., bool | None]] = {
    "count_eq": lambda reading, shape, n, colour=None: _equal(_count(reading, shape, colour), n),
    "count_least": lambda reading, shape, n, colour=None: (
        None if (count := _count(reading, shape, colour)) is None else count >= n
    ),
    "total_eq": lambda reading, n: len(reading.things) == n,
    "lies": _lies,
    "word_eq": lambda reading, word: reading.word == word,
    "background_eq": lambda reading, names, halves: (
        None if set(names) - set(BACKGROUNDS) else lies_behind(reading, names, halves)
    ),
    "all_named": lambda reading: "?" not in {name for t in reading.things for name in (t.shape, t.colour)},
}
"""Checks that the reader can make: op -> (reading, **args) -> yes, no, or None where it knows no such thing."""


def _op(rubric: Mapping[str, Any]) -> Callable[..., bool | None] | None:
    check = rubric.get("check")
    name = check.get("op") if isinstance(check, Mapping) else None
    return OPS.get(name) if isinstance(name, str) else None


def answer(reading: Reading, rubric: Mapping[str, Any]) -> bool | None:
    """The answer to a rubric by its check; None (the judge's "na") where it has none that the reader can make."""
    op = _op(rubric)
    try:
        return None if op is None else op(reading, **rubric["check"]["args"])
    except (KeyError, TypeError):
        return None  # arguments of another kind of world


class ShapesRubrics:
    """Answer a prompt's rubrics from pixels, exactly and without a language model.

    By the same ids and weights as a language model does: it is such a judge's fallback, and its auditor.

    Weighted mean of yes 1 and no 0 over the rubrics whose check the reader can make, the global one included; a prompt
    is abstained from where too few of them are of that kind.
    """

    needs = ("rubrics",)

    @frozen
    class Config:
        min_answered: float = field(
            default=0.7, validator=within(0, 1)
        )  # share of the rubrics that must have an answer

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> one Score each; components by rubric id."""
        check_one_each(images, prompts)
        return [self._judge(image, question) for image, question in zip(images, prompts, strict=True)]

    def _judge(self, image: Tensor, question: Prompt) -> Score:
        questions = [
            *question.data.get("rubrics", ()),
            *([question.data["global"]] if question.data.get("global") else []),
        ]
        if not any(map(_op, questions)):
            return Score("abstain", evidence="the prompt carries no rubric that the reader of shapes can check")
        reading = read(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
        answers = {r["id"]: answer(reading, r) for r in questions}
        values = {name: float(yes) for name, yes in answers.items() if yes is not None}
        if not values or len(values) < self.config.min_answered * len(questions):
            return Score(
                "abstain", None, values, f"only {len(values)} of {len(questions)} rubrics can be checked: {reading}"
            )
        weights = {r["id"]: float(r.get("weight", 1.0)) for r in questions if r["id"] in values}
        value = sum(weights[name] * v for name, v in values.items()) / sum(weights.values())
        return Score("ok", value, values, str(reading))
