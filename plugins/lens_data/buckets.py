"""Which training size a picture is for. Buckets are a tuple of groups of about one area, each of (height, width).

Lens trains at 27 sizes: 3 areas of 9 aspect ratios each (paper, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

Size = tuple[int, int]
Buckets = tuple[tuple[Size, ...], ...]

_LENS = (
    (1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024),
    (864, 1152), (832, 1248), (768, 1376), (736, 1472),
)  # fmt: skip  # height, width px, from 1:2 to 2:1


def lens_sizes(base: int) -> tuple[Size, ...]:
    """The nine published sizes of base 1024 scaled to `base` px, each side cut down to a multiple of 16.

    Only those of 1024 are published; at 512 the scaling is exact, at 768 all but the square lose 8 px of one side.
    """
    return tuple((height * base // 1024 // 16 * 16, width * base // 1024 // 16 * 16) for height, width in _LENS)


LENS_BUCKETS: Buckets = (lens_sizes(512), lens_sizes(768), lens_sizes(1024))


@frozen
class Assignment:
    """`sizes[i]` is shown by the pictures `members[i]` (indices, ascending); `left_out` counts the others by reason."""

    sizes: tuple[Size, ...]
    members: tuple[NDArray[np.int64], ...]
    left_out: Mapping[str, int]


def assign(
    heights: Sequence[int] | NDArray[np.integer[Any]],
    widths: Sequence[int] | NDArray[np.integer[Any]],
    buckets: Buckets,
    *,
    max_upscale: float = 1.0,
    max_crop: float = 0.5,
    every_area: bool = False,
) -> Assignment:
    """Give each picture the size of nearest aspect ratio in the largest group that it fills (`every_area`: in each).

    A picture fills a size if it is scaled by at most `max_upscale` and loses at most the share `max_crop` to the crop.
    """
    tall, wide = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    groups = sorted(buckets, key=lambda sizes: sum(h * w for h, w in sizes) / len(sizes))
    flat = tuple(size for sizes in groups for size in sizes)
    large = np.zeros(len(tall), bool)  # large enough for some group
    chosen: list[NDArray[np.int64]] = []  # for each group, the index into `flat` or -1
    start = 0
    for sizes in groups:
        nearest = np.zeros(len(tall), np.int64)
        distance = np.full(len(tall), np.inf)
        for index, (height, width) in enumerate(sizes):
            far = np.abs(np.log(wide * height / (tall * width)))
            nearest = np.where(far < distance, index, nearest)
            distance = np.minimum(distance, far)
        height, width = np.array(sizes, np.float64)[nearest].T
        scale = np.maximum(height / tall, width / wide)
        enough = scale <= max_upscale
        large |= enough
        kept = height * width / (scale**2 * tall * wide)
        # A crop that loses exactly `max_crop` may come out a rounding error above it.
        chosen.append(np.where(enough & (kept >= 1 - max_crop - 1e-9), start + nearest, -1))
        start += len(sizes)
    fits = np.stack(chosen) >= 0
    if not every_area:
        seen = np.zeros(len(tall), bool)
        for row in reversed(range(len(groups))):  # the largest first
            fits[row] &= ~seen
            seen |= fits[row]
    picked = np.where(fits, np.stack(chosen), -1)
    members = tuple(np.flatnonzero((picked == index).any(0)) for index in range(len(flat)))
    out = ~fits.any(0)
    left_out = {"too small": int((out & ~large).sum()), "too long or too tall": int((out & large).sum())}
    return Assignment(flat, members, {reason: n for reason, n in left_out.items() if n})
