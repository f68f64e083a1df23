"""A curator that measures how colourful pictures are; the recipe's threshold decides which to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import field, frozen

from lens_core.types import Record
from lens_core.validators import integer


class Example:
    """Measure the mean distance of a picture's colours from grey, 0 to 255."""

    version, columns = "1", ("colourfulness",)

    @frozen
    class Config:
        step: int = field(default=4, validator=integer(at_least=1))  # px from one measured pixel to the next

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        """One number for each record, by column."""
        values = []
        for record in records:
            pixels = record.pixels[:: self.config.step, :: self.config.step].astype(float)
            values.append(float((pixels.max(-1) - pixels.min(-1)).mean()))
        return {"colourfulness": values}
