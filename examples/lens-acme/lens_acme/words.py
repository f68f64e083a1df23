"""A text encoder that needs no vocabulary: every word, hashed, picks a row of a learned table."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from attrs import frozen
from torch import nn

from lens_core import ConfigError, TextFeatures
from lens_core.checkpoints.tensor_files import load_module, save_module


class HashedWords(nn.Module):
    """Encode word t of a prompt as row `crc32(word) mod rows` of a table plus a vector for position t; L = 1."""

    layers = 1

    @frozen
    class Config:
        rows: int = 4096  # of the table; words with the same row have the same features
        width: int = 128  # D
        max_words: int = 64  # T; later words are ignored

        def __attrs_post_init__(self) -> None:
            for name in ("rows", "width", "max_words"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"hashed_words: {name} is {getattr(self, name)}; it must be at least 1")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.words = nn.Embedding(config.rows, config.width)
        self.positions = nn.Embedding(config.max_words, config.width)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> features [B,1,T,D] and mask [B,T], T the words of the longest prompt, perhaps 0."""
        device = self.words.weight.device
        texts = []
        for prompt in prompts:
            words = re.findall(r"\w+|[^\w\s]", prompt.lower())[: self.config.max_words]
            rows = torch.tensor(
                [zlib.crc32(w.encode()) % self.config.rows for w in words], dtype=torch.long, device=device
            )
            features = self.words(rows) + self.positions.weight[: len(words)]
            texts.append(TextFeatures(features[None, None], torch.ones(1, len(words), dtype=torch.bool, device=device)))
        return TextFeatures.cat(texts)

    def save(self, folder: Path) -> None:
        save_module(self, folder / "text_encoder", "model")

    @classmethod
    def load(cls, folder: Path, config: Config, dtype: torch.dtype | None = None) -> Self:
        encoder = cls(config)
        load_module(encoder, folder / "text_encoder", "model", dtype)
        return encoder
