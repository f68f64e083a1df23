"""CLIP in benchmarks: colours, CLIPScore and style against independent computations, on tiny random models."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import bench_models
import numpy as np
import pytest
import torch
from lens_bench import cvtg
from lens_bench.geneval import COLORS
from lens_bench.perceive import canary, clip, masks, run
from lens_bench.perceive.clip import ClipColors, ClipSimilarity
from lens_bench.perceive.dreamsim import NEEDED, WEIGHTS_ONLY, DreamSim
from lens_bench.perceive.style import ClipStyle
from PIL import Image
from safetensors.torch import save_file

from lens_core.types import CheckpointError, ConfigError, LensError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_models.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def double(model: Path) -> tuple[Any, Any]:
    """The same model and tokenizer through transformers alone, in float64."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(model).double().eval(), CLIPTokenizer.from_pretrained(model)


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def embedded_texts(double: tuple[Any, Any], texts: list[str]) -> Any:
    """One text at a time, so that no padding is there to matter."""
    model, tokenizer = double
    with torch.no_grad():
        rows = [model.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0].numpy() for t in texts]
    return unit(np.stack(rows))


def embedded_images(double: tuple[Any, Any], images: list[Image.Image]) -> Any:
    """By transformers' own preprocessing with Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(images, return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        return unit(double[0].get_image_features(pixel_values=pixels).pooler_output.numpy())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 40), (30, 60), (100, 50)])
def test_preprocessing_is_that_of_clips_own_processor(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = noise(*size, 0)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    want = processor([picture], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(clip.preprocess(picture, 32), want, atol=1e-6)


def test_an_object_is_shown_on_grey_and_cut_at_its_box() -> None:
    picture, mask = noise(20, 30, 1), np.zeros((5, 7), bool)
    mask[1:4, 2:6] = True
    crop = np.asarray(clip.cut_out(picture, [3, 2, 10, 7], masks.encode(mask)))
    want = np.full((5, 7, 3), 0x99, np.uint8)
    want[mask] = np.asarray(picture)[2:7, 3:10][mask]
    assert np.array_equal(crop, want)
    assert np.array_equal(np.asarray(clip.cut_out(picture, [3, 2, 10, 7], None)), np.asarray(picture)[2:7, 3:10])


def test_colours_are_those_of_an_independent_computation(model: Path, double: tuple[Any, Any]) -> None:
    pictures = [Image.new("RGB", (40, 40), (40 * i, 255 - 50 * i, 90 * (i % 3))) for i in range(6)]
    things = [
        {"class": name, "objects": [{"box": [0, 0, 32, 32], "mask": None}, {"box": [4, 4, 36, 36], "mask": None}]}
        for name in ("bench", "tv remote", "bench", "car", "car", "bench")
    ]
    got = ClipColors(ClipColors.Config(model=str(model), device="cpu")).perceive(pictures, things)
    seen = set()
    for picture, thing, answer in zip(pictures, things, got, strict=True):
        vectors = []
        for color in COLORS:
            name = thing["class"]
            texts = [
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            ]
            vectors.append(embedded_texts(double, texts).mean(0))
        crops = embedded_images(double, [picture.crop((0, 0, 32, 32)), picture.crop((4, 4, 36, 36))])
        want = [COLORS[i] for i in (crops @ unit(np.stack(vectors)).T).argmax(1)]
        assert answer == want
        seen |= set(want)
    assert len(seen) > 1, "one colour for all would prove little"


def test_no_object_is_no_colour(model: Path) -> None:
    colors = ClipColors(ClipColors.Config(model=str(model), device="cpu"))
    assert colors.perceive([noise(8, 8, 0)], [{"class": "car", "objects": []}]) == [[]]


def test_similarity_is_the_cosine_of_picture_and_prefixed_text(model: Path, double: tuple[Any, Any]) -> None:
    pictures, texts = [noise(32, 32, 3), noise(64, 64, 4)], ["a sign", "Long text: " + "word " * 200]
    got = ClipSimilarity(ClipSimilarity.Config(model=str(model), device="cpu")).perceive(pictures, texts)
    _, tokenizer = double
    first = embedded_texts(double, ["A photo depicts a sign"])
    cut = tokenizer("A photo depicts " + texts[1], truncation=True, max_length=77, return_tensors="pt")
    assert cut["input_ids"].shape == (1, 77)
    with torch.no_grad():
        second = unit(double[0].get_text_features(**cut).pooler_output.numpy())
    want = (embedded_images(double, pictures) * np.concatenate([first, second])).sum(-1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_clip_score_is_two_and_a_half_cosines_and_never_negative() -> None:
    assert cvtg.clip_score(0.32) == pytest.approx(0.8)
    assert cvtg.clip_score(-0.1) == 0.0


def test_a_random_model_fails_the_canary(model: Path) -> None:
    for perceiver in (
        ClipColors(ClipColors.Config(model=str(model), device="cpu")),
        ClipSimilarity(ClipSimilarity.Config(model=str(model), device="cpu")),
    ):
        with pytest.raises(LensError, match="does not see what is there: flat"):
            run.prove(perceiver)


def test_what_names_flat_colours_passes_the_canary() -> None:
    names = {rgb: color for color, rgb in canary.FLAT.items()}

    class Names:
        def perceive(self, images: list[Image.Image], questions: list[Any]) -> list[Any]:
            seen = [names[image.getpixel((0, 0))] for image in images]
            if isinstance(questions[0], str):
                return [float(color in text) for color, text in zip(seen, questions, strict=True)]
            return [[color] for color in seen]

    assert canary.flat_colors_by_name(Names()) is None
    assert canary.flat_colors_by_similarity(Names()) is None


def test_a_model_whose_embeddings_are_not_finite_scores_nothing(model: Path) -> None:
    similarity = ClipSimilarity(ClipSimilarity.Config(model=str(model), device="cpu"))
    loaded, _ = similarity._clip._load()
    with torch.no_grad():
        loaded.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(LensError, match="not finite"):
        similarity.perceive([noise(8, 8, 0)], ["a"])


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = bench_models.clip(tmp_path / "clip")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        ClipSimilarity(ClipSimilarity.Config(model=str(folder), device="cpu")).perceive([noise(8, 8, 0)], ["a"])


# ---- style -----------------------------------------------------------------------------------------------------------


def test_style_is_the_largest_cosine_to_its_references(tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    folder = bench_models.clip(tmp_path / "style", vision_only=True)
    generator = torch.Generator().manual_seed(0)
    references = {
        "cubism": torch.randn(5, 12, generator=generator) * 3,
        "lego": torch.randn(1, 12, generator=generator),
    }
    save_file(references, tmp_path / "references.safetensors")
    style = ClipStyle(ClipStyle.Config(str(folder), str(tmp_path / "references.safetensors"), device="cpu"))
    pictures = [noise(40, 40, 0), noise(32, 32, 1)]
    got = style.perceive(pictures, ["cubism", "lego"])
    model = CLIPVisionModelWithProjection.from_pretrained(folder).double().eval()
    pixels = torch.from_numpy(np.stack([clip.preprocess(p, 32) for p in pictures])).double()
    with torch.no_grad():
        vectors = unit(model(pixel_values=pixels).image_embeds.numpy())
    want = [
        float((unit(references[name].double().numpy()) @ vector).max())
        for name, vector in zip(("cubism", "lego"), vectors, strict=True)
    ]
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ConfigError, match=r"has no style 'cubsm'\. Did you mean 'cubism'"):
        style.perceive(pictures[:1], ["cubsm"])
    before = style.describe()["revision"]
    save_file(references | {"lego": torch.ones(1, 12)}, tmp_path / "references.safetensors")
    assert style.describe()["revision"] != before


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({"cubism": torch.ones(2, 11)}, r"'cubism' have the shape \[2, 11\], not \[n, 12\]"),
        ({"cubism": torch.ones(12)}, "'cubism'"),
        ({"cubism": torch.full((2, 12), float("nan"))}, "'cubism' are not finite"),
        (None, "there are no reference embeddings"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path: Path, references: Any, message: str) -> None:
    folder, path = bench_models.clip(tmp_path / "style", vision_only=True), tmp_path / "references.safetensors"
    if references is not None:
        save_file(references, path)
    style = ClipStyle(ClipStyle.Config(str(folder), str(path), device="cpu"))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        style.perceive([noise(8, 8, 0)], ["cubism"])


# ---- DreamSim --------------------------------------------------------------------------------------------------------


def test_without_the_package_or_its_weights_dreamsim_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dream = DreamSim(DreamSim.Config(folder=str(tmp_path)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package dreamsim is not installed"):
        dream.describe()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace())
    with pytest.raises(ConfigError, match=r"dino_vitb16_pretrain\.pth: is missing, and nothing is downloaded"):
        dream.describe()


def test_embeddings_have_length_one_and_weights_are_read_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import sys

    for name in NEEDED:
        (tmp_path / name).write_bytes(b"weights")
    flags = []

    class Model:
        def embed(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.flatten(1)[:, :6] + torch.arange(6.0)

    def load(**options: Any) -> tuple[Any, Any]:
        flags.append(os.environ.get(WEIGHTS_ONLY))
        assert options["cache_dir"] == str(tmp_path)
        return Model(), lambda image: torch.from_numpy(np.asarray(image, np.float32)[None, :2, :2]) / 255

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=load))
    dream = DreamSim(DreamSim.Config(folder=str(tmp_path), device="cpu"))
    got = np.array(dream.perceive([noise(4, 4, 0), noise(4, 4, 1)], [None, None]))
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    raw = np.stack([np.asarray(noise(4, 4, s), np.float32)[:2, :2].ravel()[:6] / 255 + np.arange(6) for s in (0, 1)])
    distance = 1 - (unit(raw)[0] * unit(raw)[1]).sum()
    assert 1 - (got[0] * got[1]).sum() == pytest.approx(distance, abs=1e-6)
    assert flags == ["1"] and WEIGHTS_ONLY not in os.environ
