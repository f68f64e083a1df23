"""A reward for pictures that are not flat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import real


class Contrast:
    """The standard deviation of a picture's luma (Rec. 601), as a share of `full`, at most 1. Prompts are not read."""

    @frozen
    class Config:
        # Standard deviation, in uint8 levels, that earns 1; there can be 127.5 at most.
        full: float = field(default=64.0, validator=real(above=0, at_most=127.5))

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
