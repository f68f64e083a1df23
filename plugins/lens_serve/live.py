"""A batch while it is drawn: rows of cancelled jobs are computed no more, and others get their steps and previews."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.flow import Velocity
from lens_core.inference.pixels import to_images, to_pil
from lens_core.io.images import to_mask
from lens_serve.jobs import Job, Step

if TYPE_CHECKING:
    from PIL.Image import Image

    from lens_core.inference.pipeline import LensPipeline
    from lens_core.types import TextFeatures


class AllCancelled(Exception):
    """Nobody waits for a picture of this batch any more."""


@frozen
class Unit:
    """One picture of a job."""

    job: Job
    index: int

    @property
    def seed(self) -> int:
        return self.job.seeds[self.index]

    @property
    def negative(self) -> str:
        """Its negative prompt; empty where it has none, or none that has an effect."""
        texts = self.job.settings.negative_prompts
        return texts[0] if texts else ""


class LiveBatch:
    """The rows of one call of the pipeline, one for each of `units`."""

    def __init__(
        self,
        pipeline: LensPipeline,
        units: list[Unit],
        on_cancelled: Callable[[Job], None],
        on_step: Callable[[], None],
    ) -> None:
        self._pipeline, self._units = pipeline, units
        self._on_cancelled, self._on_step = on_cancelled, on_step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time in which the pipeline draws this batch: its velocity is that of the live rows."""
        # A sampler cannot take rows out of its batch, so those of cancelled jobs stay, with a velocity of 0 that costs
        # nothing. The pipeline asks its own method `velocity`, which stands aside here.
        self._pipeline.velocity = self._velocity  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._pipeline.velocity

    def _live(self) -> list[int]:
        return [row for row, unit in enumerate(self._units) if not unit.job.cancelled]

    def _velocity(
        self,
        text: TextFeatures,
        negative: TextFeatures | None,
        guidance_scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        make = type(self._pipeline).velocity
        everyone = make(self._pipeline, text, negative, guidance_scale, interval)
        some: tuple[list[int], Velocity] = ([], everyone)

        def live(x: Tensor, t: Tensor) -> Tensor:
            nonlocal some
            rows = self._live()
            if len(rows) == len(x):
                v = everyone(x, t)
            else:
                v = torch.zeros_like(x)
                if rows:
                    if rows != some[0]:
                        words = None if negative is None else negative[rows]
                        some = rows, make(self._pipeline, text[rows], words, guidance_scale, interval)
                    v[rows] = some[1](x[rows], t[rows])
            return v

        return live

    def after_step(self, _: Any, step: int, t: float, values: dict[str, Any]) -> None:
        """The pipeline's callback: ends cancelled jobs and reports the step to the others. Raises AllCancelled."""
        self._on_step()
        by_job: dict[Job, list[int]] = {}
        for row, unit in enumerate(self._units):
            by_job.setdefault(unit.job, []).append(row)
        for job, rows in by_job.items():
            if job.cancelled:
                self._on_cancelled(job)
                continue
            steps = job.steps
            indices = tuple(self._units[row].index for row in rows)
            latents = images = None
            if t > 0 and is_due(step + 1, steps, job.request.previews):
                finished = values["denoised"][rows]
                latents, images = finished.float().cpu(), self._decoded(job, finished)
            job.emit(Step(step + 1, steps, indices, latents, images or ()))
        if not self._live():
            raise AllCancelled

    def _decoded(self, job: Job, latents: Tensor) -> tuple[Image, ...]:
        """Previews in the size of the picture, by the checkpoint's map, which costs next to nothing, or by the VAE.
        What a mask keeps is shown as it is."""
        from PIL import Image as pil

        quick = self._pipeline.latent_preview is not None
        small = self._pipeline.preview(latents) if quick else to_images(self._pipeline.decode(latents))
        height, width = job.settings.size
        pictures = [picture.resize((width, height)) for picture in to_pil(small)]
        original, mask = job.request.settings.image, job.request.settings.mask
        if original is None or mask is None:
            return tuple(pictures)
        size = pictures[0].size
        kept, repainted = original.convert("RGB").resize(size), to_mask(mask).resize(size)
        return tuple(pil.composite(picture, kept, repainted) for picture in pictures)


def is_due(step: int, steps: int, previews: int) -> bool:
    """Whether one of `previews`, spread evenly over the steps before the last, falls on `step` (from 1)."""
    if previews >= steps - 1:
        return step < steps
    return step in {round(i * steps / (previews + 1)) for i in range(1, previews + 1)}
