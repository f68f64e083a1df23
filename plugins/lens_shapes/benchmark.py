"""Benchmark and reward `shapes`: held-out prompts in GenEval's six tasks, and words, judged exactly by the reader.

The same facts stand in each prompt's data as rubrics too, {id, kind, q, weight, check}, so that a language model can
be asked what the reader answers; `ShapesRubrics` is the reader in that judge's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, field, frozen
from torch import Tensor

from lens_core.types import ConfigError, Prompt, Score, did_you_mean
from lens_core.validators import SEED, each, integer, one_of, within
from lens_shapes import captions, splits
from lens_shapes.captions import NUMBERS, _named, _plural, dense, prompt
from lens_shapes.reader import NAMES, Reading, judge, lies_behind, read
from lens_shapes.render import render
from lens_shapes.scenes import BACKGROUNDS, COLOURS, GENEVAL, RELATIONS, TASKS, Scene, asked, sample

RULES = integer(at_least=1, at_most=2)
"""2: the splits of `splits`; 1: those by which the embedded checkpoints were trained."""


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
    behind = facts.get("background")
    if behind:
        names, halves = behind["names"], behind["halves"]
        one, two = ("top", "bottom") if halves == "across" else ("left", "right")
        words = f"all {names[0]}" if not halves else f"{names[0]} in its {one} half and {names[1]} in its {two} half"
        ask("background", f"Is the background {words}?", "background_eq", names=names, halves=halves)
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

    needs = ("rubrics",)

    @frozen
    class Config:
        min_answered: float = field(
            default=0.7, validator=within(0, 1)
        )  # share of the rubrics that must have a verdict

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
        if not values or len(values) < self.config.min_answered * len(asked):
            return Score(
                "abstain", None, values, f"only {len(values)} of {len(asked)} rubrics can be checked: {reading}"
            )
        weights = {r["id"]: float(r.get("weight", 1.0)) for r in asked if r["id"] in values}
        value = sum(weights[name] * v for name, v in values.items()) / sum(weights.values())
        return Score("ok", value, values, str(reading))


@frozen
class Ask:
    """One distinct question of a benchmark: a scene that it is true of, its wordings, and its combination's name."""

    scene: Scene
    texts: tuple[str, ...]
    question: str
    fact: str


def check_split(split: str, rules: int) -> None:
    """ConfigError where the rules know no such split."""
    known = ("train", "heldout") if rules == 1 else splits.SPLITS
    if split not in known:
        other = "; 'heldout' is a split of rules 1" if split == "heldout" else ""
        other = f"; {split!r} is a split of rules 2" if rules == 1 and split in splits.SPLITS else other
        raise ConfigError(
            f"no split of rules {rules} is called {split!r}{other}; use {' or '.join(map(repr, known))}"
            f"{did_you_mean(split, known)}"
        )


def check_count(name: str, task: str, split: splits.Split, count: int) -> None:
    """ConfigError where a task has fewer distinct prompts than asked for."""
    most = splits.capacity(task, split)
    if count > most:
        raise ConfigError(
            f"{name}: the task {task!r} has {most} distinct prompts in the split {split!r}, not {count}; ask for fewer"
        )


def ask(question: splits.Question, split: splits.Split, seed: Sequence[int], phrasings: int, largest: bool) -> Ask:
    """A question with a scene of its own and `phrasings` different wordings, the plain one first."""
    rng = np.random.default_rng(seed)
    scene = splits.scene_for(rng, question, split, largest)
    plain, *others = captions.phrasings(scene)
    texts = (plain, *(others[n] for n in rng.permutation(len(others))[: phrasings - 1]))
    return Ask(scene, texts, str(question), str(evolve(question, background=(), halves="")))


def pictures(asks: Sequence[Scene], height: int, width: int) -> Tensor:
    """Scenes -> uint8 [B,3,H,W]."""
    import torch

    return torch.from_numpy(np.stack([render(scene, height, width) for scene in asks])).permute(0, 3, 1, 2)


