"""One reader of pictures: depth, colour, alpha, direction and size come out the same for every file."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lens_core.io import images
from lens_core.io.images import ImageError, read_raw, read_rgb, to_mask, to_rgb
from lens_core.types import ConfigError


def file(image, kind="PNG", **more):
    out = io.BytesIO()
    image.save(out, format=kind, **more)
    return out.getvalue()


def first(picture):
    return np.asarray(picture)[0, 0].tolist()


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG by hand: Pillow writes no 16-bit colours."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) if rows is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + data + chunk(b"IEND", b"")


def matrix_profile(primaries, white, gamma):
    """An ICC v2 profile from xy primaries, its white and one gamma, made of bytes; the colours are moved to D50."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    target = np.array([white[0] / white[1], 1, (1 - white[0] - white[1]) / white[1]])
    matrix = xyz * np.linalg.solve(xyz, target)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    matrix = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ target)) @ bradford @ matrix

    def fixed(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"test profile\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": fixed(d50),
        b"rXYZ": fixed(matrix[:, 0]), b"gXYZ": fixed(matrix[:, 1]), b"bXYZ": fixed(matrix[:, 2]),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = bytearray(128)
    head[0:4] = struct.pack(">I", at + len(body))
    head[8:12], head[12:24], head[36:40] = b"\x02\x20\0\0", b"mntrRGB XYZ ", b"acsp"
    head[68:80] = b"".join(struct.pack(">i", round(v * 65536)) for v in d50)
    return bytes(head) + struct.pack(">I", len(tags)) + table + body, matrix


D65 = (0.3127, 0.3290)
ADOBE = matrix_profile([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], D65, 563 / 256)
P3 = matrix_profile([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], D65, 2.2)
SRGB = matrix_profile([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], D65, 2.2)


def in_srgb(colour, matrix, gamma):
    """What a colour of a matrix profile is in sRGB, by the formula."""
    linear = np.linalg.solve(SRGB[1], matrix @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# ---- depth ----------------------------------------------------------------------------------------------------------


def test_sixteen_bits_of_grey_keep_their_upper_eight():
    deep = Image.fromarray(np.full((4, 6), 100 * 257, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert first(read_rgb(file(deep, kind))) == [100, 100, 100]
    swapped = Image.frombytes("I;16B", (1, 1), struct.pack(">H", 100 * 257))
    assert first(to_rgb(swapped)) == [100, 100, 100]
    plain = b"P5 2 1 65535\n" + struct.pack(">HH", 100 * 257, 65535)
    assert np.asarray(read_rgb(plain))[0, :, 0].tolist() == [100, 255]


def test_sixteen_bits_of_colour_alpha_and_a_transparent_colour():
    row = b"\0" + struct.pack(">3H", 100 * 257, 50 * 257, 200 * 257)
    assert first(read_rgb(png(1, 1, 16, 2, row))) == [100, 50, 200]
    assert first(read_rgb(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 40 * 257, 0)))) == [255, 255, 255]
    key = chunk(b"tRNS", struct.pack(">3H", 100 * 257, 50 * 257, 200 * 257))
    assert first(read_rgb(png(1, 1, 16, 2, row, key))) == [255, 255, 255]
    grey = b"\0" + struct.pack(">2H", 40 * 257, 41 * 257)
    read = read_rgb(png(2, 1, 16, 0, grey, chunk(b"tRNS", struct.pack(">H", 40 * 257))))
    assert np.asarray(read)[0, :, 0].tolist() == [255, 41]


def test_few_bits_of_grey_with_a_transparent_value():
    two = png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", struct.pack(">H", 1)))  # values 0, 1, 2, 3
    assert np.asarray(read_rgb(two))[0, :, 0].tolist() == [0, 255, 170, 255]


def test_a_tiff_whose_zero_is_white_is_not_negative():
    deep = Image.fromarray(np.full((2, 2), 100 * 257, np.uint16))
    assert first(read_rgb(file(deep, "TIFF", tiffinfo={262: 0}))) == [155, 155, 155]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_by_name(mode):
    with pytest.raises(ImageError, match=rf"x\.tif: has pixels of 32 bits \(mode {mode}\); save it with 8 or 16"):
        read_rgb(file(Image.new(mode, (3, 3)), "TIFF"), "x.tif")


# ---- colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "gamma"), [(ADOBE, 563 / 256), (P3, 2.2)], ids=["adobe", "p3"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_with_a_profile_keeps_its_look(profile, gamma, kind):
    colour = (180, 90, 60)
    more = {"lossless": True} if kind == "WEBP" else {}
    data = file(Image.new("RGB", (300, 300), colour), kind, icc_profile=profile[0], **more)
    want = in_srgb(colour, profile[1], gamma)
    assert np.abs(want - colour).max() > 5  # so that it is seen if the profile is not used
    assert np.abs(np.asarray(read_rgb(data)) - want).max() <= 1.5


def test_colour_and_alpha_are_both_kept():
    image = Image.new("RGBA", (2, 1), (180, 90, 60, 255))
    image.putpixel((1, 0), (180, 90, 60, 0))
    left, right = np.asarray(read_rgb(file(image, icc_profile=ADOBE[0])))[0]
    assert np.abs(left - in_srgb((180, 90, 60), ADOBE[1], 563 / 256)).max() <= 1.5
    assert right.tolist() == [255, 255, 255]
    palette = Image.new("RGB", (2, 2), (180, 90, 60)).quantize(4)
    read = np.asarray(read_rgb(file(palette, icc_profile=ADOBE[0])))
    assert np.abs(read - in_srgb((180, 90, 60), ADOBE[1], 563 / 256)).max() <= 1.5


def test_a_profile_that_is_srgb_changes_no_bit():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_rgb(file(noise, icc_profile=srgb)), noise)


@pytest.mark.parametrize("broken", [b"no profile", ADOBE[0][:200], ADOBE[0][:16] + b"GRAY" + ADOBE[0][20:]])
def test_a_profile_that_cannot_be_used_is_as_if_it_were_not_there(broken):
    assert first(read_rgb(file(Image.new("RGB", (2, 2), (180, 90, 60)), icc_profile=broken))) == [180, 90, 60]


def test_a_conversion_is_made_once():
    once = read_rgb(file(Image.new("RGB", (2, 2), (180, 90, 60)), icc_profile=ADOBE[0]))
    assert first(to_rgb(once)) == first(once)


def test_a_cmyk_picture_becomes_rgb():
    assert first(read_rgb(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))) == [255, 0, 0]


