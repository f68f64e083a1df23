"""A reward for bright pictures."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen
from torch import Tensor

from lens_core import Prompt, Score
from lens_core.validators import within


class Example:
    """1 for a picture whose mean brightness is `target`, and less the further it is away."""

    @frozen
    class Config:
        target: float = field(default=0.7, validator=within(0, 1))  # share of white

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> one Score in [0, 1] each."""
        means = images.float().mean((1, 2, 3)) / 255
        return [Score("ok", 1 - abs(float(mean) - self.config.target)) for mean in means]