def through(vae: Any, images: Tensor, batch: int = 32) -> Tensor:
    """Images uint8 [B,3,H,W], encoded and decoded by a VAE, as uint8 again."""
    import torch

    weight = next(iter(vae.parameters()), None) if hasattr(vae, "parameters") else None
    found = []
    with torch.no_grad():
        for part in images.split(batch):
            pixels = part.float() / 127.5 - 1
            pixels = pixels if weight is None else pixels.to(weight.device, weight.dtype)
            back = vae.decode(vae.encode(pixels)).float().clamp(-1, 1)
            found.append(((back + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(found)


class ShapesBenchmark:
    """Distinct questions spread evenly over the tasks. The overall figure is the mean of `headline`: the tasks of
    GenEval where there are any among the tasks, else all; without "single", which cannot be held out."""

    @frozen
    class Config:
        prompts: int = field(default=500, validator=integer(at_least=1))  # distinct questions
        seed: int = field(default=0, validator=SEED)
        split: str = ""  # train, select or test (rules 1: train or heldout); "": test (heldout)
        # Kinds of scene that are asked for; `scenes.TASKS` has them all.
        tasks: tuple[str, ...] = field(default=(*GENEVAL, "words"), validator=each(one_of(*TASKS), at_least=1))
        dense_prompts: bool = (
            False  # asked for at length, as a prompt enhancer would; the facts judged are the short prompt's
        )
        largest: bool = False  # scenes whose things are as large as their number allows; long prompts tell of it
        # How often each question is asked, each time in other words.
        phrasings: int = field(default=1, validator=integer(at_least=1, at_most=5))
        # 1: the splits by which the embedded checkpoints were trained; prompts may repeat there.
        rules: int = field(default=2, validator=RULES)

        def __attrs_post_init__(self) -> None:
            check_split(self.named_split, self.rules)
            if len(set(self.tasks)) < len(self.tasks):
                raise ConfigError(f"tasks names one of {list(self.tasks)} twice; name each once")
            if self.rules == 1 and self.phrasings != 1:
                raise ConfigError(f"phrasings is {self.phrasings}; rules 1 have one wording of each prompt")
            if self.rules == 2:
                for place, task in enumerate(self.tasks):
                    count = len(range(place, self.prompts, len(self.tasks)))
                    check_count("shapes", task, self.named_split, count)  # type: ignore[arg-type]

        @property
        def named_split(self) -> str:
            """The split, with its default filled in."""
            return self.split or ("test" if self.rules == 2 else "heldout")

    def __init__(self, config: Config) -> None:
        self.config = config
        unseen = [task for task in config.tasks if config.rules == 1 or task != "single"] or list(config.tasks)
        self.headline = tuple(task for task in unseen if task in GENEVAL) or tuple(unseen)

    def _asks(self) -> list[Ask]:
        """One for each distinct question (rules 1: one for each prompt); number n is of task n mod their number."""
        config, tasks = self.config, self.config.tasks
        if config.rules == 1:
            return [self._old(number) for number in range(config.prompts)]
        split: Any = config.named_split
        lists = [
            splits.distinct(split, task, len(range(place, config.prompts, len(tasks))), config.seed)
            for place, task in enumerate(tasks)
        ]
        return [
            ask(lists[n % len(tasks)][n // len(tasks)], split, [config.seed, n], config.phrasings, config.largest)
            for n in range(config.prompts)
        ]

    def _old(self, number: int) -> Ask:
        """Prompt `number` by rules 1: drawn at random, so that it may repeat another."""
        config = self.config
        rng = np.random.default_rng([config.seed, number])
        split: Any = config.named_split
        scene = sample(rng, split, config.tasks[number % len(config.tasks)], largest=config.largest)
        return Ask(scene, (prompt(scene),), prompt(scene), prompt(scene))

    def scenes(self) -> list[Scene]:
        """A scene that each prompt is true of, in the order of `prompts`."""
        return [one.scene for one in self._asks() for _ in one.texts]

    def prompts(self) -> list[Prompt]:
        """The same prompts for the same config, ordered by id; the wordings of a question follow each other.

        In `data` stand the facts to judge, `question` (equal for all wordings of one distinct question) and `fact` (the
        combination behind it, which questions with other backgrounds share).
        """
        config = self.config
        found: list[Prompt] = []
        for number, one in enumerate(self._asks()):
            facts = asked(one.scene)
            data = {**facts, **rubrics(facts), "question": one.question, "fact": one.fact}
            for turn, words in enumerate(one.texts):
                if config.dense_prompts:
                    words = dense(one.scene, np.random.default_rng([config.seed, number, turn, 1]))
                found.append(Prompt(words, len(found), one.scene.task, data))
        return found

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return verdicts(images, prompts)

    def ceiling(self, vae: Any, height: int, width: int) -> list[Score]:
        """The most that any generator with this VAE can score: true scenes, encoded and decoded, judged. One Score a
        prompt, in the order of `prompts`; pictures of `height` x `width` px, multiples of what the VAE needs."""
        return self.score(through(vae, pictures(self.scenes(), height, width)), self.prompts())


class ShapesReward:
    """The benchmark's judge as a reward: exact, deterministic, and impossible to flatter."""

    @frozen
    class Config:
        partial: bool = False  # credit for the share of facts that are there: a weak model's pictures differ then

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return verdicts(images, prompts, self.config.partial)
