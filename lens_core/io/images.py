"""Reads image files: one reader for every way into Lens, so that a picture looks the same wherever it comes in.

What becomes of a file:

- size      more than MAX_PIXELS is refused from the header, before anything is decoded
- format    one of FORMATS; another is refused by its name
- frames    the first of an animation
- depth     16 bits keep their upper eight; 32-bit pixels, whole or float, are refused: nothing says what white is
- colour    an embedded ICC profile is converted to sRGB (perceptual intent); without one, or with one that cannot be
            read or is of another kind of colour than the pixels, values are taken for sRGB
- alpha     laid over a background: white for a picture, black for a mask
- upright   turned as its EXIF says; EXIF that cannot be read is as if it were not there
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PIXELS = 89_478_485
"""Height times width of the largest picture: Pillow's own bound. Reading one takes 8 bytes a pixel at most."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "QOI")
"""Formats that are read, by Pillow's names. The others start programs (EPS), are vectors, or are nowhere in use."""
_STRIP = 256  # rows that are converted at once, so that only the picture itself is held twice
_FOREIGN = (  # (offset, the bytes there, name) of formats that are met and not read
    (4, b"ftypheic", "HEIC"), (4, b"ftypheix", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftyphevc", "HEIC"),
    (4, b"ftypmsf1", "HEIF"), (4, b"ftypcrx ", "Canon CR3"), (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"8BPS", "Photoshop PSD"), (0, b"%PDF", "PDF"), (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"), (0, b"<svg", "SVG"), (0, b"<?xml", "XML or SVG"), (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"), (0, b"DDS ", "DDS"), (0, b"\0\0\x01\0", "icon"), (0, b"icns", "ICNS"),
    (0, b"\xabKTX", "KTX"), (0, b"SIMPLE  =", "FITS"), (0, b"gimp xcf", "GIMP XCF"), (0, b"RIFF", "RIFF"),
    (4, b"ftyp", "video"), (0, b"\x1aE\xdf\xa3", "video"), (0, b"<!DOCTYPE", "HTML"), (0, b"<html", "HTML"),
    (0, b"PK\x03\x04", "ZIP"), (0, b"\x1f\x8b", "gzip"),
)  # fmt: skip


class ImageError(ConfigError):
    """An image file that cannot be used, in one line. `reason` is the kind of fault, for counting."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason  # MISSING, CORRUPT, TOO_LARGE or UNSUPPORTED
        super().__init__(message)


MISSING, CORRUPT, TOO_LARGE, UNSUPPORTED = "missing image", "corrupt image", "image too large", "unsupported image"


def read_rgb(source: Path | str | bytes, name: str = "", background: str = "white") -> Image:
    """An image file, or its bytes, as an RGB picture, by the rules above. `name` stands in errors for bytes.

    Every pixel is decoded, so a truncated file is refused here. Raises ImageError.
    """
    return to_rgb(read_raw(source, name), background, _label(source, name))


def read_raw(source: Path | str | bytes, name: str = "", most: int | None = None) -> Image:
    """An image file, or its bytes, with its pixels and its `info` as they are in the file. Raises ImageError, also for
    one of more than `most` pixels (MAX_PIXELS if None), which is not decoded."""
    most = MAX_PIXELS if most is None else most
    label = _label(source, name)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser().open("rb")
    except FileNotFoundError as error:
        raise ImageError(MISSING, f"{label}: there is no such picture; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        why = getattr(error, "strerror", None) or error
        raise ImageError(MISSING, f"{label}: cannot be read as a picture ({why}); check the path") from error
    with file:
        try:
            image = _opened(file, label, most)
            _scale_transparency(image)
        except Exception as error:
            raise _fault(error, label) from error
        _decode(image, label, most)
    return image


def to_rgb(image: Image, background: str = "white", name: str = "the picture") -> Image:
    """A PIL picture of any mode -> RGB, by the rules above; the one that is given stays as it is. Raises ImageError."""
    from PIL import Image as pil

    _decode(image, name)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # 16 bits in a PPM come as I, to 65535
        raise ImageError(UNSUPPORTED, f"{name}: has pixels of 32 bits (mode {image.mode}); save it with 8 or 16 bits")
    orientation = _orientation(image)
    coloured, convert = _colours(image)
    if image.mode == "RGB" and not coloured and "transparency" not in image.info:
        made = image
    else:
        made = pil.new("RGB", image.size)
        for top in range(0, image.height, _STRIP):
            strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
            made.paste(_flat(strip, image, convert, background), (0, top))
    return _upright(made, orientation)


def to_mask(image: Image) -> Image:
    """A PIL picture of any mode as a mask, L: its brightness, times its opacity. Raises ImageError."""
    return to_rgb(image, "black").convert("L")


def _decode(image: Image, label: str, most: int | None = None) -> None:
    """Read its pixels, if there are not too many."""
    _check_size(*image.size, label, MAX_PIXELS if most is None else most)
    try:
        image.load()
    except Exception as error:
        raise _fault(error, label) from error


def _fault(error: Exception, label: str) -> ImageError:
    """Decoders of broken files raise whatever they stumble over."""
    from PIL.Image import DecompressionBombError

    if isinstance(error, ImageError):
        return error
    said = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, DecompressionBombError):  # a frame within it that is larger than it
        return ImageError(TOO_LARGE, f"{label}: is too large ({said})")
    return ImageError(CORRUPT, f"{label}: cannot be read as a picture ({said})")


def _label(source: Path | str | bytes, name: str) -> str:
    return name or ("the picture" if isinstance(source, bytes) else str(source))


def _opened(file: Any, label: str, most: int) -> Image:
    """What `PIL.Image.open` does for FORMATS, but that a picture's size is ours to judge, by its name and in words."""
    from PIL import Image as pil

    prefix = file.read(32)
    if not prefix:
        raise ImageError(CORRUPT, f"{label}: cannot be read as a picture (it is empty)")
    pil.init()
    fault: Exception | None = None
    for name in FORMATS:
        factory, accept = pil.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(prefix) in (False, None, "")):
            continue
        file.seek(0)
        if name == "WEBP":
            _check_webp(file.read(30), label, most)
            file.seek(0)
        try:
            image: Image = factory(file, "")
        except SyntaxError as error:  # what a plugin says of a file that is not its own, or is broken
            fault = error
            continue
        return image
    if fault is not None:
        raise fault
    foreign = next((kind for at, mark, kind in _FOREIGN if prefix[at : at + len(mark)] == mark), "")
    what = f"is a {foreign} file" if foreign else "is of no format that is known"
    raise ImageError(
        UNSUPPORTED if foreign else CORRUPT,
        f"{label}: cannot be read as a picture: it {what}; save it as PNG, JPEG, WebP, AVIF, TIFF, GIF or BMP",
    )


