"""The sampler `euler`: Euler steps along the published schedule, which is shifted by image size and step count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from lens_core.types import ConfigError

LARGE = 4300  # tokens above which the step count no longer matters


def published_mu(tokens: int, steps: int) -> float:
    """The time shift for an image of `tokens` latent cells: a line in the step count through its values at 10 and 200
    steps, each a line in the tokens (FLUX.2's schedule, which the published pipeline drives)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LARGE:
        return at_200
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


class Euler:
    """x moves by (t' - t) v from each time to the next, in float32."""

    @frozen
    class Config:
        mu: float | None = None  # the log odds that t = 1/2 is moved to; None: by image size and steps, as published

        def __attrs_post_init__(self) -> None:
            if self.mu is not None and not math.isfinite(self.mu):
                raise ConfigError(f"euler: mu is {self.mu}; give a finite number, or leave it out")

    def __init__(self, config: Config) -> None:
        self.config = config

    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        """Latent grid (h, w) -> float32 [steps + 1], falling from 1 to 0. Raises ConfigError for fewer than 1 step."""
        if steps < 1:
            raise ConfigError(f"euler: the number of steps is {steps}; it must be at least 1")
        mu = published_mu(size[0] * size[1], steps) if self.config.mu is None else self.config.mu
        # float32 throughout, like the published scheduler: the times are equal to the last bit.
        even = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
        shifted = math.exp(mu) / (math.exp(mu) + (1 / even - 1))
        return torch.from_numpy(np.append(shifted, 0).astype(np.float32))

    def walk(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int
    ) -> Iterator[tuple[float, Tensor]]:
        """noise [B,C,h,w] -> (t, x float32) after each step; the last t is 0.0. `velocity` sees x and t float32 [B]."""
        times = self.times((noise.shape[-2], noise.shape[-1]), steps)
        x = noise.float()
        for t, after in pairwise(times):
            v = velocity(x, torch.full((x.shape[0],), float(t), device=x.device))
            x = x + float(after - t) * v.float()
            yield float(after), x
