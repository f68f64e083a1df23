"""Scorers without weights: against closed forms and pictures whose numbers are known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from lens_curate import measures
from lens_curate.grey import grey_copy
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build
from lens_core.types import Record


def record(pixels: NDArray[np.uint8], **facts: object) -> Record:
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return Record(b"", pixels, **facts)  # type: ignore[arg-type]


def score(name: str, *records: Record, **options: object) -> dict[str, list[float]]:
    _, cls, config = build(Catalog.installed(), "curator", ComponentSpec(name, dict(options)))
    return {column: list(values) for column, values in cls(config).score(records).items()}


def noise(seed: int, size: tuple[int, int] = (128, 128)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def edges(side: int = 128) -> NDArray[np.uint8]:
    """Dark and light squares with straight edges."""
    grid = np.add.outer(np.arange(side) // 16, np.arange(side) // 16) % 2
    return (60 + 130 * grid).astype(np.uint8)


@pytest.mark.parametrize("name", measures.CURATORS)
def test_a_picture_is_measured_alone(name: str) -> None:
    records = [record(noise(seed, (40 + seed, 50)), dense=f"picture number {seed}") for seed in range(4)]
    together = score(name, *records)
    assert set(together) == set(measures.CURATORS[name].columns)
    for column, values in together.items():
        assert values == [score(name, each)[column][0] for each in records]
        assert all(np.isfinite(values))


@pytest.mark.parametrize("name", measures.CURATORS)
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2, 2), (3, 9)])
def test_the_smallest_and_longest_pictures_have_finite_numbers(name: str, size: tuple[int, int]) -> None:
    for pixels in (np.zeros(size, np.uint8), noise(0, size)):
        assert all(np.isfinite(v) for values in score(name, record(pixels)).values() for v in values)


def test_resolution_is_of_the_upright_picture() -> None:
    made = score("resolution", record(np.zeros((200, 300), np.uint8)))
    assert made == {"short_side": [200], "long_side": [300], "megapixels": [0.06], "aspect_ratio": [1.5]}


def test_luminance_and_entropy_of_two_halves() -> None:
    halves = np.zeros((64, 64), np.uint8)
    halves[:, 32:] = 200
    made = score("luminance", record(halves))
    assert made == {"mean": [100.0], "contrast": [100.0], "dark": [0.5], "light": [0.0]}
    assert score("entropy", record(halves))["entropy"] == [1.0]
    assert score("entropy", record(np.full((9, 9), 7, np.uint8)))["entropy"] == [0.0]
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert score("entropy", record(every))["entropy"] == [pytest.approx(8.0)]


def test_blur_lowers_clarity_and_edge_and_noise_is_measured_in_levels() -> None:
    sharp = edges()
    soft = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(3)))
    made = score("clarity", record(sharp), record(soft))
    assert made["clarity"][0] > 5 * made["clarity"][1]
    assert made["edge"] == [130.0, pytest.approx(130 / (3 * (2 * np.pi) ** 0.5), rel=0.1)]  # a Gaussian's steepest step
    assert made["acuity"] == [1.0, pytest.approx(0.16, abs=0.03)]
    faint = (100 + 0.2 * (soft - soft.mean())).astype(np.uint8)
    assert score("clarity", record(faint))["acuity"] == [pytest.approx(0.17, abs=0.05)]
    rng = np.random.default_rng(0)
    for deviation in (4.0, 12.0):
        noisy = np.clip(sharp + rng.normal(0, deviation, sharp.shape), 0, 255).astype(np.uint8)
        assert score("clarity", record(noisy))["noise"] == [pytest.approx(deviation, rel=0.12)]
    assert made["noise"] == [0.0, pytest.approx(0, abs=0.5)]


def test_clarity_does_not_depend_on_size_beyond_that_of_the_copy() -> None:
    picture = Image.fromarray(edges(256))
    large = np.asarray(picture.resize((1024, 1024), Image.Resampling.NEAREST))
    assert score("clarity", record(large)) == score("clarity", record(np.asarray(picture)))


def test_jpeg_blocks_are_seen_and_their_absence_too() -> None:
    picture = np.asarray(Image.fromarray(noise(0)).filter(ImageFilter.GaussianBlur(2)))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=8)
    made = score("blockiness", record(picture), record(np.asarray(Image.open(file))))["blockiness"]
    assert made[0] == pytest.approx(1, abs=0.1) and made[1] > 1.5
    assert score("blockiness", record(np.full((64, 64), 9, np.uint8)))["blockiness"] == [1.0]


def test_borders_are_shares_of_the_area() -> None:
    boxed = np.zeros((100, 100), np.uint8)
    boxed[20:80] = noise(1, (60, 100))
    made = score("borders", record(boxed))
    assert made == {"border": [pytest.approx(0.4)], "bars": [pytest.approx(0.4)], "frame": [pytest.approx(0.4)]}
    framed = np.full((100, 100), 255, np.uint8)
    framed[10:90, 10:90] = noise(1, (80, 80))
    made = score("borders", record(framed))
    assert made == {"border": [pytest.approx(0.36)], "bars": [pytest.approx(0.2)], "frame": [pytest.approx(0.36)]}
    assert score("borders", record(noise(2))) == {"border": [0.0], "bars": [0.0], "frame": [0.0]}
    assert score("borders", record(np.zeros((9, 9), np.uint8))) == {"border": [1.0], "bars": [1.0], "frame": [0.0]}


def test_an_even_ground_around_a_thing_is_no_frame_but_one_line_around_a_drawing_is() -> None:
    drawing = np.full((100, 140), 200, np.uint8)
    drawing[40:70, 50:80] = 60  # a square, whose edges are straight lines too
    made = score("borders", record(drawing))
    assert made["border"][0] > 0.9 and made["frame"] == [0.0]
    boxed = np.pad(drawing, ((10, 10), (0, 0)), constant_values=0)
    assert score("borders", record(boxed))["frame"] == [pytest.approx(20 / 120)]
    one_sided = np.pad(drawing, ((10, 0), (0, 0)), constant_values=0)
    assert score("borders", record(one_sided))["frame"] == [0.0]


def test_edges_of_colour_alone_are_sharp_or_blurred() -> None:
    """Red and green of one brightness: 0.299 * 200 = 0.587 * 101.9."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 1] = 200, 102
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(3)))
    sharp, soft = score("clarity", Record(b"", pixels), Record(b"", blurred))["acuity"]
    assert sharp == pytest.approx(1) and 0 < soft < 0.3


def test_words_of_the_longer_caption_count() -> None:
    made = score("captions", record(noise(0), brief="a cat", dense="a cat and a dog"), record(noise(0)))
    assert made == {"words": [5, 0], "characters": [15, 0], "repetition": [pytest.approx(0.2), 0.0]}


def test_a_grey_copy_is_made_once_and_is_never_enlarged() -> None:
    one = record(noise(0, (30, 700)))
    assert grey_copy(one, 256) is grey_copy(one, 256)
    assert grey_copy(one, 256).shape == (11, 256) and grey_copy(one, 1000).shape == (30, 700)
