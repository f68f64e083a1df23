"""Pictures in and out: uploads for an edit, and finished pictures as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from lens_core.inference import png_metadata
from lens_core.io import images
from lens_core.types import ConfigError
from lens_serve.errors import bad_request
from lens_serve.fields import AnswerOptions, Parsed
from lens_serve.jobs import ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_LEVEL = 1  # of PNG compression: a preview is seen once
FILE_FIELDS = ("image", "mask")


def edit_request(parsed: Parsed, files: Mapping[str, list[bytes]], grid: int, most: int) -> ImageRequest:
    """The request of an edit, with its pictures decoded and in the size of the result. Raises ApiError.

    `grid`: what sides are multiples of, px; a picture without `size` is drawn in its own, rounded to it. `most` is the
    number of pixels that a picture may have. Memory: one picture of that size, 8 bytes a pixel, at a time.
    """
    for name, values in files.items():
        if name not in FILE_FIELDS:
            raise bad_request(f"unknown file: {name[:80]!r}; send image and mask", name[:80], "unknown_parameter")
        if len(values) > 1:
            raise bad_request(f"{len(values)} files are called {name}, and this server edits one picture", name)
    if "image" not in files:
        raise bad_request("the file 'image' is missing", "image", "missing_required_parameter")
    image = _decoded("image", files["image"][0], most)
    original = image.size
    width, height = (max(grid, round(side / grid) * grid) for side in image.size)
    if parsed.size is not None:
        height, width = parsed.size
    image = image if image.size == (width, height) else image.resize((width, height))
    mask = _mask(files["mask"][0], original, (width, height), most) if "mask" in files else None
    settings = evolve(
        parsed.draw.settings, image=image, mask=mask, height=height, width=width, strength=parsed.strength
    )
    return evolve(parsed.draw, settings=settings)


def _decoded(name: str, data: bytes, most: int) -> Image:
    try:
        return images.to_rgb(images.read_raw(data, f"the {name}", most), name=f"the {name}")
    except ConfigError as error:
        raise bad_request(str(error), name, "invalid_image") from error


def _mask(data: bytes, original: tuple[int, int], size: tuple[int, int], most: int) -> Image:
    """A mask as Lens has it, L, white where the picture is repainted.

    OpenAI's masks are transparent there. One that is opaque all over is taken as black and white, whatever its mode.
    """
    try:
        raw = images.read_raw(data, "the mask", most)
        if raw.size != original:
            raise bad_request(
                f"the mask is {raw.width}x{raw.height} px and the image {original[0]}x{original[1]}; make them equal",
                "mask", "invalid_image",
            )  # fmt: skip
        alpha = raw.convert("RGBA").getchannel("A") if raw.has_transparency_data else None
        # Editors save opaque masks with an alpha channel too.
        if alpha is not None and alpha.getextrema()[0] < 255:  # type: ignore[operator]  # one channel, so two numbers
            mask = alpha.point(lambda opacity: 255 if opacity < 128 else 0)
        else:
            mask = images.to_mask(raw)
    except ConfigError as error:
        raise bad_request(str(error), "mask", "invalid_image") from error
    from PIL import Image as pil

    return mask if mask.size == size else mask.resize(size, pil.Resampling.NEAREST)


def encoded(image: Image, answer: AnswerOptions, facts: Mapping[str, Any] | None = None) -> bytes:
    """A picture as a file in the format that was asked for; a PNG holds the facts that draw it again."""
    stream = io.BytesIO()
    if answer.format == "png" and facts is not None:
        png_metadata.save_to(image, stream, dict(facts))
    elif answer.format == "png":
        image.save(stream, format="PNG", compress_level=PREVIEW_LEVEL)
    else:
        image.save(
            stream, format=answer.format.upper(), quality=90 if answer.compression is None else answer.compression
        )
    return stream.getvalue()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
