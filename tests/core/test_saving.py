"""What `save_pretrained` leaves of a checkpoint that stood in the folder before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lens_core.catalog import Catalog
from lens_core.checkpoints import integrity, manifest
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec
from lens_core.types import CheckpointError

LEFTOVERS = (
    "scheduler/scheduler_config.json", "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "text_encoder/model-00001-of-00003.safetensors",
)  # fmt: skip
OTHERS = (
    "transformer/model.safetensors",
    "vae/my_chat.jinja",
    "transformer/mine.safetensors",
    "transformer/model-old.safetensors",
    "notes/config.json",
    "my.json",
)


def test_what_an_earlier_checkpoint_left_is_removed(pipeline: LensPipeline, checkpoint: Path, catalog: Catalog) -> None:
    put(checkpoint, LEFTOVERS)
    about = json.loads((checkpoint / "lens.json").read_text())
    about["files"] |= dict.fromkeys(LEFTOVERS, "0" * 64)
    (checkpoint / "lens.json").write_text(json.dumps(about))
    pipeline.save_pretrained(checkpoint)
    assert not any((checkpoint / name).exists() for name in LEFTOVERS)
    LensPipeline.from_pretrained(checkpoint, catalog=catalog, verify=True, device="cpu")


@pytest.mark.parametrize("new", [True, False])
def test_what_was_interrupted_is_no_checkpoint_and_may_be_saved_again(
    new: bool,
    pipeline: LensPipeline,
    checkpoint: Path,
    catalog: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint / ".." / "new" if new else checkpoint
    put(checkpoint, ("vae/mine.safetensors",))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.backbone), "save", full)
        with pytest.raises(OSError, match="No space left"):
            pipeline.save_pretrained(folder)
    with pytest.raises(CheckpointError):
        LensPipeline.from_pretrained(folder, catalog=catalog)
    pipeline.save_pretrained(folder)
    LensPipeline.from_pretrained(folder, catalog=catalog, device="cpu", verify=new)
    assert not list(folder.glob("*.unfinished")) and (checkpoint / "vae" / "mine.safetensors").is_file()


def test_a_checkpoint_that_a_failed_save_did_not_touch_can_be_put_back(
    pipeline: LensPipeline, checkpoint: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((checkpoint / "lens.json").read_text())
    put(checkpoint, ("vae/mine.safetensors",))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline.vae), "save", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            pipeline.save_pretrained(checkpoint)
    (checkpoint / "lens.json.unfinished").rename(checkpoint / "lens.json")
    report = integrity.check(checkpoint, manifest.read_manifest(checkpoint, catalog))
    assert report.named == len(before["files"]) and report.problems == [
        "vae/mine.safetensors: is extra, and no part of what was written"
    ]
    LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu")


@pytest.mark.parametrize("times", [1, 2])
def test_what_an_interrupted_save_wrote_is_removed_and_what_was_there_before_stays(
    times: int, pipeline: LensPipeline, checkpoint: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, shard = "transformer/model.safetensors", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    put(checkpoint, (foreign,))

    def interrupted(*_: object) -> None:
        put(checkpoint, (shard,))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.backbone), "save", interrupted)
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                pipeline.save_pretrained(checkpoint)
    pipeline.save_pretrained(checkpoint)
    report = integrity.check(checkpoint, manifest.read_manifest(checkpoint, catalog))
    assert report.extra == (foreign,) and not report.missing and not report.differ


@pytest.mark.parametrize("named", [True, False])
def test_what_an_interrupted_save_wrote_of_a_part_that_the_next_one_lacks_is_removed(
    named: bool, pipeline: LensPipeline, tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, encoder = tmp_path / "new", pipeline.text_encoder
    if not named:  # a checkpoint whose files nobody has listed, a text encoder perhaps among them
        pipeline.text_encoder = None
        pipeline.save_pretrained(folder)
        about = json.loads((folder / "lens.json").read_text())
        del about["files"]
        (folder / "lens.json").write_text(json.dumps(about))
        pipeline.put("text_encoder", encoder, ComponentSpec("toy:letters"))
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.backbone), "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.save_pretrained(folder)
    written = folder / "text_encoder" / "diffusion_pytorch_model.safetensors"
    assert written.is_file()
    pipeline.text_encoder = None
    pipeline.save_pretrained(folder)
    assert written.is_file() is not named
    if named:
        LensPipeline.from_pretrained(folder, catalog=catalog, device="cpu", verify=True)


def test_files_by_other_names_stay(pipeline: LensPipeline, checkpoint: Path, catalog: Catalog) -> None:
    put(checkpoint, OTHERS)
    pipeline.save_pretrained(checkpoint)
    assert all((checkpoint / name).read_text() == "{}" for name in OTHERS)
    report = integrity.check(checkpoint, manifest.read_manifest(checkpoint, catalog))
    assert set(report.extra) == set(OTHERS) and not report.missing and not report.differ


def test_files_of_a_part_that_is_not_written_stay(pipeline: LensPipeline, checkpoint: Path) -> None:
    kept = checkpoint / "text_encoder" / "diffusion_pytorch_model.safetensors"
    assert kept.is_file()
    pipeline.text_encoder = None
    pipeline.save_pretrained(checkpoint)
    assert kept.is_file()


@pytest.mark.parametrize("sampler", ["heun", "euler"])
def test_another_sampler_leaves_a_checkpoint_that_verifies(tmp_path: Path, sampler: str) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:turbo", device="cpu")
    pipeline.save_pretrained(tmp_path)
    pipeline.use_sampler(sampler, mu=1.0)
    pipeline.save_pretrained(tmp_path)
    assert LensPipeline.from_pretrained(tmp_path, verify=True, device="cpu").specs["sampler"].options["mu"] == 1.0


def put(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
