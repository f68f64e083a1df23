"""Curators that need no weights: each measures a picture by a formula of its own.

What the columns mean is in docs/curate.md. Each is a pure function of the pixels; `version` changes with its formula.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from PIL import Image

from lens_core.types import Record
from lens_core.validators import integer, real
from lens_curate.grey import grey_copy

FAINT = 24.0
"""Steepest steps of brightness, in levels, below which the edges of a picture may be ones of colour alone."""
SIDE = field(default=256, validator=integer(at_least=16, at_most=4096))
"""Longer side of the grey copy that is measured, px."""


class _Measure:
    """A curator that measures one picture at a time, with the function `measure`."""

    version: ClassVar[str] = "1"
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        self.config = config

    def measure(self, record: Record) -> tuple[float, ...]:
        raise NotImplementedError

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        rows = [self.measure(record) for record in records]
        return {name: [row[place] for row in rows] for place, name in enumerate(self.columns)}


class Resolution(_Measure):
    """Height and width in px, megapixels, and the aspect ratio (long side over short)."""

    columns = ("short_side", "long_side", "megapixels", "aspect_ratio")

    @frozen
    class Config:
        pass

    def measure(self, record: Record) -> tuple[float, ...]:
        height, width = record.pixels.shape[:2]
        return min(height, width), max(height, width), height * width / 1e6, max(height, width) / min(height, width)


class Luminance(_Measure):
    """Brightness: mean, standard deviation, shares of black and of white pixels.

    Brightness is from 0 to 255; pixels count that are nearly black or white.
    """

    columns = ("mean", "contrast", "dark", "light")

    @frozen
    class Config:
        size: int = SIDE  # longer side of the grey copy that is measured, px
        black: float = field(default=15, validator=real(at_least=0, at_most=255))  # brightness that is nearly black
        white: float = field(default=250, validator=real(at_least=0, at_most=255))  # brightness that is nearly white

    def measure(self, record: Record) -> tuple[float, ...]:
        grey = grey_copy(record, self.config.size)
        dark, light = (grey <= self.config.black).mean(), (grey >= self.config.white).mean()
        return float(grey.mean()), float(grey.std()), float(dark), float(light)


class Entropy(_Measure):
    """Entropy of the brightness histogram in bits: 0 (one brightness) to 8 (all alike)."""

    columns = ("entropy",)

    @frozen
    class Config:
        size: int = SIDE  # longer side of the grey copy that is measured, px

    def measure(self, record: Record) -> tuple[float, ...]:
        grey = grey_copy(record, self.config.size)
        share = np.bincount(grey.ravel(), minlength=256) / grey.size
        share = share[share > 0]
        return (max(0.0, -float((share * np.log2(share)).sum())),)


class Clarity(_Measure):
    """Sharpness of the edges, and noise.

    Measured on a grey copy of a fixed size.

    `clarity` is the standard deviation of the Laplacian over that of the brightness: the variance of the Laplacian, a
    usual measure of blur, without the contrast of the picture in it. `edge` is the steepest step between neighbours
    (the 99.9th percentile), in levels: blur lowers it however few edges there are. `acuity` is the mean share of an
    edge's whole height that its steepest step takes, over the steepest edges: 1 for a step from one pixel to the next,
    0.27 after Gaussian blur of 1.5 px, whatever the contrast; of red, green or blue where brightness has hardly any
    edges. `noise` is the deviation of Gaussian noise in levels, estimated from the part of the picture without edges
    (Immerkaer 1996).
    """

    version = "2"
    columns = ("clarity", "edge", "acuity", "noise")

    @frozen
    class Config:
        size: int = SIDE  # longer side of the grey copy that is measured, px

    def measure(self, record: Record) -> tuple[float, ...]:
        grey = grey_copy(record, self.config.size).astype(np.float32)
        if min(grey.shape) < 3:
            return 0.0, 0.0, 0.0, 0.0
        spread = float(grey.std())
        clarity = float(laplacian(grey).std()) / spread if spread > 0 else 0.0
        steps = np.concatenate([np.abs(np.diff(grey, axis=0)).ravel(), np.abs(np.diff(grey, axis=1)).ravel()])
        edge = float(np.partition(steps, at := int(0.999 * (len(steps) - 1)))[at])
        return clarity, edge, acuity(grey if edge >= FAINT else _steepest_channel(record, grey)), noise_level(grey)


class Blockiness(_Measure):
    """JPEG block artefacts: 1 for none, 2 where steps between blocks are twice as large.

    How much larger steps between the 8 x 8 blocks of JPEG are than those inside them.

    At full size, whatever the format: a picture that was JPEG once keeps its blocks as PNG. Blocks whose grid was
    moved or scaled are not seen.
    """

    columns = ("blockiness",)

    @frozen
    class Config:
        pass

    def measure(self, record: Record) -> tuple[float, ...]:
        grey = grey_copy(record, 1 << 30).astype(np.float32)
        ratios = [_block_ratio(np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)) for axis in (0, 1)]
        known = [ratio for ratio in ratios if ratio is not None]
        return (float(np.mean(known)) if known else 1.0,)


class Borders(_Measure):
    """The share of a picture that is an even border: letterboxes, white margins.

    `border` is the share of the area; `bars` that of the two thickest opposite bars alone. A row belongs to the border
    if all its pixels are within `tolerance` levels of the corner's colour. An even background that reaches an edge
    counts too, so a threshold on these belongs to pictures of the world, not to drawings. `frame` is for both: the
    share of the area that lies outside of two or four straight lines, each along most of the picture. Where an even
    background ends at a thing, the thing is narrower than that.
    """

    version = "2"
    columns = ("border", "bars", "frame")

    @frozen
    class Config:
        size: int = SIDE  # longer side of the grey copy that is measured, px
        tolerance: float = field(default=8, validator=real(at_least=0, at_most=255))  # levels from the corner's

    def measure(self, record: Record) -> tuple[float, ...]:
        grey = grey_copy(record, self.config.size).astype(np.float32)
        height, width = grey.shape
        top, bottom = (_even(lines, self.config.tolerance) for lines in (grey, grey[::-1]))
        left, right = (_even(lines, self.config.tolerance) for lines in (grey.T, grey.T[::-1]))
        if top >= height or left >= width:
            return 1.0, 1.0, 0.0
        inside = (height - top - bottom) * (width - left - right)
        bars = max(2 * min(top, bottom) / height, 2 * min(left, right) / width)
        pairs = ((grey, top), (grey[::-1], bottom)), ((grey.T, left), (grey.T[::-1], right))
        within = 1.0
        for one, other in pairs:
            if all(_ends_at_a_line(lines, count, self.config.tolerance) for lines, count in (one, other)):
                within *= 1 - 2 * min(one[1], other[1]) / len(one[0])
        return 1 - inside / (height * width), bars, 1 - within


class FileFacts(_Measure):
    """File facts: a wrong file ending (1 or 0), and bytes a pixel.

    A wrong ending is that of another format.
    """

    columns = ("wrong_extension", "bytes_per_pixel")

    @frozen
    class Config:
        pass

    def measure(self, record: Record) -> tuple[float, ...]:
        ending = os.path.splitext(str(record.data.get("name", "")))[1].lower()
        known = ENDINGS.get(str(record.data.get("format", "")), ())
        wrong = bool(ending in _ALL_ENDINGS and known and ending not in known)
        height, width = record.pixels.shape[:2]
        return float(wrong), len(record.image) / (height * width)


class Captions(_Measure):
    """Length of the caption in words and characters, and how often words repeat.

    Of the longer of the captions that came with a picture.

    `repetition` is 1 less the share of different words: 0 where no word stands twice.
    """

    columns = ("words", "characters", "repetition")
    reads_captions = True

    @frozen
    class Config:
        pass

    def measure(self, record: Record) -> tuple[float, ...]:
        text = max(record.dense, record.brief, key=len)
        words = text.lower().split()
        return len(words), len(text), 1 - len(set(words)) / len(words) if words else 0.0


def laplacian(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sum of the four neighbours less four times the pixel, inside the edges."""
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return np.asarray(around - 4 * grey[1:-1, 1:-1], np.float32)


