"""Rotary position embedding over three axes: frame, row and column (axial RoPE; Su et al. 2021)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PERIOD = 10000.0  # the slowest wave, of time and of positions alike


@functools.lru_cache(maxsize=256)
def rotations(h: int, w: int, tokens: int, axes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers [S,1,E/2] that rotate the queries and keys of h*w image and then `tokens` text tokens.

    `axes` are the channels of a head that encode frame, row and column. Image rows and columns are counted from the
    middle: for n of them, -(n - n//2) ... n//2 - 1; the frame is 0. Text token j has the position max(h//2, w//2) + j
    on all three axes.
    """
    # A table first made under inference_mode would otherwise be an inference tensor, which training cannot use.
    with torch.inference_mode(False), torch.no_grad():
        # float64, whatever `dtype` is: the published weights were trained with angles of this precision.
        rows = torch.arange(h, dtype=torch.float64) - (h - h // 2)
        columns = torch.arange(w, dtype=torch.float64) - (w - w // 2)
        # Text begins where the picture ends, so no text token has the position of an image token on every axis.
        text = torch.arange(tokens, dtype=torch.float64) + max(h // 2, w // 2)
        image = (torch.zeros(h * w, dtype=torch.float64), rows.repeat_interleave(w), columns.repeat(h))
        angles = [
            torch.outer(torch.cat([positions, text]), PERIOD ** -(torch.arange(0, d, 2, dtype=torch.float64) / d))
            for positions, d in zip(image, axes, strict=True)
        ]
        angle = torch.cat(angles, dim=1)[:, None]
        return torch.polar(torch.ones_like(angle), angle).to(device=device, dtype=dtype)


def channel_pairs(x: Tensor) -> Tensor:
    """A view of x [...,E] as complex [...,E/2]: adjacent channels are a pair."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
