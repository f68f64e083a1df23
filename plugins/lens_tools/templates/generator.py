"""A generator that draws plain colours: the smallest system that `lens bench` can measure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import field, frozen
from PIL import Image

from lens_core.types import GenerationEstimate, PictureOutcome, PictureRequest, SystemInfo
from lens_core.validators import PIXELS


class Example:
    """Draw one colour, chosen by the seed, and refuse blank prompts."""

    @frozen
    class Config:
        size: int = field(default=256, validator=PIXELS)  # height and width where a request names none, px

    def __init__(self, config: Config) -> None:
        self.config = config

    def describe(self) -> SystemInfo:
        """The system's name, version and settings, as reports quote them."""
        return SystemInfo("plain colours", "1", {"size": self.config.size}, seeded=True)

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        """One outcome a request."""
        for request in requests:
            if not request.prompt.strip():
                yield PictureOutcome(request, "refused", reason="blank_prompt: there is nothing to draw")
                continue
            height, width = request.size or (self.config.size, self.config.size)
            colour = np.random.default_rng(request.seed).integers(0, 256, 3, dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(np.broadcast_to(colour, (height, width, 3)).copy()).save(file, "PNG")
            yield PictureOutcome(request, "ok", file.getvalue())

    def estimate(self, count: int, size: tuple[int, int] | None) -> GenerationEstimate:
        """What `count` pictures cost."""
        return GenerationEstimate(calls=count, usd=0.0)
