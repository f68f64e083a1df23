"""Benchmark and reward `shapes`: held-out prompts in GenEval's six tasks, and words, judged exactly by the reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from attrs import frozen
from torch import Tensor

from lens_core.types import ConfigError, Prompt, Score
from lens_shapes.captions import prompt
from lens_shapes.reader import judge, read
from lens_shapes.scenes import GENEVAL, asked, sample


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


class ShapesBenchmark:
    """Prompts spread evenly over the tasks; `headline` names the six whose means make up the overall figure."""

    headline: tuple[str, ...] = GENEVAL

    @frozen
    class Config:
        prompts: int = 500
        seed: int = 0
        split: Literal["train", "heldout"] = "heldout"

        def __attrs_post_init__(self) -> None:
            if self.prompts < 1 or self.seed < 0:
                raise ConfigError(
                    f"prompts must be at least 1, seed at least 0, not {self.prompts} and {self.seed}; try 500 and 0"
                )
            if self.split not in ("train", "heldout"):
                raise ConfigError(f"no split is called {self.split!r}; use 'heldout' or 'train'")

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> list[Prompt]:
        """The same prompts for the same config, ordered by id; prompt n is of task n mod 7."""
        tasks = (*GENEVAL, "words")
        found = []
        for number in range(self.config.prompts):
            task = tasks[number % len(tasks)]
            scene = sample(np.random.default_rng([self.config.seed, number]), self.config.split, task)
            found.append(Prompt(prompt(scene), number, task, asked(scene)))
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
