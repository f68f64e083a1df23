"""A text encoder of bytes: no vocabulary, one learned vector for each of 256 values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from attrs import field, frozen
from torch import nn

from lens_core import TextFeatures
from lens_core.checkpoints.tensor_files import load_module, save_module
from lens_core.validators import integer


class Example(nn.Module):
    """Encode byte t of a prompt as a vector for its value plus a vector for position t; one layer."""

    layers = 1

    @frozen
    class Config:
        width: int = field(default=64, validator=integer(at_least=1))  # D
        max_bytes: int = field(default=256, validator=integer(at_least=1))  # T; later bytes are ignored

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width = config.width
        self.values = nn.Embedding(256, config.width)
        self.positions = nn.Embedding(config.max_bytes, config.width)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> features [B,1,T,D] and mask [B,T], T the bytes of the longest prompt, perhaps 0."""
        device = self.values.weight.device
        texts = []
        for prompt in prompts:
            data = list(prompt.encode()[: self.positions.num_embeddings])
            features = self.values(torch.tensor(data, dtype=torch.long, device=device))
            features = features + self.positions.weight[: len(data)]
            mask = torch.ones(1, len(data), dtype=torch.bool, device=device)
            texts.append(TextFeatures(features[None, None], mask))
        return TextFeatures.cat(texts)

    def save(self, folder: Path) -> None:
        save_module(self, folder / "text_encoder", "model")

    @classmethod
    def load(cls, folder: Path, config: Config, dtype: torch.dtype | None = None) -> Self:
        encoder = cls(config)
        load_module(encoder, folder / "text_encoder", "model", dtype)
        return encoder
