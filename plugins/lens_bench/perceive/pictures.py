"""Picture files to RGB, with what a benchmark does to them before its models look."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import PIL

from lens_core.io import images, readers
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 2**28  # bytes of a picture's file
JPEG_VERSION = f"jpeg75-pillow-{PIL.__version__}"
"""Names what `read` does to a picture that goes through JPEG."""


def read(path: Path, sha256: str, jpeg: bool = False) -> Image:
    """An RGB picture, upright; `jpeg`: after a trip through JPEG of Pillow's default quality, as OneIG's code saves the
    tiles of its grids. Raises ConfigError where the file is not the one with this hash, or no picture."""
    image = images.read_rgb(_checked(path, sha256), path.name)
    return through_jpeg(image) if jpeg else image


def _checked(path: Path, sha256: str) -> bytes:
    data = readers.read_bytes(path, LARGEST)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ConfigError(f"{path}: is not the picture that was generated; put that back, or start with another folder")
    return data


def through_jpeg(image: Image) -> Image:
    from PIL import Image as pil

    file = io.BytesIO()
    image.save(file, "JPEG")
    with pil.open(file) as saved:
        return saved.convert("RGB")


def is_black(path: Path, sha256: str) -> bool:
    """Whether every pixel is (0, 0, 0): what some systems return in place of a refusal."""
    extrema = images.read_rgb(_checked(path, sha256), path.name).getextrema()
    return all(high == 0 for _, high in extrema)  # type: ignore[misc]  # RGB: a pair for each channel


def png(image: Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
