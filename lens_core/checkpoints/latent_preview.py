"""A linear map from latents to small RGB pictures: what a picture is becoming, without a pass of the VAE.

`vae/latent_preview.json` of a checkpoint holds it; no picture depends on it, so no hash counts the file. Every cell of
a latent, C numbers, becomes `side` x `side` pixels. The map is the least-squares fit to what the VAE decodes, averaged
over as many pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pixel_shuffle, pixel_unshuffle

from lens_core.checkpoints.manifest import PREVIEW_FILE
from lens_core.io.atomic_files import read_json, write_json
from lens_core.io.readers import shown
from lens_core.types import CheckpointError, ConfigError

FORMAT = 1
MAX_CHANNELS = 4096
SIDES = (1, 2, 4, 8)
"""Pixels per latent cell, across and down, that a map may have."""
RIDGE = 1e-6  # relative to the mean variance of a channel: keeps channels that never vary from growing weights


@frozen(eq=False)
class LatentPreview:
    """`weight` float32 [3 side^2, C] and `bias` [3 side^2] give the pixels of a cell, in [-1, 1], in the order of
    `pixel_shuffle`. `error` is the root mean square difference from the VAE's pictures of the same size, in steps of
    255, on pictures that the fit has not seen; `pictures` is how many it has."""

    weight: Tensor
    bias: Tensor
    side: int
    error: float
    pictures: int

    @property
    def channels(self) -> int:
        return int(self.weight.shape[1])

    def pixels(self, z: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> pixels float32 [B,3,side h,side w], about [-1, 1]. Raises ConfigError for others."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ConfigError(f"a preview of latents {list(z.shape)}; its map takes [B, {self.channels}, h, w]")
        weight, bias = self.weight.to(z.device), self.bias.to(z.device)
        return pixel_shuffle(torch.einsum("oc,bchw->bohw", weight, z.float()) + bias[:, None, None], self.side)

    def write(self, folder: Path) -> None:
        """Write the file of a checkpoint's folder, whole or not at all."""
        write_json(
            folder / "vae" / PREVIEW_FILE,
            {
                "format": FORMAT,
                "side": self.side,
                "error": round(self.error, 3),
                "pictures": self.pictures,
                "bias": _rounded(self.bias),
                "weight": [_rounded(row) for row in self.weight],
            },
        )


def _rounded(row: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in row.tolist()]


def read(path: Path, channels: int) -> LatentPreview:
    """Read a map for a VAE of so many latent channels. Raises CheckpointError, which names what is wrong."""
    data = read_json(path)
    side = data.get("side")
    if data.get("format") != FORMAT or side not in SIDES or isinstance(side, bool):
        raise CheckpointError(
            f"{path}: has the format {shown(data.get('format'))} and the side {shown(side)}; this Lens reads format "
            f"{FORMAT} and the sides {', '.join(map(str, SIDES))}: run lens fit-preview again"
        )
    rows, bias = data.get("weight"), data.get("bias")
    outputs = 3 * side * side
    sound = isinstance(rows, list) and len(rows) == outputs and _numbers(bias, outputs)
    if not sound or not all(_numbers(row, channels) for row in rows):  # type: ignore[union-attr]  # a list by now
        raise CheckpointError(
            f"{path}: its weight must be {outputs} rows of {channels} finite numbers, the channels of the VAE, and its "
            f"bias {outputs}; run lens fit-preview again, or delete the file"
        )
    error, pictures = data.get("error", 0.0), data.get("pictures", 0)
    if not _numbers([error, pictures], 2):
        raise CheckpointError(f"{path}: its error and pictures are no numbers; run lens fit-preview again")
    return LatentPreview(torch.tensor(rows, dtype=torch.float32), torch.tensor(bias).float(), side, error, pictures)


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e6 for v in values)
    )


class PreviewFit:
    """Sums for a least-squares fit, gathered a batch at a time, so that memory does not grow with the pictures."""

    def __init__(self, channels: int, side: int) -> None:
        if side not in SIDES:
            raise ConfigError(f"side must be one of {', '.join(map(str, SIDES))}, not {shown(side)}")
        if not 1 <= channels <= MAX_CHANNELS:
            raise ConfigError(f"a VAE of {channels} latent channels; at most {MAX_CHANNELS} are fitted")
        self.side, self.pictures = side, 0
        self.inner = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self.outer = torch.zeros(channels + 1, 3 * side * side, dtype=torch.float64)

    def add(self, z: Tensor, pixels: Tensor) -> None:
        """Latents [B,C,h,w] and what the VAE decodes them to, [B,3,H,W]."""
        cells = z.double().cpu().movedim(1, -1).flatten(0, 2)
        cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=torch.float64)], 1)
        target = pixel_unshuffle(small(pixels, z, self.side).double().cpu(), self.side).movedim(1, -1).flatten(0, 2)
        self.inner += cells.T @ cells
        self.outer += cells.T @ target
        self.pictures += len(z)

    def solve(self, held_out: Iterator[tuple[Tensor, Tensor]]) -> LatentPreview:
        """The map, and its error on (latents, decoded pixels) that were not added. Raises ConfigError without any."""
        if self.pictures == 0:
            raise ConfigError("there are no pictures to fit a preview to")
        cells = float(self.inner[-1, -1])
        penalty = torch.full((len(self.inner),), RIDGE * float(self.inner.diagonal()[:-1].mean()), dtype=torch.float64)
        penalty[-1] = RIDGE * cells
        solution = torch.linalg.solve(self.inner + torch.diag(penalty), self.outer).T.float()
        fitted = LatentPreview(solution[:, :-1].contiguous(), solution[:, -1].contiguous(), self.side, 0.0, 0)
        squares, count = 0.0, 0
        for z, pixels in held_out:
            gap = fitted.pixels(z).clamp(-1, 1).cpu() - small(pixels, z, self.side).cpu()
            squares, count = squares + float(gap.double().square().sum()), count + gap.numel()
        if not count:
            raise ConfigError("there are no pictures left to measure the preview's error on; give more")
        error = math.sqrt(squares / count) * 127.5
        return LatentPreview(fitted.weight, fitted.bias, self.side, error, self.pictures)


def small(pixels: Tensor, z: Tensor, side: int) -> Tensor:
    """Decoded pixels [B,3,H,W] averaged to `side` a latent cell, clamped to [-1, 1]."""
    return adaptive_avg_pool2d(pixels.float().clamp(-1, 1), (z.shape[-2] * side, z.shape[-1] * side))
