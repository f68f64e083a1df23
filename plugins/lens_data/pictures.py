"""Image files as pictures: upright, RGB, and fitted to a training size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lens_core.io.images import ImageError as PictureError
from lens_core.io.images import read_rgb

__all__ = ["PictureError", "fit", "read"]


def read(data: bytes) -> Image.Image:
    """An image file as RGB, by the rules of `lens_core.io.images`, transparency over white. Raises PictureError."""
    return read_rgb(data)


def fit(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H,W,3] of `size` = (height, width): scaled to cover it, what juts out cut off evenly on both sides."""
    height, width = size
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
