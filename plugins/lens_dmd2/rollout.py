"""The rollout of the student up to its exit step: the first steps of its sampling, without gradients."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from lens_core import flow
from lens_core.flow import Velocity
from lens_core.protocols import Sampler
from lens_core.types import move


@torch.no_grad()
def ode(sampler: Sampler, velocity: Velocity, noise: Tensor, steps: int, count: int, rng: torch.Generator) -> Tensor:
    """x after `count` of `steps` steps of the sampler itself: what the finished student will do. Draws only for a
    sampler that adds noise."""
    x, more = noise, dict[str, Any]()
    if getattr(sampler, "stochastic", False):
        more["draw"] = lambda: move(torch.randn(noise.shape, generator=rng), noise.device)
    for _, x in islice(sampler.sample(velocity, noise, steps, **more), count):  # noqa: B007 - the last one is the answer
        pass
    return x


@torch.no_grad()
def renoise(
    sampler: Sampler, velocity: Velocity, noise: Tensor, steps: int, count: int, rng: torch.Generator
) -> Tensor:
    """The same times, but each step mixes its guess of the data with noise of its own (DMD2's backward simulation)."""
    times = move(sampler.times((noise.shape[-2], noise.shape[-1]), steps), noise.device)
    x = noise
    for t, after in islice(pairwise(times), count):
        row = t.expand(len(x))
        fresh = move(torch.randn(x.shape, generator=rng, dtype=x.dtype), x.device)
        x = flow.mix(flow.data_from(x, velocity(x, row), row), fresh, after.expand(len(x)))
    return x


ROLLOUTS = {"ode": ode, "renoise": renoise}
"""Name -> a function of (sampler, velocity, noise, steps, count, rng) that returns x after `count` steps."""
