"""Benchmark `novel`: has a model learnt the shape that no usual scene holds, also in colours it was not shown?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import SEED, integer
from lens_shapes.benchmark import verdicts
from lens_shapes.captions import prompt
from lens_shapes.scenes import asked, sample


class Novel:
    """Prompts like "a red moon", in turn of the colours that training scenes may show ("shown") and of the others."""

    headline: tuple[str, ...] = ("shown", "new colours")

    @frozen
    class Config:
        prompts: int = field(default=100, validator=integer(at_least=1))
        seed: int = field(default=0, validator=SEED)

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> list[Prompt]:
        found = []
        for number in range(self.config.prompts):
            new = number % 2 == 1
            scene = sample(np.random.default_rng([self.config.seed, number]), "heldout" if new else "train", "novel")
            found.append(Prompt(prompt(scene), number, self.headline[new], asked(scene)))
        return found

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> 1.0 where exactly the thing asked is there."""
        return verdicts(images, prompts)
