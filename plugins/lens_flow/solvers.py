"""Samplers on the times of `euler`: `heun`, `dpmpp` and `euler_ancestral`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from attrs import field, frozen
from torch import Tensor

from lens_core.flow import Velocity
from lens_core.types import ConfigError
from lens_core.validators import within
from lens_flow.euler import Scheduled, at


class Heun(Scheduled):
    """Heun's method: second order, two passes of the backbone a step (one in the last).

    The mean of the velocities at both ends of a step.
    """

    def sample(self, velocity: Velocity, x: Tensor, steps: int, start: int = 0) -> Iterator[tuple[float, Tensor]]:
        """As `Euler.sample`."""
        x = x.float()
        for t, after, by in self.spans(x, steps, start):
            v = at(velocity, x, t)
            if after > 0:  # no model is trained at t = 0
                v = (v + at(velocity, x + by * v, after)) / 2
            x = x + by * v
            yield after, x


class DPMpp(Scheduled):
    """DPM-Solver++(2M): second order, one pass of the backbone a step.

    Lu et al. 2022, algorithm 2: the guess of the data is drawn on along log((1 - t) / t), through the one before it.
    Second order, for one pass a step. Where that logarithm ends, at t = 1 and t = 0, it is Euler.
    """

    def sample(self, velocity: Velocity, x: Tensor, steps: int, start: int = 0) -> Iterator[tuple[float, Tensor]]:
        """As `Euler.sample`."""
        x = x.float()
        before: tuple[float, Tensor] | None = None  # a time and the guess made there
        for t, after, _ in self.spans(x, steps, start):
            data = x - t * at(velocity, x, t)
            aim = data
            if before is not None and before[0] < 1 and after > 0:
                ratio = (_clearness(after) - _clearness(t)) / (_clearness(t) - _clearness(before[0]))
                aim = data + ratio / 2 * (data - before[1])
            x = after / t * x + (1 - after / t) * aim
            before = t, data
            yield after, x


class EulerAncestral(Scheduled):
    """Euler's method with new noise after each step (ancestral sampling).

    It steps to a time before the next, and back to the next with new noise: errors are forgotten on the way.

    Which time that is keeps every marginal of a rectified flow: (1 - t) data + t noise in distribution.
    """

    @frozen
    class Config(Scheduled.Config):
        eta: float = field(default=1.0, validator=within(0, 1))  # how much of a step is taken twice; 0 is Euler

    config: Config
    stochastic = True

    def sample(
        self, velocity: Velocity, x: Tensor, steps: int, start: int = 0, draw: Callable[[], Tensor] | None = None
    ) -> Iterator[tuple[float, Tensor]]:
        """As `Euler.sample`. `draw` gives the noise of a step, like x; without it ConfigError."""
        if draw is None and self.config.eta > 0:
            raise ConfigError("euler_ancestral adds noise in every step, and here there is none to draw; use euler")
        x = x.float()
        for t, after, _ in self.spans(x, steps, start):
            down = after * (1 + self.config.eta * (after / t - 1))
            x = x + (down - t) * at(velocity, x, t)
            if draw is not None and down < after:
                kept = (1 - after) / (1 - down)
                x = kept * x + math.sqrt(after**2 - (kept * down) ** 2) * draw()
            yield after, x


def _clearness(t: float) -> float:
    """Half the logarithm of the signal-to-noise ratio at t in (0, 1)."""
    return math.log((1 - t) / t)
