"""Decoding in overlapping tiles, which saves memory and changes the picture a little.

A VAE's norms take their statistics over the whole picture; in a tile they take the tile's. Neighbouring tiles overlap
by a quarter of their side and are blended there. A VAE that attends over the whole picture would draw another one in
tiles, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens_core.arguments import whole
from lens_core.inference.call_arguments import MAX_SIDE
from lens_core.types import ConfigError

LEAST = 4
"""Latent cells that a tile has at least, across and down: less would be mostly overlap."""


def check_tile(vae: Any, side: Any) -> int:
    """The side of a tile in px, of this VAE. Raises ConfigError."""
    if not getattr(vae, "convolutional", False):
        raise ConfigError(
            "this VAE attends over the whole picture, so tiles would draw another one; for less memory use --offload"
        )
    grid = int(vae.downscale)
    pixels = whole("lossy_vae_tile", side, 1, MAX_SIDE)
    if pixels % grid or pixels < LEAST * grid:
        near = max(LEAST, round(pixels / grid)) * grid
        raise ConfigError(
            f"lossy_vae_tile {pixels} must be a multiple of {grid} px, the VAE's grid, and at least "
            f"{LEAST * grid}; use {near}"
        )
    return pixels


def decode_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, cells: int) -> Tensor:
    """Latents [B,C,h,w] -> pixels [B,3,H,W], decoded in tiles of at most `cells` x `cells` latent cells."""
    rows, columns = _starts(z.shape[-2], cells), _starts(z.shape[-1], cells)
    if len(rows) == len(columns) == 1:
        return decode(z)
    total, weights = torch.empty(0), torch.empty(0)
    for top in rows:
        for left in columns:
            part = decode(z[..., top : top + cells, left : left + cells]).float()
            grid = part.shape[-1] // min(cells, z.shape[-1])
            if not total.numel():
                total = part.new_zeros(len(z), 3, z.shape[-2] * grid, z.shape[-1] * grid)
                weights = total.new_zeros(total.shape[-2:])
            ramps = [_ramp(size, cells * grid // 4).to(part) for size in part.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            down, across = (
                slice(top * grid, top * grid + len(ramps[0])),
                slice(left * grid, left * grid + len(ramps[1])),
            )
            total[..., down, across] += part * weight
            weights[down, across] += weight
    return total / weights


def _starts(size: int, cells: int) -> list[int]:
    """The first cells of tiles that cover `size` cells, evenly, with a quarter of a tile in common at least."""
    if size <= cells:
        return [0]
    count = -(-(size - cells) // (cells - cells // 4)) + 1
    return [round(i * (size - cells) / (count - 1)) for i in range(count)]


def _ramp(size: int, overlap: int) -> Tensor:
    """Weights along a side of a tile: rising over the overlap, 1, and falling; never 0."""
    rise = (torch.arange(size, dtype=torch.float32) + 1) / (overlap + 1)
    return torch.minimum(rise, rise.flip(0)).clamp(max=1)
