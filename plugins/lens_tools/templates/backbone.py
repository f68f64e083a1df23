"""A backbone of 3 x 3 convolutions that reads the mean of the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core import TextFeatures
from lens_core.checkpoints.tensor_files import load_module, save_module
from lens_core.validators import integer


class Example(nn.Module):
    """Predict the velocity with two convolutions, after adding time and text to every cell."""

    @frozen
    class Config:
        channels: int = field(default=128, validator=integer(at_least=1))  # C of the VAE
        layers: int = field(default=4, validator=integer(at_least=1))  # L of the text encoder
        text_width: int = field(default=2880, validator=integer(at_least=1))  # D of the text encoder
        width: int = field(default=256, validator=integer(at_least=1))  # hidden channels

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.time = nn.Linear(1, config.width)
        self.text = nn.Linear(config.layers * config.text_width, config.width, bias=False)
        self.last = nn.Conv2d(config.width, config.channels, 3, padding=1)

    def takes(self) -> tuple[int, int, int]:
        """(C, L, D). A recipe whose VAE or text encoder has others is refused before anything is loaded."""
        return self.config.channels, self.config.layers, self.config.text_width

    @classmethod
    def fitting(cls, options: Mapping[str, Any], channels: int, layers: int, width: int) -> dict[str, Any]:
        """The options for such a VAE and encoder, so that a recipe can write `like: neighbours` instead of them."""
        return {"channels": channels, "layers": layers, "text_width": width}

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """x [B,C,h,w], t float32 [B] in [0, 1], features [B,L,T,D] -> v [B,C,h,w]; T may be 0."""
        weight = text.mask[:, None, :, None].to(x.dtype)
        mean = (text.features.to(x.dtype) * weight).sum(2) / weight.sum(2).clamp(min=1)  # [B,L,D]
        condition = self.time(t.to(x.dtype)[:, None]) + self.text(mean.flatten(1))
        hidden = nn.functional.silu(self.first(x) + condition[:, :, None, None])
        v: Tensor = self.last(hidden)
        return v

    def save(self, folder: Path) -> None:
        save_module(self, folder / "transformer")

    @classmethod
    def load(cls, folder: Path, config: Config, dtype: torch.dtype | None = None) -> Self:
        backbone = cls(config)
        load_module(backbone, folder / "transformer", dtype=dtype)
        return backbone