def _steepest_channel(record: Record, grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Red, green or blue at the size of the grey copy, whichever has the steepest steps; the grey copy if that has."""
    height, width = grey.shape
    image = Image.fromarray(record.pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BOX)
    planes = [grey, *np.asarray(image, np.float32).transpose(2, 0, 1)]
    return max(planes, key=lambda p: max(np.abs(np.diff(p, axis=0)).max(), np.abs(np.diff(p, axis=1)).max()))


def acuity(grey: NDArray[np.float32], reach: int = 4) -> float:
    """The steepest steps between neighbours, over the range of brightness within `reach` px of them along their
    direction, in the mean; 0 for an even picture."""
    ratios = []
    for lines in (grey, grey.T):
        steps = np.abs(np.diff(lines, axis=1))
        count = max(16, steps.size // 1000)
        best = np.argpartition(steps, max(0, steps.size - count), axis=None)[-count:]
        row, column = np.unravel_index(best, steps.shape)
        around = np.clip(column[:, None] + np.arange(1 - reach, reach + 1), 0, lines.shape[1] - 1)
        near = lines[row[:, None], around]
        height, step = near.max(axis=1) - near.min(axis=1), steps[row, column]
        # A step of a level or two is rounding, or the noise of a compression.
        clear = step >= max(3.0, 0.5 * float(step.max(initial=0)))
        ratios.append(step[clear] / height[clear])
    measured = np.concatenate(ratios)
    return float(measured.mean()) if len(measured) else 0.0


def sharpness(record: Record) -> float:
    """The measure by which the best of several duplicates is chosen."""
    grey = grey_copy(record, 256).astype(np.float32)
    return float(laplacian(grey).std()) if min(grey.shape) >= 3 else 0.0


def noise_level(grey: NDArray[np.float32]) -> float:
    """Standard deviation of Gaussian noise in levels, from the mean absolute answer to a mask that no plane and no
    straight edge along an axis excites; the median over 8 x 8 tiles, so that textures do not count as noise."""
    g = grey
    mask = (
        g[:-2, :-2] + g[:-2, 2:] + g[2:, :-2] + g[2:, 2:]
        - 2 * (g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:]) + 4 * g[1:-1, 1:-1]
    )  # fmt: skip
    height, width = (side // 8 * 8 for side in mask.shape)
    scale = math.sqrt(math.pi / 2) / 6
    if not height or not width:
        return float(np.abs(mask).mean()) * scale
    tiles = np.abs(mask[:height, :width]).reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3))
    return float(np.median(tiles)) * scale


def _block_ratio(steps: NDArray[np.float32]) -> float | None:
    """Mean step at every eighth place over the mean step elsewhere; None for fewer than three blocks."""
    if len(steps) < 24:
        return None
    edge = np.arange(len(steps)) % 8 == 7
    inside = float(steps[~edge].mean())
    # Half a level, so that even pictures, whose steps are a few rounding errors, have a ratio near 1.
    return (float(steps[edge].mean()) + 0.5) / (inside + 0.5)


def _even(lines: NDArray[np.float32], tolerance: float) -> int:
    """How many lines from the first on have the brightness of its first pixel all along."""
    other = (np.abs(lines - lines[0, 0]) > tolerance).any(axis=1)
    return int(other.argmax()) if other.any() else len(lines)


def _ends_at_a_line(lines: NDArray[np.float32], count: int, tolerance: float) -> bool:
    """Whether what follows the first `count` lines, which are even, differs from them at once and nearly all along.

    Three lines on, since scaling and JPEG soften the step, 60 % of the line: the other two sides of a frame are of its
    colour, and take the rest.
    """
    if not 0 < count < len(lines) // 2:
        return False
    after = lines[min(count + 2, len(lines) - 1)]
    return bool((np.abs(after - lines[0, 0]) > 2 * tolerance).mean() > 0.6)


ENDINGS: Mapping[str, tuple[str, ...]] = {
    "AVIF": (".avif", ".avifs"), "BMP": (".bmp", ".dib"), "DIB": (".bmp", ".dib"), "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG2000": (".jp2", ".j2k"), "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"), "PPM": (".ppm", ".pgm", ".pnm"), "QOI": (".qoi",), "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}  # fmt: skip
"""Endings of the names of files by Pillow's name of their format."""
_ALL_ENDINGS = frozenset(ending for endings in ENDINGS.values() for ending in endings)

CURATORS: Mapping[str, type[Any]] = {
    "blockiness": Blockiness,
    "borders": Borders,
    "captions": Captions,
    "clarity": Clarity,
    "entropy": Entropy,
    "file": FileFacts,
    "luminance": Luminance,
    "resolution": Resolution,
}
