"""Benchmark `novel`: has a model learnt the shape that no usual scene holds, also in colours it was not shown?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import SEED, integer
from lens_shapes import splits
from lens_shapes.benchmark import RULES, QuestionScene, check_count, pictures, question_scene, reconstruct
from lens_shapes.captions import prompt
from lens_shapes.scenes import Scene, prompt_facts, sample
from lens_shapes.scoring import score_images

_SPLITS: tuple[splits.Split, ...] = ("train", "test")


class Novel:
    """A shape that training never shows in some colours, such as "a red moon".

    In turn of the colours that training scenes may show ("shown") and of the others.
    """

    headline: tuple[str, ...] = ("shown", "new colours")

    @frozen
    class Config:
        prompts: int = field(default=100, validator=integer(at_least=1))  # distinct ones (rules 1: they repeat)
        seed: int = field(default=0, validator=SEED)
        rules: int = field(default=2, validator=RULES)

        def __attrs_post_init__(self) -> None:
            if self.rules == 2:
                for place, split in enumerate(_SPLITS):
                    check_count("novel", "novel", split, len(range(place, self.prompts, 2)))

    def __init__(self, config: Config) -> None:
        self.config = config

    def _question_scenes(self) -> list[QuestionScene]:
        config = self.config
        if config.rules == 1:
            old: tuple[Any, ...] = ("train", "heldout")
            drawn = [
                sample(np.random.default_rng([config.seed, number]), old[number % 2], "novel")
                for number in range(config.prompts)
            ]
            return [QuestionScene(scene, (prompt(scene),), prompt(scene), prompt(scene)) for scene in drawn]
        lists = [
            splits.distinct_questions(split, "novel", len(range(place, config.prompts, 2)), config.seed)
            for place, split in enumerate(_SPLITS)
        ]
        return [
            question_scene(lists[n % 2][n // 2], _SPLITS[n % 2], [config.seed, n], phrasings=1, largest=False)
            for n in range(config.prompts)
        ]

    def scenes(self) -> list[Scene]:
        """A scene that each prompt is true of, in the order of `prompts`."""
        return [one.scene for one in self._question_scenes()]

    def prompts(self) -> list[Prompt]:
        """The same prompts for the same config, ordered by id; `data` as of `shapes`."""
        return [
            Prompt(
                one.texts[0],
                number,
                self.headline[number % 2],
                {**prompt_facts(one.scene), "question": one.question, "fact": one.fact},
            )
            for number, one in enumerate(self._question_scenes())
        ]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> 1.0 where exactly the thing named is there."""
        return score_images(images, prompts)

    def ceiling(self, vae: Any, height: int, width: int) -> list[Score]:
        """As of `shapes`."""
        images = pictures(self.scenes(), height, width)
        return self.score(reconstruct(vae, images), self.prompts())
