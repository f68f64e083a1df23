"""The sampler `euler`: Euler steps along the published schedule, which is shifted by image size and step count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from lens_core import flow
from lens_core.flow import Velocity
from lens_core.io.atomic_files import write_json
from lens_core.types import ConfigError
from lens_core.validators import optional, within

LARGE = 4300  # tokens above which mu depends on the picture's size alone, as published


def published_mu(tokens: int, steps: int) -> float:
    """The time shift for an image of `tokens` latent cells: a line in the step count through its values at 10 and 200
    steps, each a line in the tokens (FLUX.2's schedule, which the published pipeline drives)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LARGE:
        return at_200
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


LARGEST_MU = 50.0  # from which on every time but the last is 1 in float32


class Scheduled:
    """The base of the samplers here: the published times. Subclasses add `sample`, which computes in float32."""

    @frozen
    class Config:
        # The log odds that t = 1/2 is moved to; None: by image size and steps, as published.
        mu: float | None = field(default=None, validator=optional(within(-50, 50)))

    def __init__(self, config: Config) -> None:
        self.config = config

    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        """Latent grid (h, w) -> float32 [steps + 1], falling from 1 to 0. Raises ConfigError for fewer than 1 step, and
        for more than float32 tells apart."""
        if steps < 1:
            raise ConfigError(f"sampler: the number of steps is {steps}; it must be at least 1")
        mu = published_mu(size[0] * size[1], steps) if self.config.mu is None else self.config.mu
        if mu > LARGEST_MU:
            raise ConfigError(
                f"sampler: a latent grid of {size[0]} x {size[1]} is beyond what the published times are made for; "
                "draw a smaller picture, or give the sampler a mu"
            )
        # float32 throughout, like the published scheduler: the times are equal to the last bit.
        even = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
        shifted = math.exp(mu) / (math.exp(mu) + (1 / even - 1))
        times = np.append(shifted, 0).astype(np.float32)
        if not (np.diff(times) < 0).all():
            raise ConfigError(
                f"sampler: with mu {mu:g} some of the times of {steps} steps are equal in float32; give a smaller mu, "
                "or take fewer steps"
            )
        return torch.from_numpy(times)

    def spans(self, x: Tensor, steps: int, start: int) -> Iterator[tuple[float, float, float]]:
        """(t, t', t' - t) of each step from `start` on; the difference is float32's, as the published scheduler's."""
        times = self.times((x.shape[-2], x.shape[-1]), steps)[start:]
        for t, after in pairwise(times):
            yield float(t), float(after), float(after - t)


class Euler(Scheduled):
    """Euler's method on the flow ODE: the sampler of the published pipeline.

    x moves by (t' - t) v from each time to the next.
    """

    model_index: ClassVar = {"scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}

    def save(self, folder: Path) -> None:
        """Write `scheduler/scheduler_config.json` for other tools: as the published checkpoints have it, whose mu the
        pipeline computes from the size; with a `mu` of its own, as that fixed shift."""
        config: dict[str, object] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
        if self.config.mu is None:
            config |= {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
        else:
            config |= {"use_dynamic_shifting": False, "shift": math.exp(self.config.mu)}
        write_json(folder / "scheduler" / "scheduler_config.json", config)

    def sample(self, velocity: Velocity, x: Tensor, steps: int, start: int = 0) -> Iterator[tuple[float, Tensor]]:
        """x [B,C,h,w] at times[start], noise at 0 -> (t, x float32) after each further step; the last t is 0.0."""
        x = x.float()
        for t, after, by in self.spans(x, steps, start):
            x = x + by * at(velocity, x, t)
            yield after, x


def at(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    """The velocity in float32 at one time for all rows."""
    return velocity(x, flow.at(t, x)).float()
