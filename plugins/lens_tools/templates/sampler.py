"""The midpoint method: second order, two passes of the backbone a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import field, frozen
from torch import Tensor

from lens_core.validators import real


class Example:
    """Move x by the velocity at the middle of each step."""

    @frozen
    class Config:
        shift: float = field(default=3.0, validator=real(above=0))  # above 1: more steps near the noise

    def __init__(self, config: Config) -> None:
        self.config = config

    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        """Latent grid (h, w) -> float32 [steps + 1], falling from 1 to 0."""
        even = torch.linspace(1, 0, steps + 1)
        return self.config.shift * even / (1 + (self.config.shift - 1) * even)

    def sample(
        self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, start: int = 0
    ) -> Iterator[tuple[float, Tensor]]:
        """x [B,C,h,w] at times[start] -> (t, x) after each further step; the last has t = 0."""
        times = self.times((x.shape[2], x.shape[3]), steps)
        for now, after in zip(times[start:-1].tolist(), times[start + 1 :].tolist(), strict=True):
            middle = (now + after) / 2
            half = x + (middle - now) * velocity(x, x.new_full((len(x),), now))
            x = x + (after - now) * velocity(half, x.new_full((len(x),), middle))
            yield after, x
