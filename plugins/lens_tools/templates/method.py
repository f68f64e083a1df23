"""A training method: flow matching whose loss is the mean absolute error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core import BaseMethod, Batch, ConfigError, Loss, TextFeatures


class Example(BaseMethod):
    """Train the backbone by the mean absolute error of its velocity, for t uniform in [0, 1]."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config, pipeline: Any) -> None:
        self.pipeline = pipeline

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return {"backbone": self.pipeline.backbone}

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Any]]:
        """One item an optimizer step: its micro-batches."""
        for batch in batches:
            yield [self._encode(batch)]

    @torch.no_grad()
    def _encode(self, batch: Batch) -> tuple[Tensor, TextFeatures]:
        if not isinstance(batch.images, Tensor):
            raise ConfigError("this method trains on batches of images of one size; use such a dataset")
        latents = self.pipeline.vae.encode(batch.images.float() / 127.5 - 1)
        return latents, self.pipeline.text_encoder.encode(batch.captions)

    def update_order(self, step: int) -> Sequence[str]:
        return ("backbone",)

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Any, rng: torch.Generator) -> Loss:
        data, text = batch
        t = torch.rand(len(data), generator=rng, device=rng.device).to(data.device)
        noise = torch.randn(data.shape, generator=rng, device=rng.device).to(data.device)
        time = t.view(-1, 1, 1, 1)
        velocity = modules[module_name]((1 - time) * data + time * noise, t, text)
        return Loss((velocity - (noise - data)).abs().mean())
