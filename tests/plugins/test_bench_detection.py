"""GenEval's detector: preprocessing and decoding against independent transcriptions, and a tiny random model."""

from __future__ import annotations

from pathlib import Path

import bench_models
import numpy as np
import pytest
import torch
from lens_bench.geneval import CLASSES
from lens_bench.perceive import canary, detection, masks, run, weights
from lens_bench.perceive.mask2former import Mask2Former
from numpy.typing import NDArray
from PIL import Image

from lens_core.types import CheckpointError, ConfigError, LensError

Floats = NDArray[np.float64]

# ---- an independent decoding, in float64 -----------------------------------------------------------------------------


def interpolation(out: int, size: int) -> Floats:
    """The matrix [out, size] of bilinear interpolation with pixel centres at halves and repeated edges."""
    matrix = np.zeros((out, size))
    for i in range(out):
        place = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(int(place), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def enlarged(logits: Floats, padded: detection.Size, fitted: detection.Size, original: detection.Size) -> Floats:
    first = interpolation(padded[0], logits.shape[0]) @ logits @ interpolation(padded[1], logits.shape[1]).T
    cut = first[: fitted[0], : fitted[1]]
    return interpolation(original[0], cut.shape[0]) @ cut @ interpolation(original[1], cut.shape[1]).T


def oracle(
    classes: Floats, maps: Floats, padded: detection.Size, fitted: detection.Size, original: detection.Size, top: int
) -> list[tuple[int, float, tuple[int, int, int, int], NDArray[np.bool_]]]:
    powers = np.exp(classes - classes.max(1, keepdims=True))
    probabilities = (powers / powers.sum(1, keepdims=True))[:, :-1]
    flat = probabilities.ravel()
    detections = []
    for place in sorted(range(len(flat)), key=lambda i: -flat[i])[:top]:
        query, label = divmod(place, probabilities.shape[1])
        logits = enlarged(maps[query], padded, fitted, original)
        mask = logits > 0
        if not mask.any():
            continue
        quality = (1 / (1 + np.exp(-logits[mask]))).sum() / (mask.sum() + 1e-6)
        ys, xs = np.nonzero(mask)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        detections.append((label, float(flat[place] * quality), box, mask))
    return detections


@pytest.mark.parametrize(("seed", "original"), [(0, (50, 70)), (1, (120, 33)), (2, (64, 64))])
def test_decoding_is_that_of_an_independent_transcription_in_float64(seed: int, original: detection.Size) -> None:
    rng = np.random.default_rng(seed)
    classes, maps = rng.normal(0, 3, (9, 81)), rng.normal(-0.5, 2, (9, 8, 12))
    maps[4] = -1.0  # an empty mask
    fitted, padded = (28, 45), (32, 48)
    got = detection.decode(
        torch.tensor(classes, dtype=torch.float32), torch.tensor(maps, dtype=torch.float32),
        padded=padded, fitted=fitted, original=original, top=30,
    )  # fmt: skip
    want = oracle(classes, maps, padded, fitted, original, top=30)
    assert [d.label for d in got] == [label for label, *_ in want]
    assert [d.box for d in got] == [box for _, _, box, _ in want]
    np.testing.assert_allclose([d.score for d in got], [score for _, score, *_ in want], rtol=1e-5)
    for mine, (_, _, (x1, y1, x2, y2), mask) in zip(got, want, strict=True):
        assert np.array_equal(mine.mask, mask[y1:y2, x1:x2])
    assert len(got) < 30  # the empty mask has none
    assert len({d.label for d in got}) < len(got)


def test_one_query_may_be_detected_as_several_classes() -> None:
    classes = torch.zeros(1, 81)
    classes[0, [3, 7]] = 9.0
    detections = detection.decode(classes, torch.ones(1, 4, 4), (16, 16), (16, 16), (16, 16), top=2)
    assert {d.label for d in detections} == {3, 7}
    assert detections[0].box == (0, 0, 16, 16)
    probability, sigmoid = np.exp(9) / (2 * np.exp(9) + 79), 1 / (1 + np.exp(-1))
    assert detections[0].score == pytest.approx(probability * sigmoid, rel=1e-5)


def test_how_many_masks_are_enlarged_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    classes, maps = torch.randn(20, 81, generator=generator), torch.randn(20, 8, 8, generator=generator)

    def detections(at_once: int) -> list[tuple[int, float, tuple[int, ...]]]:
        monkeypatch.setattr(detection, "PIXELS_AT_ONCE", at_once * 40 * 37)
        return [(d.label, d.score, d.box) for d in detection.decode(classes, maps, (32, 32), (32, 30), (40, 37))]

    assert detections(1) == detections(7) == detections(100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_detections(bad: float) -> None:
    maps = torch.zeros(2, 4, 4)
    maps[1, 2, 2] = bad
    with pytest.raises(LensError, match="not finite"):
        detection.decode(torch.zeros(2, 81), maps, (8, 8), (8, 8), (8, 8))


# ---- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((1024, 1024), (800, 800)), ((600, 1000), (800, 1333)), ((2000, 100), (1333, 67)), ((1, 5000), (1, 1333))],
)
def test_the_resized_picture_fits_1333_by_800(size: detection.Size, fitted: detection.Size) -> None:
    assert detection.resized(*size) == fitted


def test_preprocessing_is_bilinear_without_antialiasing_and_pads_before_it_normalises() -> None:
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (60, 100, 3), dtype=np.uint8)
    pixels, fitted = detection.preprocess(picture)
    assert fitted == (800, 1333)
    assert pixels.shape == (3, 800, 1344) and pixels.dtype == np.float32
    mean, std = np.array(detection.MEAN)[:, None, None], np.array(detection.STD)[:, None, None]
    levels = pixels * std + mean
    np.testing.assert_allclose(levels[:, :, 1333:], 128, atol=1e-3)
    rows, columns = interpolation(800, 60), interpolation(1333, 100)
    for channel in range(3):
        want = rows @ picture[..., channel].astype(np.float64) @ columns.T
        assert np.abs(levels[channel, :, :1333] - want).max() < 1.01  # OpenCV rounds to a level, in fixed point


