"""Filters with weights: small models of the real classes, and refusals before a picture is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_curate.curation import curate
from lens_curate.models import Aesthetics, CaptionMatch, Classifier, TextArea, read_head
from lens_curate.recipe import CurationSpec
from lens_curate.text_pictures import TextPictures
from safetensors.torch import save_file

from lens_core.config import ComponentSpec, structure
from lens_core.io.images import read_rgb
from lens_core.types import CheckpointError, ConfigError, LensError, Record, Score

SIZES = [(24, 24), (40, 30), (31, 64)]


def pictures() -> list[Record]:
    rng = np.random.default_rng(0)
    return [Record(b"", rng.integers(0, 256, (*size, 3), dtype=np.uint8), dense=f"number {size}") for size in SIZES]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 10}, vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def head(path: Path, width: int = 12) -> Path:
    sizes, numbers = [width, 1024, 128, 64, 16, 1], (0, 2, 4, 6, 7)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, ins, outs in zip(numbers, sizes, sizes[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(outs, ins, generator=generator) / ins**0.5
        tensors[f"layers.{number}.bias"] = torch.zeros(outs)
    save_file(tensors, path)
    return path


def test_a_classifier_gives_the_probability_of_its_label_whatever_the_batch(classifier: Path) -> None:
    def scores(label: str, batch: int) -> list[float]:
        config = Classifier.Config(str(classifier), label=label, column="p", device="cpu", batch=batch)
        return list(Classifier(config).score(pictures())["p"])

    bad, good = scores("nsfw", 1), scores("normal", 3)
    assert np.allclose(np.add(bad, good), 1) and np.allclose(bad, scores("nsfw", 2), atol=1e-5)
    assert len(set(bad)) == 3


def test_aesthetics_are_five_layers_over_the_unit_embedding(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    path = head(tmp_path / "head.safetensors")
    config = Aesthetics.Config(str(clip), head=str(path), device="cpu", batch=2)
    curator = Aesthetics(config)
    curator.prepare()
    made = curator.score(pictures())["aesthetics"]
    model, processor, layers = curator._loaded
    assert isinstance(model, CLIPModel) and [layer.in_features for layer in layers] == [12, 1024, 128, 64, 16]
    inputs = processor(images=[pictures()[1].pixels], return_tensors="pt")
    with torch.no_grad():
        embedding = model.visual_projection(model.vision_model(**inputs).pooler_output)[0]
        expected = embedding / embedding.norm()
        for layer in layers:
            expected = layer.weight @ expected + layer.bias
    assert made[1] == pytest.approx(expected.item(), abs=1e-5)


def test_a_head_of_another_shape_or_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers.0.weight must be of shape \(1024, 768\), not \(1024, 12\)"):
        read_head(head(tmp_path / "head.safetensors"), 768)
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_head(tmp_path / "head.pth", 12)


def test_weights_that_cannot_be_had_are_refused_before_a_picture_is_read(
    classifier: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "raw").mkdir()

    def refused(words: str, **options: Any) -> None:
        recipe = {"sources": [{"use": "folder", "path": str(tmp_path / "raw")}], "filters": [options]}
        with pytest.raises(LensError, match=words):
            curate(structure(CurationSpec, recipe), tmp_path / "store", runner="serial")
        assert not (tmp_path / "store" / "samples.lance").exists()

    commit = "0123456789abcdef0123456789abcdef01234567"
    refused("nothing is fetched offline", use="classifier", model="nobody/nothing", revision=commit, label="nsfw")
    refused("must be its commit", use="classifier", model="nobody/nothing", label="nsfw")
    refused("40 hexadecimal digits", use="classifier", model="nobody/nothing", revision="main", label="nsfw")
    refused("has no label 'porn'", use="classifier", model=str(classifier), label="porn")
    config = shutil.copytree(classifier, tmp_path / "lettered") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "id2label": {"a": "nsfw"}}))
    refused("has no label 'nsfw'", use="classifier", model=str(config.parent), label="nsfw")
    refused("projection_dim", use="aesthetics", model=str(classifier), head="head.safetensors")
    (tmp_path / "empty").mkdir()
    refused("has no config.json", use="classifier", model=str(tmp_path / "empty"), label="nsfw")


def test_text_area_is_large_where_there_is_much_text_and_zero_where_there_is_none() -> None:
    pytest.importorskip("rapidocr")
    source = TextPictures(TextPictures.Config(1, scripts=("latin",), sizes=((256, 256),)), None)  # type: ignore[arg-type]
    drawn = np.asarray(read_rgb(source.draw(0).image or b""))
    plain = np.full((256, 256, 3), 90, np.uint8)
    curator = TextArea(TextArea.Config())
    curator.prepare()
    made = curator.score([Record(b"", drawn), Record(b"", plain)])
    assert 0.02 < made["text_area"][0] < 0.9 and made["text_boxes"][0] >= 1
    assert made["text_area"][1] == made["text_boxes"][1] == 0


class _Judge:
    """A reward that knows one caption, and breaks at another."""

    def score(self, images: Any, prompts: Any) -> list[Score]:
        (prompt,) = prompts
        assert images.dtype == torch.uint8 and images.shape[:2] == (1, 3)
        assert len(prompt.data["rubrics"]) == 4 and prompt.data["global"]["q"]
        if prompt.text == "broken":
            return [Score("failed", evidence="it is down")]
        return [Score("ok", float(prompt.text == "right"))]


def test_a_caption_is_judged_by_a_reward_which_may_fail_but_not_be_zero() -> None:
    curator = CaptionMatch(CaptionMatch.Config(ComponentSpec("shapes")))
    curator._reward = _Judge()
    pixels = np.zeros((8, 9, 3), np.uint8)
    records = [Record(b"", pixels, dense="right"), Record(b"", pixels, brief="wrong")]
    assert curator.score(records) == {"match": [1.0, 0.0]} and curator.costly
    with pytest.raises(RuntimeError, match="it is down"):
        curator.score([Record(b"", pixels, dense="broken")])
    with pytest.raises(ConfigError):
        structure(CaptionMatch.Config, {"reward": {"use": "shapes"}, "caption": "both"})
