"""The time convention: t = 0 is data, t = 1 is noise, and the velocity is v = noise - data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""What a sampler integrates: (x [B,C,h,w], t float32 [B]) -> v [B,C,h,w]."""


def _over(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def mix(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) data + t noise, for t [B] and tensors [B,...] (paper, section 3; rectified flow)."""
    t = _over(t, data)
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """v = noise - data, constant along the straight path."""
    return noise - data


def data_from(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data that x_t and v point at: x - t v."""
    return x - _over(t, x) * v


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Norm-rescaled classifier-free guidance on velocities [B,C,h,w].

    u + scale (c - u), then every token rescaled to the conditional norm over channels; 1 where the norm is 0.
    """
    combined = uncond + scale * (cond - uncond)
    norm = combined.norm(dim=1, keepdim=True)
    ratio = cond.norm(dim=1, keepdim=True) / norm.where(norm > 0, norm.new_ones(()))
    guided: Tensor = combined * ratio.where(norm > 0, ratio.new_ones(()))
    return guided


def at(t: float, x: Tensor) -> Tensor:
    """The time t for every row of x [B,...]: float32 [B], where x is. The host keeps its value: see `known`."""
    row: Any = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    row.known = float(torch.tensor(t, dtype=torch.float32))  # as the row has it
    return row  # type: ignore[no-any-return]  # a tensor with a note


def twice(t: Tensor) -> Tensor:
    """The times [B] of a batch that is there twice, [2B]; the host keeps what it knows of them."""
    row: Any = torch.cat([t, t])
    if hasattr(t, "known"):
        row.known = t.known
    return row  # type: ignore[no-any-return]  # a tensor with a note


def known(t: Tensor) -> list[float]:
    """The times [B] as numbers. Those of `at` need no read of the device, which the host would have to wait for."""
    value = getattr(t, "known", None)
    return t.tolist() if value is None else [value] * len(t)