def test_shrinking_keeps_the_contrast_that_antialiasing_takes() -> None:
    stripes = np.zeros((1600, 1600, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes = np.roll(stripes, 1, axis=1)[:, :1599]  # 1599 -> 800: between the columns
    pixels, (height, width) = detection.preprocess(stripes)
    levels = pixels[0] * detection.STD[0] + detection.MEAN[0]
    antialiased = np.asarray(Image.fromarray(stripes).resize((width, height), Image.Resampling.BILINEAR))[..., 0]
    assert levels.std() > 3 * antialiased.std()


# ---- masks as text ---------------------------------------------------------------------------------------------------


def test_a_mask_comes_back_from_its_text() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 5), (64, 17)):
        mask = rng.random((height, width)) > 0.5
        assert np.array_equal(masks.decode(masks.encode(mask), height, width), mask)
    inside = masks.whole(masks.encode(mask), (2, 1, 2 + width, 1 + height), 70, 20)
    assert np.array_equal(inside[1 : 1 + height, 2 : 2 + width], mask) and inside.sum() == mask.sum()


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("", (0, 0, 4, 4)), ("é", (0, 0, 4, 4)), ("AAAA", (0, 0, 4, 4)),
        (masks.encode(np.ones((9, 9), bool)), (0, 0, 4, 4)),
        (masks.encode(np.ones((4, 4), bool)), (0, 0, 4.5, 4)), (masks.encode(np.ones((4, 4), bool)), (30, 0, 34, 4)),
    ],
)  # fmt: skip
def test_what_is_no_mask_of_its_box_is_refused(text: str, box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask|box"):
        masks.whole(text, box, 20, 32)


# ---- a tiny random model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_models.mask2former(tmp_path_factory.mktemp("m2f"))


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_become_detections_of_the_model_with_mmdets_recipe(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    monkeypatch.setattr(detection, "LONG", 160)
    monkeypatch.setattr(detection, "SHORT", 96)
    pictures = [noise(48, 64, 0), noise(64, 48, 1), noise(48, 64, 2)]
    detector = Mask2Former(Mask2Former.Config(model=str(model), min_score=0.02, device="cpu"))
    got = detector.perceive(pictures, [None] * 3)
    raw = weights.load(Mask2FormerForUniversalSegmentation, str(model), "mask2former").double()
    for picture, detections in zip(pictures, got, strict=True):
        pixels, fitted = detection.preprocess(np.asarray(picture))
        with torch.no_grad():
            out = raw(pixel_values=torch.from_numpy(pixels).double()[None])
        want = oracle(
            out.class_queries_logits[0].numpy(), out.masks_queries_logits[0].numpy(),
            pixels.shape[1:], fitted, (picture.height, picture.width), 100,
        )  # fmt: skip
        want = [row for row in want if row[1] >= 0.02]
        assert want, "the model must see something, or nothing is tested"
        by_class: dict[str, list[float]] = {}
        for label, score, *_ in want:
            by_class.setdefault(CLASSES[label], []).append(score)
        assert {name: len(things) for name, things in detections.items()} == {n: len(s) for n, s in by_class.items()}
        for name, scores in by_class.items():
            np.testing.assert_allclose([thing["score"] for thing in detections[name]], scores, rtol=1e-3)
            for thing in detections[name]:
                x1, y1, x2, y2 = thing["box"]
                mask = masks.decode(thing["mask"], y2 - y1, x2 - x1)
                assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()  # a tight box


def test_a_detector_that_sees_nothing_fails_its_canary(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "LONG", 160)
    monkeypatch.setattr(detection, "SHORT", 96)
    detector = Mask2Former(Mask2Former.Config(model=str(model), device="cpu"))
    with pytest.raises(
        LensError, match=r"(?i)mask2former does not see what is there: grace_hopper\.jpg shows a person"
    ):
        run.prove(detector)


def test_a_detector_that_sees_the_person_passes() -> None:
    class Sees:
        def __init__(self, box: tuple[int, ...], score: float) -> None:
            self.answer = {"person": [{"box": list(box), "score": score}]}

        def perceive(self, images: list[Image.Image], questions: list[None]) -> list[object]:
            assert images[0].size == (512, 600) and questions == [None]
            return [self.answer]

    assert canary.object_in_photo(Sees((0, 20, 512, 600), 0.97), "", "person") is None
    assert "must be above 0.9" in str(canary.object_in_photo(Sees((0, 20, 512, 600), 0.5), "", "person"))
    assert "detected at [0, 0, 90, 90]" in str(canary.object_in_photo(Sees((0, 0, 90, 90), 0.97), "", "person"))


def test_the_revision_changes_with_the_weights(model: Path, tmp_path: Path) -> None:
    other = bench_models.mask2former(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    mine, changed = (Mask2Former(Mask2Former.Config(model=str(m))).describe() for m in (model, other))
    assert mine["version"] == changed["version"] and mine["revision"] != changed["revision"]


def test_a_model_without_all_its_weights_or_classes_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    few = bench_models.mask2former(tmp_path / "few", classes=3)
    with pytest.raises(CheckpointError, match="detects 3 classes, not COCO's 80"):
        Mask2Former(Mask2Former.Config(model=str(few), device="cpu")).perceive([noise(8, 8, 0)], [None])
    tensors = load_file(few / "model.safetensors")
    tensors.pop("class_predictor.bias")
    save_file(tensors, few / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights of class_predictor\.bias are missing"):
        Mask2Former(Mask2Former.Config(model=str(few), device="cpu")).perceive([noise(8, 8, 0)], [None])


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ('{"model_type": "clip"}', (), "says 'clip', not 'mask2former'"),
        ("{}", (), "says None"),
        ("[]", (), "must hold a JSON object"),
        ('{"model_type": "mask2former"}', (), "cannot be loaded"),
        ('{"model_type": "mask2former"}', ("pytorch_model.bin",), "cannot be loaded"),
    ],
)
def test_folders_that_are_no_such_model_are_refused_in_one_line(
    tmp_path: Path, config: str, files: tuple[str, ...], message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x02pickle")
    with pytest.raises(CheckpointError, match=message) as caught:
        Mask2Former(Mask2Former.Config(model=str(tmp_path), device="cpu")).perceive([noise(8, 8, 0)], [None])
    assert "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a Hub name"):
        Mask2Former(Mask2Former.Config(model=str(tmp_path / "absent"))).describe()
    with pytest.raises(CheckpointError, match=r"config\.json is not in the cache"):
        Mask2Former(Mask2Former.Config(model="nobody/nothing")).describe()
    with pytest.raises(ConfigError, match="min_score"):
        Mask2Former.Config(min_score=2.0)
