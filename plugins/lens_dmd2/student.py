"""What the methods of this plugin share: the student's velocity, the size it draws at, and the teacher of a resumed
run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lens_core.flow import Velocity
from lens_core.types import Batch, CheckpointError, TextFeatures

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


def velocity_of(net: nn.Module, text: TextFeatures) -> Velocity:
    """(x, t) -> v in the dtype of x, without guidance."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v: Tensor = net(x, t, text)
        return v.to(x.dtype)

    return velocity


def empty_text(text: TextFeatures) -> TextFeatures:
    """No text for as many rows."""
    _, layers, _, width = text.features.shape
    return TextFeatures.empty(len(text), layers, width, text.features)


def text_of(pipeline: LensPipeline, batch: Batch) -> TextFeatures:
    """The text of a batch: the dataset's, where it was cached."""
    return pipeline.encode(batch.captions) if batch.text is None else batch.text.to(pipeline.device)


def grid_of(
    pipeline: LensPipeline, batch: Batch, sizes: Sequence[tuple[int, int]], rng: torch.Generator
) -> tuple[int, int]:
    """The latent grid (h, w) to draw at: that of the batch's pictures or latents, or else one of `sizes` (px; none: the
    preset square), drawn from `rng`. Raises LensError for a packed batch."""
    images, cell = batch.even(), pipeline.vae.downscale
    if isinstance(batch.latents, Tensor):
        height, width = batch.latents.shape[-2:]
        return height, width
    if images is not None:
        height, width = images.shape[-2:]
    else:
        sizes = sizes or (pipeline.size(),)
        height, width = sizes[int(torch.randint(len(sizes), (), generator=rng))]
    return height // cell, width // cell


def check_teacher(method: str, saved: str, start: str) -> None:
    """Raises CheckpointError where the recipe's start is no longer the teacher that a run began with."""
    if saved != start:
        raise CheckpointError(
            f"{method}: this run was begun with the teacher {saved}, but the recipe's start is now {start}; "
            "put the old one back, or choose a new --output"
        )
