"""What the methods of this plugin share: the teacher, the student's velocity, and the size it draws at."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core.attribution import check_fit
from lens_core.catalog import Catalog
from lens_core.flow import Velocity
from lens_core.recipe import PipelineSpec, build
from lens_core.training.frozen_weights import frozen_copy
from lens_core.training.memory_estimate import STANDS_IN, pipeline_on_meta
from lens_core.types import Batch, CheckpointError, ConfigError, TextFeatures

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


@frozen
class Teacher:
    """A frozen backbone, the guidance scale of its presets, and the hash of the checkpoint that it comes from."""

    backbone: Any
    guidance_scale: float
    version: str


def teacher_of(method: str, uri: str | None, pipeline: LensPipeline, shared: Iterable[Tensor] = ()) -> Teacher:
    """The backbone of the checkpoint `uri`; None: a copy of the pipeline's own, over the same tensors where they are
    `shared`.

    Its size may differ from the student's. Its VAE and text encoder are not read: their types and options must be those
    of the pipeline, or ConfigError is raised. That their weights are the same is not checked.

    Where a recipe is only tried, and one of the two is not on this disk, a copy of the student is the teacher.
    """
    if uri is None:
        copied = frozen_copy(pipeline.backbone, shared)
        return Teacher(copied, float(pipeline.presets["guidance_scale"]), pipeline.version)
    tried = any(p.is_meta for p in pipeline.backbone.parameters())
    other = _tried_checkpoint(uri, pipeline) if tried else _checkpoint(uri, pipeline)
    absent = [name for name, one in ((uri, other), ("the start", pipeline)) if tried and one.note == STANDS_IN]
    if absent:
        warnings.warn(
            f"{method}: {absent[0]} is not on this disk; the teacher is taken to be as large as the student",
            stacklevel=2,
        )
        return Teacher(frozen_copy(pipeline.backbone), float(other.presets["guidance_scale"]), other.version)
    if other.backbone is None:
        raise ConfigError(f"{method}: {uri} has no backbone, so it cannot be the teacher")
    for kind in ("vae", "text_encoder"):
        theirs, ours = (_options(p, kind) for p in (other, pipeline))
        if None not in (theirs, ours) and theirs != ours:
            raise ConfigError(
                f"{method}: the teacher {uri} has another {kind.replace('_', ' ')} than the student, so neither reads "
                "what the other does; choose a teacher that was trained with the same one"
            )
    check_fit(pipeline.vae, pipeline.text_encoder, other.backbone)
    net = other.backbone.requires_grad_(False).eval()
    return Teacher(net, float(other.presets["guidance_scale"]), other.version)


def _checkpoint(uri: str, pipeline: LensPipeline) -> LensPipeline:
    """The checkpoint with its backbone alone read."""
    return type(pipeline).from_pretrained(
        uri,
        catalog=pipeline.catalog or Catalog.installed(),
        dtype=torch.float32,
        device=pipeline.device,
        deferred=("vae", "text_encoder"),
    )


def _tried_checkpoint(uri: str, pipeline: LensPipeline) -> LensPipeline:
    """The checkpoint without weights; fetches nothing."""
    return pipeline_on_meta(PipelineSpec(start=uri), pipeline.catalog or Catalog.installed())[0]


def _options(pipeline: LensPipeline, kind: str) -> tuple[str, Any] | None:
    """What a part is built from; None where that is not known."""
    spec = pipeline.specs.get(kind)
    if spec is None or pipeline.catalog is None:
        return None
    name, _, config = build(pipeline.catalog, kind, spec)
    return name, config


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


def text_of_batch(pipeline: LensPipeline, batch: Batch) -> TextFeatures:
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


def check_teacher(method: str, saved: str, version: str) -> None:
    """Raises CheckpointError where the teacher is no longer the one that a run began with."""
    if saved != version:
        raise CheckpointError(
            f"{method}: this run was begun with the teacher {saved}, but the recipe's teacher is now {version}; "
            "put the old one back, or choose a new --output"
        )
