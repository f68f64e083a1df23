"""A VAE without training: each 4 x 4 block of pixels becomes one latent cell."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core.checkpoints.tensor_files import load_module, save_module
from lens_core.validators import real


class Example(nn.Module):
    """Rearrange blocks of 4 x 4 pixels into 48 channels, divided by their standard deviation."""

    channels, downscale = 48, 4

    @frozen
    class Config:
        std: float = field(default=0.5, validator=real(above=0))  # of pixels in [-1, 1]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(config.std))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [-1, 1] -> z [B,48,H/4,W/4]."""
        return nn.functional.pixel_unshuffle(pixels, 4) / self.std

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return nn.functional.pixel_shuffle(z * self.std, 4)

    def save(self, folder: Path) -> None:
        save_module(self, folder / "vae")

    @classmethod
    def load(cls, folder: Path, config: Config, dtype: torch.dtype | None = None) -> Self:
        vae = cls(config)
        load_module(vae, folder / "vae", dtype=dtype)
        return vae
