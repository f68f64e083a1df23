"""Features that are kept are those that the encoder would give, and the encoder is not asked for them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve
from test_offload import Meter

from lens_core.catalog import Catalog
from lens_core.checkpoints.tensor_files import read_header, read_tensors
from lens_core.cli.main import main
from lens_core.inference import prompt_cache
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json, write_json
from lens_core.types import CheckpointError, ConfigError, TextFeatures

SIZE: dict[str, Any] = {"height": 32, "width": 48, "output_type": "latent", "seed": 0}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the toy encoder was asked: prompts it encoded, and "load" where it was read."""
    seen: list[Any] = []
    load, encode = toy.Letters.load.__func__, toy.Letters.encode  # type: ignore[attr-defined]  # a classmethod
    monkeypatch.setattr(toy.Letters, "load", classmethod(lambda c, *a, **k: seen.append("load") or load(c, *a, **k)))
    monkeypatch.setattr(toy.Letters, "encode", lambda self, p: seen.append(list(p)) or encode(self, p))
    return seen


def read(checkpoint: Path, catalog: Catalog, folder: Path | None, **more: Any) -> LensPipeline:
    return LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu", prompt_cache=folder, **more)


def test_a_prompt_is_encoded_once_and_alone(pipeline: LensPipeline, encoded: list[Any]) -> None:
    first = pipeline(["a", "bcd", "a"], negative_prompt="x", guidance_scale=2.0, **{**SIZE, "seed": 1}).images
    assert encoded == [["a"], ["bcd"], ["x"]]
    again = pipeline(["bcd", "a"], negative_prompt="x", guidance_scale=2.0, **{**SIZE, "seed": [2, 3]}).images
    assert len(encoded) == 3
    torch.testing.assert_close(again, first[1:])


def test_a_weight_that_changed_counts(pipeline: LensPipeline, encoded: list[Any]) -> None:
    before = pipeline("a", **SIZE).images
    with torch.no_grad():
        pipeline.text_encoder.table.weight.mul_(2)
    assert not torch.equal(pipeline("a", **SIZE).images, before)
    pipeline.text_encoder.table = torch.nn.Embedding(256, 8)
    pipeline("a", **SIZE)
    assert encoded == [["a"]] * 3


def test_memory_holds_so_many_prompts_and_forgets_the_longest_unused(
    pipeline: LensPipeline, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_IN_MEMORY", 2)
    for prompt in "abacabc":
        pipeline(prompt, **SIZE)
    assert [p for (p,) in encoded] == ["a", "b", "c", "b", "c"]
    assert len(pipeline.prompt_cache.entries) == 2
    many = pipeline(list("vwxyz"), **SIZE).images
    torch.testing.assert_close(many[2:3], pipeline("x", **{**SIZE, "seed": 2}).images)


def test_with_a_folder_the_encoder_is_read_when_a_new_prompt_comes(
    checkpoint: Path, catalog: Catalog, tmp_path: Path, encoded: list[Any]
) -> None:
    want = [read(checkpoint, catalog, None)(p, **SIZE).images for p in ("a", "b")]
    encoded.clear()
    first = read(checkpoint, catalog, tmp_path / "kept")
    assert encoded == []
    assert torch.equal(first("a", **SIZE).images, want[0]) and encoded == ["load", ["a"]]
    encoded.clear()
    second = read(checkpoint, catalog, tmp_path / "kept")
    assert torch.equal(second("a", **SIZE).images, want[0]) and encoded == []
    assert torch.equal(second("b", **SIZE).images, want[1]) and encoded == ["load", ["b"]]
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("plan", ["auto", "none", "block", "encoder-cpu"])
def test_under_a_plan_an_encoder_that_is_not_needed_is_nowhere(
    plan: str, checkpoint: Path, catalog: Catalog, tmp_path: Path, encoded: list[Any]
) -> None:
    want = read(checkpoint, catalog, tmp_path)("a", **SIZE).images
    encoded.clear()
    pipeline, meter = read(checkpoint, catalog, tmp_path), Meter(free=10**12)
    estimate = pipeline.offload(plan, accelerator=meter)
    assert "text_encoder" not in estimate.how
    assert torch.equal(pipeline("a", **SIZE).images, want) and encoded == []
    pipeline("b", **SIZE)
    assert encoded == ["load", ["b"]] and pipeline.offload_manager is not None
    assert "text_encoder" in pipeline.offload_manager.estimate.how
    assert torch.equal(pipeline("a", **SIZE).images, want)
    assert meter.has(pipeline.text_encoder.table.weight) == (plan in ("auto", "none"))


def test_another_encoder_config_or_precision_has_files_of_its_own(
    checkpoint: Path, catalog: Catalog, tmp_path: Path, pipeline: LensPipeline
) -> None:
    def files() -> int:
        return len(list((tmp_path / "kept").iterdir()))

    read(checkpoint, catalog, tmp_path / "kept")("a", **SIZE)
    read(checkpoint, catalog, tmp_path / "kept", dtype="bfloat16")("a", **SIZE)
    assert files() == 2
    with torch.no_grad():
        pipeline.backbone.outer.bias.add_(1)
    pipeline.save_pretrained(tmp_path / "same_encoder")
    read(tmp_path / "same_encoder", catalog, tmp_path / "kept")("a", **SIZE)
    assert files() == 2, "a backbone has no say in it"
    with torch.no_grad():
        pipeline.text_encoder.table.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "other")
    got = read(tmp_path / "other", catalog, tmp_path / "kept")("a", **SIZE).images
    assert files() == 3 and torch.equal(got, pipeline("a", **SIZE).images)


