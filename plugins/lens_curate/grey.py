"""Grey copies of pictures at a fixed size, made once for all scorers that need them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lens_core.types import Record

_COPIES: WeakKeyDictionary[Record, dict[int, NDArray[np.uint8]]] = WeakKeyDictionary()


def grey_copy(record: Record, side: int) -> NDArray[np.uint8]:
    """Brightness (ITU-R BT.601) of a picture, scaled to a longer side of `side` px where it is larger, [h,w]."""
    copies = _COPIES.setdefault(record, {})
    if side not in copies:
        image = Image.fromarray(record.pixels).convert("L")
        scale = side / max(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BOX)
        copies[side] = np.asarray(image)
    return copies[side]
