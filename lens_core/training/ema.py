"""Exponential moving averages of weights: how they follow a step, and how they take the weights' place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lens_core.training.state import TrainingState


def decay_at(limit: float, step: int) -> float:
    """The decay after `step` (0-based), at most `limit`. A young average would remember the initial weights, so it
    grows with the step: (1 + step) / (10 + step)."""
    return min(limit, (1 + step) / (10 + step))


def update(average: dict[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) weights, in place; what is no float (counters) is copied."""
    for name, value in weights.items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value.detach().to(average[name].dtype), 1 - decay)
        else:
            average[name].copy_(value)


@contextlib.contextmanager
def ema_weights(state: TrainingState) -> Iterator[None]:
    """Let the averages and the weights swap places; afterwards both are bit for bit as before.

    Values move, not tensors: kernels may take another path where a tensor lies otherwise in memory.
    """
    pairs = [
        (value.detach(), average[name])
        for module_name, average in state.ema.items()
        for name, value in state.trainable_state(module_name).items()
    ]
    exchange(pairs)
    try:
        yield
    finally:
        exchange(pairs[::-1])  # backwards, because two names may share a tensor


def exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Swap the values of each pair, one pair at a time, so that only one tensor is ever held twice."""
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