# ---- alpha, palettes, frames, direction -----------------------------------------------------------------------------


def test_what_is_transparent_lies_over_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 51))
    assert first(read_rgb(file(half))) == [255, 204, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    one = np.asarray(read_rgb(file(palette, transparency=1)))[0].tolist()
    assert one == [[10, 20, 30], [255, 255, 255]]
    several = np.asarray(read_rgb(file(palette, transparency=bytes([255, 51]))))[0].tolist()
    assert several == [[10, 20, 30], [212, 214, 216]]
    key = np.asarray(read_rgb(file(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))))[0].tolist()
    assert key == [[255, 255, 255]]


def test_strips_meet_without_a_seam():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (600, 9, 4), np.uint8), "RGBA")
    want = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(read_rgb(file(image)), want)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = file(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.array(first(read_rgb(data))) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_a_picture_stands_upright(kind):
    image = Image.new("RGB", (32, 16))
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = read_rgb(file(image, kind, exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[0] > 200 and upright.getpixel((8, 28))[0] < 50
    assert to_rgb(upright).size == (16, 32)


def test_broken_exif_is_as_if_it_were_not_there():
    data = file(Image.new("RGB", (4, 2), "red"), "JPEG", exif=b"Exif\0\0XX*\0nonsense")
    assert read_rgb(data).size == (4, 2)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_the_alpha_of_a_mask_counts():
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (255, 255, 255, 0))
    for made in (mask, mask.convert("LA"), read_raw(file(mask)), read_raw(file(mask, "WEBP", lossless=True))):
        assert np.asarray(to_mask(made))[0].tolist() == [255, 0]
    deep = Image.fromarray(np.array([[65535, 0]], np.uint16))
    assert np.asarray(to_mask(deep))[0].tolist() == [255, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(to_mask(read_raw(file(palette, transparency=1))))[0].tolist() == [255, 0]


# ---- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (13_300, 13_300), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_is_too_large_is_refused_from_its_header(width, height):
    with pytest.raises(ImageError, match=rf"big\.png: is too large: {width}x{height} px .* at most 89 are read") as e:
        read_rgb(png(width, height, 8, 6, b""), "big.png")
    assert e.value.reason == images.TOO_LARGE


def test_other_formats_too_are_refused_from_their_header():
    with pytest.raises(ImageError, match="is too large: 30000x30000"):
        read_rgb(b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0))
    with pytest.raises(ImageError, match="is too large: 16384x16384"):
        read_rgb(b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff\x3f\0" * 2)
    with pytest.raises(ImageError, match="is too large: 16384x16384"):
        read_rgb(b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8L" + struct.pack("<I", 5) + b"\x2f\xff\xff\xff\x0f" * 2)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\0;"
    with pytest.raises(ImageError, match="is too large: 60000x60000"):
        read_rgb(b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + frame)
    with pytest.raises(ImageError, match="is too large: 50000x50000"):
        read_rgb(b"P6 50000 50000 255\n")


def test_a_picture_in_memory_is_bounded_too(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="the picture: is too large: 11x10 px"):
        to_rgb(Image.new("RGBA", (11, 10)))


def test_reading_takes_8_bytes_a_pixel(tmp_path):
    side = 4000
    path = tmp_path / "a.png"
    Image.new("RGBA", (side, side), (255, 0, 0, 9)).save(path, compress_level=1)
    code = (
        "import resource, sys; from lens_core.io.images import read_rgb\n"
        "from PIL import Image, ImageCms; Image.init()\n"
        "import numpy\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"read_rgb({str(path)!r}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 8 * side * side + 40e6


@pytest.mark.parametrize(
    ("head", "name"),
    [(b"\0\0\0\x18ftypheic", "HEIC"), (b"\xff\x0a", "JPEG XL"), (b"8BPS", "Photoshop"), (b"%!PS-Adobe", "PostScript")],
)
def test_a_format_that_is_not_read_is_named(head, name):
    with pytest.raises(ImageError, match=f"a: cannot be read as a picture: it is a {name}.*; save it as PNG") as error:
        read_rgb(head + b"\0" * 100, "a")
    assert error.value.reason == images.UNSUPPORTED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", "GIF", "BMP"])
def test_a_truncated_picture_is_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = file(noise, kind)
    with pytest.raises(ImageError, match="cannot be read as a picture") as error:
        read_rgb(data[: len(data) * 2 // 3])
    assert error.value.reason == images.CORRUPT


@pytest.mark.parametrize("data", [b"", b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"hello " * 50])
def test_what_is_no_picture_is_one_line(data):
    with pytest.raises(ImageError, match=r"^the picture: cannot be read as a picture") as error:
        read_rgb(data)
    assert "\n" not in str(error.value) and error.value.reason == images.CORRUPT


def test_a_picture_that_is_opened_and_broken_is_refused(tmp_path):
    data = file(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    with pytest.raises(ConfigError, match="the picture: cannot be read"):
        to_rgb(Image.open(io.BytesIO(data[:4000])))


def test_a_path_that_is_not_there_is_one_line(tmp_path):
    for path, match in ((tmp_path / "no.png", "there is no such picture"), (tmp_path, "Is a directory")):
        with pytest.raises(ImageError, match=match) as error:
            read_rgb(path)
        assert error.value.reason == images.MISSING
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        read_rgb("a\0b.png")


def test_a_caller_may_bound_the_pixels_further(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (11, 10)).save(path)
    assert images.read_raw(path, most=110).size == (11, 10)
    with pytest.raises(ImageError, match="is too large: 11x10 px"):
        images.read_raw(path, most=109)
