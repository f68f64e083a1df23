"""A reward for pictures that are not flat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from lens_core import ConfigError, Prompt, Score


class Contrast:
    """Score a picture by the standard deviation of its luma (Rec. 601) over `full`, at most 1. Prompts are ignored."""

    @frozen
    class Config:
        full: float = 64.0  # standard deviation, in uint8 levels, that earns 1

        def __attrs_post_init__(self) -> None:
            if not 0 < self.full <= 127.5:
                raise ConfigError(f"contrast: full is {self.full}; it must be in (0, 127.5], the most there can be")

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> one Score each, in [0, 1]."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
        luma = torch.einsum("bchw,c->bhw", images.float(), weights)
        spreads = luma.flatten(1).std(dim=1, correction=0).tolist()
        return [
            Score("ok", min(1.0, s / self.config.full), {"luma_std": s}, f"luma spreads by {s:.1f} levels")
            for s in spreads
        ]