def test_what_was_trained_since_it_was_read_is_not_written(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    pipeline = read(checkpoint, catalog, tmp_path / "kept")
    with torch.no_grad():
        pipeline.text_encoder.table.weight.mul_(2)
    pipeline("a", **SIZE)
    assert not (tmp_path / "kept").exists()


def test_rounded_weights_are_not_written_as_the_files_own(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    pipeline = read(checkpoint, catalog, tmp_path / "texts")
    first = pipeline.text_encoder.table.weight.clone()
    pipeline.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    assert not torch.equal(pipeline.text_encoder.table.weight, first)
    pipeline("a", **SIZE)
    assert not list((tmp_path / "texts").glob("*"))


@pytest.mark.parametrize("inner", [False, True])
def test_another_config_of_the_same_weights_counts(inner: bool, pipeline: LensPipeline) -> None:
    """Which layers are read, and by what pattern they attend, stands in configs, of the encoder or of a part of it."""

    class Layers(toy.Letters):
        def encode(self, prompts: Sequence[str]) -> TextFeatures:
            text = super().encode(prompts)
            return TextFeatures(text.features * (self.table if inner else self).config["layer"], text.mask)

    torch.manual_seed(0)
    pipeline.text_encoder = Layers(None)
    owner = pipeline.text_encoder.table if inner else pipeline.text_encoder
    owner.config = {"layer": 1}
    first = pipeline.encode_once(["a"])[0].features
    for config in ({"layer": 2}, owner.config):
        owner.config = config
        owner.config["layer"] = 2  # in place, the second time
        assert torch.equal(pipeline.encode_once(["a"])[0].features, 2 * first)


def test_an_encoder_put_in_its_place_is_asked(pipeline: LensPipeline) -> None:
    class Says:  # no module: it has no weights to tell it by
        layers, width = 1, 8

        def __init__(self, value: float) -> None:
            self.value = value

        def encode(self, prompts: list[str]) -> TextFeatures:
            return TextFeatures(
                torch.full((len(prompts), 1, 2, 8), self.value), torch.ones(len(prompts), 2, dtype=torch.bool)
            )

    for value in (1.0, 2.0):
        pipeline.text_encoder = Says(value)
        assert float(pipeline.encode_once(["a"])[0].features.mean()) == value


def test_another_chat_template_is_another_encoder(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    template = checkpoint / "tokenizer" / "chat_template.jinja"
    template.parent.mkdir(exist_ok=True)
    template.write_text("{{ prompt }}")
    before = read(checkpoint, catalog, tmp_path / "texts")
    before("a", **SIZE)
    template.write_text("Draw {{ prompt }}")
    after = read(checkpoint, catalog, tmp_path / "texts")
    after("a", **SIZE)
    assert before.version != after.version and len(list((tmp_path / "texts").glob("*"))) == 2


@pytest.mark.parametrize("harm", ["cut", "empty", "pickle", "other"])
def test_a_damaged_file_is_made_again(
    harm: str, checkpoint: Path, catalog: Catalog, tmp_path: Path, encoded: list[Any]
) -> None:
    read(checkpoint, catalog, tmp_path)("a", **SIZE)
    (path,) = tmp_path.glob("*.safetensors")
    whole, held = path.read_bytes(), {k: v.clone() for k, v in read_tensors(path).items()}  # not the file's memory
    if harm == "other":
        read(checkpoint, catalog, tmp_path / "b")("b", **SIZE)
        damaged = next((tmp_path / "b").iterdir()).read_bytes()
    else:
        damaged = {"cut": whole[:-5], "empty": b"", "pickle": b"\x80\x04" + whole}[harm]
    path.write_bytes(damaged)
    encoded.clear()
    want = read(checkpoint, catalog, None)("a", **SIZE).images
    assert torch.equal(read(checkpoint, catalog, tmp_path)("a", **SIZE).images, want)
    assert encoded.count(["a"]) == 2
    again = read_tensors(path)
    assert sorted(again) == ["features", "mask"] and all(torch.equal(again[k], v) for k, v in held.items())
    assert again["features"].dtype == held["features"].dtype


def test_a_folder_that_cannot_be_is_refused(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: is a file; --prompt-cache takes a folder"):
        read(checkpoint, catalog, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        read(checkpoint, catalog, tmp_path / "file" / "below")("a", **SIZE)


def test_saving_reads_an_encoder_that_has_been_waiting(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    read(checkpoint, catalog, tmp_path / "kept").save_pretrained(tmp_path / "again")
    for path in checkpoint.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(checkpoint)).read_bytes()


def test_the_published_encoders_features_are_bit_for_bit_and_its_date_is_reported(tmp_path: Path) -> None:
    catalog = Catalog.installed()

    def tiny(uri: str = "tiny:", dtype: str = "bfloat16") -> LensPipeline:
        return LensPipeline.from_pretrained(
            uri, catalog=catalog, device="cpu", dtype=dtype, prompt_cache=tmp_path / "t"
        )

    call: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "output_type": "latent"}
    first = tiny()
    prompts = ["a red circle", "two blue squares left of a small green star"]
    drawn = first(prompts, **call)
    second = tiny()
    again = second(prompts, **call)
    assert second.store.loaded["text_encoder"] is None
    assert torch.equal(again.images, drawn.images) and again.settings == drawn.settings
    assert again.settings["date"] == "2026-05-20"
    for prompt in prompts:
        online, kept = second.encode([prompt]), second.encode_once([prompt])[0]
        assert torch.equal(kept.features, online.features) and torch.equal(kept.mask, online.mask)
    assert {json.loads(read_header(p)["lens_text"])["prompt"] for p in (tmp_path / "t").iterdir()} == set(prompts)
    first.save_pretrained(tmp_path / "later")
    about = read_json(tmp_path / "later" / "lens.json")
    about["components"]["text_encoder"]["config"]["date"] = "2027-01-02"
    write_json(tmp_path / "later" / "lens.json", about)
    later = tiny(str(tmp_path / "later"))
    result = later(prompts[0], **call)
    assert result.settings["date"] == "2027-01-02" and later.store.loaded["text_encoder"] is not None
    assert evolve(result, images=None) != evolve(again, images=None)


def test_the_command_keeps_features(
    checkpoint: Path, catalog: Catalog, tmp_path: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: catalog))
    flags = ["--model", str(checkpoint), "--size", "32x48", "--seed", "1", "--prompt-cache", str(tmp_path / "t")]
    for name in ("a", "b"):
        assert main(["generate", "a red cat", *flags, "-o", str(tmp_path / f"{name}.png")]) == 0
    assert encoded == ["load", ["a red cat"]]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
