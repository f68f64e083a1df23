"""Masks as text: the bits inside an object's box, packed, compressed, and in base 64."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode(mask: NDArray[np.bool_]) -> str:
    """A mask bool [h, w], cropped to its box -> text."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 6)).decode("ascii")


def decode(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask bool [height, width] that `text` is. Raises ValueError where it is none of that size."""
    size = -(-height * width // 8)
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"is no mask ({error})") from error
    if len(data) != size or not inflate.eof:
        raise ValueError(f"is no mask of {height}x{width} px")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=height * width).reshape(height, width).astype(bool)


def whole(text: str, box: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """The mask bool [height, width] of a picture, False outside `box` (x1, y1, x2, y2), whole pixels, ends exclusive.

    Raises ValueError where the box is not within the picture or the text is no mask of its size.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    if [x1, y1, x2, y2] != list(box) or not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(f"has the box {list(box)}, which is none of a picture of {height}x{width} px")
    made = np.zeros((height, width), bool)
    made[y1:y2, x1:x2] = decode(text, y2 - y1, x2 - x1)
    return made
