"""Which training size a picture is for, and how it is fitted to it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from lens_data.buckets import LENS_BUCKETS, assign, lens_sizes
from lens_data.pictures import PictureError, fit, read
from PIL import Image


def png(array: np.ndarray, mode: str | None = None, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_the_table_of_lens_has_27_sizes_and_the_published_ones_at_1024():
    portrait = ((1472, 736), (1376, 768), (1248, 832), (1152, 864))
    assert lens_sizes(1024) == (*portrait, (1024, 1024), *((w, h) for h, w in reversed(portrait)))
    assert lens_sizes(512) == tuple((h // 2, w // 2) for h, w in lens_sizes(1024))
    flat = [size for group in LENS_BUCKETS for size in group]
    assert len(set(flat)) == 27 and all(side % 16 == 0 for size in flat for side in size)
    ratios = [1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2]
    for base, sizes in zip((512, 768, 1024), LENS_BUCKETS, strict=True):
        assert [w / h for h, w in sizes] == pytest.approx(ratios, rel=0.02)
        assert all(0.93 < h * w / base**2 < 1.04 for h, w in sizes)  # the published ones span 0.949 to 1.033


def one(height: int, width: int, **options: object) -> tuple[list[tuple[int, int]], dict[str, int]]:
    buckets = assign([height], [width], LENS_BUCKETS, **options)
    return [s for s, m in zip(buckets.sizes, buckets.members, strict=True) if len(m)], dict(buckets.left_out)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1024, 1024), (1024, 1024)),
        ((5000, 5000), (1024, 1024)),
        ((1023, 1023), (768, 768)),
        ((512, 512), (512, 512)),
        ((1080, 1920), (768, 1376)),
        ((1920, 1080), (1376, 768)),
        ((600, 800), (432, 576)),
        ((1100, 3000), (736, 1472)),  # 2.7:1 loses a quarter
    ],
)
def test_a_picture_has_the_nearest_ratio_in_the_largest_area_that_it_fills(picture, size):
    assert one(*picture) == ([size], {})


def test_what_fits_no_size_is_left_out_with_the_reason():
    assert one(511, 511) == ([], {"too small": 1})
    assert one(511, 511, max_upscale=1.01)[0] == [(512, 512)]
    assert one(800, 3300) == ([], {"too long or too tall": 1})
    assert one(800, 3300, max_crop=0.52)[0] == [(736, 1472)]


def test_every_area_shows_a_picture_at_each_size_that_it_fills():
    assert one(800, 800, every_area=True)[0] == [(512, 512), (768, 768)]


def test_assign_agrees_with_a_search_over_all_sizes():
    rng = np.random.default_rng(1)
    heights, widths = rng.integers(200, 2500, (2, 300))
    buckets = assign(heights, widths, LENS_BUCKETS)
    got = {int(i): buckets.sizes[b] for b, m in enumerate(buckets.members) for i in m}
    for i, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        fitting = []
        for group in LENS_BUCKETS:
            size = min(group, key=lambda s: abs(np.log(s[1] / s[0]) - np.log(w / h)))
            scale = max(size[0] / h, size[1] / w)
            if scale <= 1 and size[0] * size[1] >= 0.5 * scale**2 * h * w:
                fitting.append(size)
        assert got.get(i) == (fitting[-1] if fitting else None)
    assert len(got) + sum(buckets.left_out.values()) == 300 and len(set(got.values())) > 20


def test_an_exact_size_keeps_its_pixels_and_a_longer_picture_loses_both_ends():
    pixels = noise(32, 48)
    assert np.array_equal(fit(Image.fromarray(pixels), (32, 48)), pixels)
    assert np.array_equal(fit(Image.fromarray(pixels), (32, 32)), pixels[:, 8:40])
    assert fit(Image.fromarray(pixels), (20, 16)).shape == (20, 16, 3)


def test_scaling_down_keeps_the_mean():
    pixels = noise(200, 200)
    assert fit(Image.fromarray(pixels), (50, 50)).mean() == pytest.approx(pixels.mean(), abs=1)


def test_a_picture_is_upright_whatever_its_exif_says():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    image = read(png(pixels, exif=exif))
    assert image.size == (16, 32)
    assert np.asarray(image)[:16].min() == 255 and np.asarray(image)[16:].max() == 0


def test_transparency_lies_over_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    assert np.asarray(read(png(pixels)))[:, 0, 0].tolist() == [0, 0, 255, 255]


def test_16_bits_are_cut_to_8():
    grey = np.array([[0, 255, 256, 65535]], np.uint16)
    assert np.asarray(read(png(grey)))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_every_common_mode_becomes_rgb(mode):
    data = png(noise(8, 8), mode, "TIFF" if mode == "CMYK" else "PNG")
    assert read(data).mode == "RGB" and read(data).size == (8, 8)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", png(noise(64, 64))[:-4000], png(noise(64, 64), format="JPEG")[:900]]
)
def test_a_broken_file_is_no_picture(data):
    with pytest.raises(PictureError):
        read(data)
