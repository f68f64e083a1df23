"""A checkpoint knows its files: a flipped bit, a missing file and an extra one are named, by command and at loading."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from lens_core.catalog import Catalog
from lens_core.checkpoints.integrity import check
from lens_core.checkpoints.manifest import read_manifest, resolve_uri
from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import read_json, write_json
from lens_core.types import CheckpointError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def installed(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: catalog))
    return catalog


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_lens_json_holds_the_hash_of_each_file(checkpoint: Path) -> None:
    files = read_json(checkpoint / "lens.json")["files"]
    there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert set(files) == there - {"lens.json", "README.md"}
    assert files == {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in files}


def test_a_checkpoint_as_it_was_written_passes(
    checkpoint: Path, installed: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "README.md").write_text("# Mine\n")  # a card is people's
    (checkpoint / "._lens.json").write_text("macOS")
    assert main(["check", str(checkpoint)]) == 0
    assert "4 files are as they were written" in capsys.readouterr().out
    LensPipeline.from_pretrained(checkpoint, catalog=installed, verify=True)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        (WEIGHTS, "flip", f"{WEIGHTS}: differs from the file that was written"),
        ("model_index.json", "flip", "model_index.json: differs"),
        (WEIGHTS, "remove", f"{WEIGHTS}: is missing"),
        ("vae/config.json", "add", "vae/config.json: is extra"),
        ("optimizer.safetensors", "add", "optimizer.safetensors: is extra"),
    ],
)
def test_what_differs_is_missing_or_is_extra_is_named(
    name: str, how: str, words: str, checkpoint: Path, installed: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / name
    {"flip": flip, "remove": Path.unlink, "add": lambda p: p.write_text("{}")}[how](path)
    assert main(["check", str(checkpoint)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and words in said[0] and "1 of its files are not as they should be" in said[1]
    with pytest.raises(CheckpointError, match=words.partition(":")[2]):
        LensPipeline.from_pretrained(checkpoint, catalog=installed, verify=True)


def test_a_flipped_bit_loads_where_nobody_asks(checkpoint: Path, catalog: Catalog) -> None:
    flip(checkpoint / WEIGHTS)
    LensPipeline.from_pretrained(checkpoint, catalog=catalog)


def test_without_hashes_what_is_known_is_said(
    checkpoint: Path, installed: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    about = read_json(checkpoint / "lens.json")
    del about["files"]
    write_json(checkpoint / "lens.json", about)
    assert main(["check", str(checkpoint)]) == 0
    assert "4 files are whole, as far as their formats say" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds no hashes, so nothing can be verified"):
        LensPipeline.from_pretrained(checkpoint, catalog=installed, verify=True)
    (checkpoint / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes()[:-5])
    assert main(["check", str(checkpoint)]) == 1
    assert WEIGHTS in capsys.readouterr().out


def test_a_file_that_was_there_before_is_no_part_of_what_is_saved(pipeline: LensPipeline, checkpoint: Path) -> None:
    (checkpoint / "client_secret.json").write_text("{}")
    pipeline.save_pretrained(checkpoint)
    files = read_json(checkpoint / "lens.json")["files"]
    assert "client_secret.json" not in files and WEIGHTS in files and len(files) == 4


@pytest.mark.parametrize(
    "files",
    [[], {"a": 1}, {"a": "0" * 63}, {"../a": "0" * 64}, {"/a": "0" * 64}, {"a/../b": "0" * 64}, {"": "0" * 64},
     {"a\nb": "0" * 64}, {"a\\b": "0" * 64}],
    ids=str,
)  # fmt: skip
def test_files_that_cannot_be_meant_are_refused(files: Any, checkpoint: Path, catalog: Catalog) -> None:
    write_json(checkpoint / "lens.json", read_json(checkpoint / "lens.json") | {"files": files})
    with pytest.raises(CheckpointError, match="its files are no paths with a SHA-256 each"):
        read_manifest(checkpoint, catalog)


@pytest.mark.parametrize("name", ["tiny:", "tiny:turbo"])
def test_the_embedded_checkpoints_are_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 0
    said = capsys.readouterr().out
    assert "files are " in said and LensPipeline.from_pretrained(name, parts=("sampler",)).version in said


def test_a_converted_checkpoint_is_as_it_was_written(tmp_path: Path) -> None:
    assert main(["convert", "tiny:", str(tmp_path / "a")]) == 0
    catalog = Catalog.installed()
    report = check(tmp_path / "a", read_manifest(tmp_path / "a", catalog))
    assert report.problems == [] and report.named is not None and report.named >= 9
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main(["check", str(tmp_path / "b")]) == 0
    assert resolve_uri(str(tmp_path / "b"), catalog) == tmp_path / "b"