def _check_size(width: int, height: int, label: str, most: int) -> None:
    if width * height > most:
        raise ImageError(
            TOO_LARGE,
            f"{label}: is too large: {width}x{height} px (width x height) are {width * height / 1e6:.0f} megapixels, "
            f"and at most {most / 1e6:.0f} are read; make it smaller",
        )


def _check_webp(head: bytes, label: str, most: int) -> None:
    """Pillow makes room for a whole WebP picture when it opens it: this reads its size before."""
    kind = head[12:16]
    if kind == b"VP8X" and len(head) >= 30:
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L" and len(head) >= 25:
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and len(head) >= 30:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        return
    _check_size(width, height, label, most)


def _scale_transparency(image: Image) -> None:
    """A PNG names its transparent colour in the file's own depth; Pillow leaves it so and makes the pixels 8 bits."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or isinstance(key, bytes):
        return
    tile = getattr(image, "tile", None)
    raw = tile[0][3] if tile else ""
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _flat(strip: Image, whole: Image, convert: Callable[[Image], Image], background: str) -> Image:
    """A strip of `whole` as RGB over the background."""
    from PIL import Image as pil

    strip, alpha = _parts(strip, whole)
    strip = convert(strip)
    if alpha is None:
        return strip
    strip = strip.convert("RGBA")
    strip.putalpha(alpha)
    return pil.alpha_composite(pil.new("RGBA", strip.size, background), strip).convert("RGB")


def _parts(strip: Image, whole: Image) -> tuple[Image, Image | None]:
    """A strip's colours in 8 bits, and how opaque it is."""
    import numpy as np
    from PIL import Image as pil

    if strip.mode in ("I", "F") or strip.mode.startswith("I;16"):
        deep = np.asarray(strip).astype(np.int64)
        if whole.format == "TIFF" and whole.tag_v2.get(262) == 0:  # type: ignore[attr-defined]  # 0 is white there
            deep = 65535 - deep
        key = whole.info.get("transparency")
        alpha = None if key is None else pil.fromarray(np.where(deep == key, 0, 255).astype(np.uint8))
        return pil.fromarray((deep >> 8).astype(np.uint8)), alpha
    if strip.mode == "RGBa":
        strip = strip.convert("RGBA")
    elif strip.mode == "La":
        strip = strip.convert("LA")
    if strip.mode in ("LA", "RGBA"):
        return strip.convert(strip.mode[:-1]), strip.getchannel("A")
    if strip.has_transparency_data:
        clear = strip.convert("RGBA")
        return clear.convert("RGB"), clear.getchannel("A")
    return (strip if strip.mode in ("L", "RGB", "CMYK") else strip.convert("RGB")), None


def _colours(image: Image) -> tuple[bool, Callable[[Image], Image]]:
    """How a strip of 8 bits (L, RGB or CMYK) becomes sRGB, and whether a profile has a part in it."""
    from PIL import ImageCms

    def plain(strip: Image) -> Image:
        return strip.convert("RGB")

    data = image.info.get("icc_profile")
    if not data:
        return False, plain
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip(), "")
        grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
        if not mode or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
            return False, plain
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False, plain  # as if it had none; so do browsers

    def managed(strip: Image) -> Image:
        strip = strip.convert(mode)
        if (made := ImageCms.applyTransform(strip, transform)) is None:
            raise ImageError(CORRUPT, "its colour profile gives no colours")
        return made

    # sRGB by whatever name: conversion would only round.
    return (False, plain) if mode != "CMYK" and _changes_nothing(managed, mode) else (True, managed)


def _changes_nothing(convert: Callable[[Image], Image], mode: str) -> bool:
    import numpy as np
    from PIL import Image as pil

    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3) if mode == "RGB" else steps[None]
    sample = pil.fromarray(np.ascontiguousarray(grid))
    apart = np.asarray(convert(sample), np.int16) - np.asarray(sample.convert("RGB"), np.int16)
    return bool(np.abs(apart).max() <= 1)


def _orientation(image: Image) -> int:
    """As EXIF numbers it, 1 to 8; 1 is upright."""
    with suppress(Exception):  # EXIF is read by many hands, and broken in many ways
        orientation = image.getexif().get(0x0112, 1)
        return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    return 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    how = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }.get(orientation)  # fmt: skip
    if how is None:
        return image
    turned = image.transpose(how)
    turned.info = {}  # or it would be turned again
    return turned
