"""Benchmark and reward `shapes`: held-out prompts in GenEval's six tasks, and words, judged exactly by the reader.

The same facts stand in each prompt's data as rubrics too, {id, kind, q, weight, check}, so that a language model can
be asked what the reader answers; `ShapesRubrics` is the reader in that judge's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from attrs import field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import SEED, each, integer, one_of, within
from lens_shapes.captions import NUMBERS, _named, _plural, dense, prompt
from lens_shapes.reader import NAMES, Reading, judge, read
from lens_shapes.scenes import COLOURS, GENEVAL, RELATIONS, TASKS, asked, sample


def verdicts(images: Tensor, prompts: Sequence[Prompt], partial: bool = False) -> list[Score]:
    """Images uint8 [B,3,H,W] -> 1.0 where every fact asked is there, else 0.0; `partial`: the share of the facts that
    are there. Prompts without facts: abstains."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures cannot answer {len(prompts)} prompts; pass one picture a prompt")
    scores = []
    for image, question in zip(images, prompts, strict=True):
        if "groups" not in question.data:
            scores.append(Score("abstain", evidence="the prompt carries no facts about shapes"))
            continue
        reading = read(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
        facts = judge(reading, question.data)
        value = sum(facts.values()) / len(facts) if partial else float(all(facts.values()))
        scores.append(Score("ok", value, facts, str(reading)))
    return scores


def rubrics(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `scenes.asked` as `rubrics`, one fact each, and the `global` one: plain data, as in `lens-rl/1`.

    A picture has a yes to every rubric exactly where it has every fact, in the sense of `reader.judge`.
    """
    found: list[dict[str, Any]] = []

    def ask(kind: str, q: str, op: str, **args: Any) -> None:
        found.append(
            {"id": f"r{len(found):02}", "kind": kind, "q": q, "weight": 1.0, "check": {"op": op, "args": args}}
        )

    total = 0
    for shape in dict.fromkeys(group["shape"] for group in facts["groups"]):
        mine = [group for group in facts["groups"] if group["shape"] == shape]
        count = sum(group["count"] for group in mine)
        total += count
        ask("object", f"Is there at least {_named(shape, 1, None)}?", "count_least", shape=shape, n=1)
        ask("count", f"Is the number of {_plural(shape)} exactly {NUMBERS[count]}?", "count_eq", shape=shape, n=count)
        for group in mine:
            if group["colour"] is not None:
                colour, n = group["colour"], group["count"]
                words = f"Is the number of {colour} {_plural(shape)} exactly {NUMBERS[n]}?"
                ask("colour", words, "count_eq", shape=shape, colour=colour, n=n)
    ask("count", f"Is the number of shapes in the whole picture exactly {NUMBERS[total]}?", "total_eq", n=total)
    if facts["relation"]:
        one, two = facts["groups"]
        words = [_named(g["shape"], g["count"], g["colour"]) for g in (one, two)]
        verb = "Is" if one["count"] == 1 else "Are"
        q = f"{verb} {words[0]} {facts['relation']} {words[1]}?"
        ask("spatial", q, "lies", subject=one, relation=facts["relation"], other=two)
    word = facts["word"]
    q = (
        f'Does the writing in the picture say "{word}", letter by letter?'
        if word
        else "Is the picture without writing?"
    )
    ask("text", q, "word_eq", word=word)
    whole = {"op": "all_named", "args": {}}
    q = "Is every shape whole, of one plain colour and clearly outlined?"
    return {"rubrics": found, "global": {"id": "g", "q": q, "weight": 1.0, "check": whole}}


def _count(reading: Reading, shape: str, colour: str | None = None) -> int | None:
    if shape not in NAMES or colour not in (None, *COLOURS):
        return None  # the reader knows no such thing
    return sum(t.shape == shape and colour in (None, t.colour) for t in reading.things)


def _lies(reading: Reading, subject: Mapping[str, Any], relation: str, other: Mapping[str, Any]) -> bool | None:
    groups = [{"count": 1, "colour": None, **group} for group in (subject, other)]
    if relation not in RELATIONS or any(_count(reading, g["shape"], g["colour"]) is None for g in groups):
        return None
    return bool(judge(reading, {"groups": groups, "relation": relation, "word": ""})["relation"])


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
    "all_named": lambda reading: "?" not in {name for t in reading.things for name in (t.shape, t.colour)},
}
"""Checks that the reader can make: op -> (reading, **args) -> yes, no, or None where it knows no such thing."""


def _op(rubric: Mapping[str, Any]) -> Callable[..., bool | None] | None:
    check = rubric.get("check")
    name = check.get("op") if isinstance(check, Mapping) else None
    return OPS.get(name) if isinstance(name, str) else None


def verdict(reading: Reading, rubric: Mapping[str, Any]) -> bool | None:
    """The answer to a rubric by its check; None (the judge's "na") where it has none that the reader can make."""
    op = _op(rubric)
    try:
        return None if op is None else op(reading, **rubric["check"]["args"])
    except (KeyError, TypeError):
        return None  # arguments of another kind of world


class ShapesRubrics:
    """The reward that answers a prompt's rubrics from pixels: exact, without a call, and by the same ids and weights as
    a language model does. It is such a judge's fallback, and its auditor.

    Weighted mean of yes 1 and no 0 over the rubrics whose check the reader can make, the global one included; a prompt
    is abstained from where too few of them are of that kind.
    """

    @frozen
    class Config:
        least: float = field(default=0.7, validator=within(0, 1))  # share of the rubrics that must have a verdict

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> one Score each; components by rubric id."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures cannot answer {len(prompts)} prompts; pass one picture a prompt")
        return [self._judge(image, question) for image, question in zip(images, prompts, strict=True)]

    def _judge(self, image: Tensor, question: Prompt) -> Score:
        asked = [*question.data.get("rubrics", ()), *([question.data["global"]] if question.data.get("global") else [])]
        if not any(map(_op, asked)):
            return Score("abstain", evidence="the prompt carries no rubric that the reader of shapes can check")
        reading = read(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
        answers = {r["id"]: verdict(reading, r) for r in asked}
        values = {name: float(answer) for name, answer in answers.items() if answer is not None}
        if not values or len(values) < self.config.least * len(asked):
            return Score(
                "abstain", None, values, f"only {len(values)} of {len(asked)} rubrics can be checked: {reading}"
            )
        weights = {r["id"]: float(r.get("weight", 1.0)) for r in asked if r["id"] in values}
        value = sum(weights[name] * v for name, v in values.items()) / sum(weights.values())
        return Score("ok", value, values, str(reading))


class ShapesBenchmark:
    """Prompts spread evenly over the tasks. The overall figure is the mean of `headline`: of GenEval's six where they
    are among the tasks, else of all."""

    @frozen
    class Config:
        prompts: int = field(default=500, validator=integer(at_least=1))
        seed: int = field(default=0, validator=SEED)
        split: Literal["train", "heldout"] = field(default="heldout", validator=one_of("train", "heldout"))
        # Kinds of scene that are asked for; `scenes.TASKS` has them all.
        tasks: tuple[str, ...] = field(default=(*GENEVAL, "words"), validator=each(one_of(*TASKS), at_least=1))
        dense: bool = False  # asked for at length, as a prompt enhancer would; the facts judged are the short prompt's
        largest: bool = False  # scenes whose things are as large as their number allows; long prompts tell of it

    def __init__(self, config: Config) -> None:
        self.config = config
        self.headline = tuple(task for task in config.tasks if task in GENEVAL) or config.tasks

    def prompts(self) -> list[Prompt]:
        """The same prompts for the same config, ordered by id; prompt n is of task n mod their number."""
        tasks = self.config.tasks
        found = []
        for number in range(self.config.prompts):
            task = tasks[number % len(tasks)]
            rng = np.random.default_rng([self.config.seed, number])
            scene = sample(rng, self.config.split, task, largest=self.config.largest)
            words, facts = dense(scene, rng) if self.config.dense else prompt(scene), asked(scene)
            found.append(Prompt(words, number, task, {**facts, **rubrics(facts)}))
        return found

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return verdicts(images, prompts)


class ShapesReward:
    """The benchmark's judge as a reward: exact, deterministic, and impossible to flatter."""

    @frozen
    class Config:
        partial: bool = False  # credit for the share of facts that are there: a weak model's pictures differ then

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return verdicts(images, prompts, self.config.partial)
