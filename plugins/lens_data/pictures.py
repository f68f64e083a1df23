"""Image files as pictures: upright, RGB, and fitted to a training size."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Files with these endings are taken for pictures."""


class PictureError(ValueError):
    """The bytes are no picture that can be read whole."""


def read(data: bytes) -> Image.Image:
    """An image file as RGB: upright (EXIF), transparency over white, 16 bits cut to 8, the first frame of several.

    Every pixel is decoded, so that a truncated file is found here. Raises PictureError.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise PictureError(f"32-bit pixels (mode {image.mode})")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except PictureError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise PictureError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def fit(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H,W,3] of `size` = (height, width): scaled to cover it, what juts out cut off evenly on both sides."""
    height, width = size
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
