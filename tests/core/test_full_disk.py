"""A full disk: one clear line, the checkpoints before it whole, and a run that goes on once there is room."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, Evaluation, LoraSpec, Recipe, Training
from lens_core.training.trainer import Trainer
from lens_core.types import CheckpointError

RECIPE = Recipe(
    method=ComponentSpec("fit"),
    dataset=ComponentSpec("squares"),
    train=Training(steps=6, lr=1e-2, ema_decay=0.9, save_every=2, log_every=1, keep_checkpoints=1),
    pipeline=evolve(toy.NARROW, steps=2),
    seed=3,
    evaluation=Evaluation(
        every=1, size=(16, 16), prompts=("red",), benchmarks=(ComponentSpec("reds"),), keep_best="reds"
    ),
)
CATALOG = Catalog.of(toy)


def run(out: Path, plan: Recipe = RECIPE) -> Trainer:
    return Trainer(plan, CATALOG, out, log=lambda line: None)


def state(out: Path) -> dict[str, Tensor]:
    return tensor_files.read_tensors(out / "checkpoints" / "step-0000006" / "state.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    run(out).train()
    return out


def full(error: int = errno.ENOSPC) -> OSError:
    return OSError(error, os.strerror(error))


@pytest.fixture
def brim(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Once there is a checkpoint, nothing whose path holds the word in this list can be brought to the disk."""
    words: list[str] = []
    fsync, rename, mkdir = os.fsync, Path.rename, Path.mkdir

    def stop(path: str) -> None:
        there = any((Path(p) / "checkpoints" / "step-0000002").is_dir() for p in (path, *map(str, Path(path).parents)))
        if there and any(word in path for word in words):
            raise full()

    def synced(handle: int) -> None:
        stop(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        stop(f"{target}<renamed>")
        return rename(self, target)

    def made(self: Path, *arguments: Any, **options: Any) -> None:
        stop(f"{self}<made>")
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "mkdir", made)
    return words


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("state.safetensors", "state.safetensors"),
        ("state.json", "state.json"),
        ("sums.json", "sums.json"),
        ("step-0000004<renamed>", "checkpoints/step-0000004"),
        (".partial<made>", "state.safetensors"),
        ("log.jsonl", "log.jsonl"),
        ("evaluations.jsonl", "evaluations.jsonl"),
        ("/samples/", "samples/step-0000002.png"),
        ("/best/", "best/step-000000"),
    ],
)
def test_a_disk_that_fills_up_while_a_run_goes_on(
    word: str, named: str, plain: Path, brim: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )  # always better: the best is written at every evaluation
    monkeypatch.setattr(toy.Reds, "score", lambda self, images, prompts: [toy.Score("ok", next(scores))] * len(prompts))
    brim.append(word)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path).train()
    (line,) = str(error.value).splitlines()
    assert named in line
    assert "cannot be written: No space left on device; make room, or choose another output; " in line
    assert line.endswith("step-0000002 is whole, and the same command goes on from it")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"], "and no room is held"
    assert [p.name for p in tmp_path.rglob(".*")] == []
    brim.clear()
    assert run(tmp_path).train().steps == 6
    same(state(plain), state(tmp_path))


@pytest.mark.parametrize("word", ["/.model.partial/transformer", "lens.json", "/model<renamed>", "pytorch_lora"])
def test_a_disk_that_fills_up_while_the_model_is_written(word: str, brim: list[str], tmp_path: Path) -> None:
    plan = evolve(
        RECIPE, evaluation=None, train=evolve(RECIPE.train, lora={"backbone": LoraSpec(rank=2)}, keep_checkpoints=9)
    )
    brim.append(word)
    with pytest.raises(CheckpointError, match=r"No space left .* step-0000006 is whole"):
        run(tmp_path, plan).train()
    assert not (tmp_path / "model").exists() and not (tmp_path / ".model.partial").exists()
    brim.clear()
    report = run(tmp_path, plan).train()
    assert report.model is not None and (report.model / "lens.json").is_file()


@contextmanager
def room(size: int) -> Iterator[None]:
    """The system itself lets no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_system_refuses_is_reported_in_one_line(plain: Path, tmp_path: Path) -> None:
    with room(1200), pytest.raises(CheckpointError) as error:
        run(tmp_path, evolve(RECIPE, evaluation=None)).train()
    where = tmp_path / "checkpoints" / ".step-0000002.partial" / "state.safetensors"
    assert str(error.value) == (
        f"{where}: cannot be written: File too large; make room, or choose another output; nothing was saved yet"
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
    same(state_of(tmp_path), state(plain))


def state_of(out: Path) -> dict[str, Tensor]:
    run(out, evolve(RECIPE, evaluation=None)).train()
    return state(out)


def test_a_log_that_is_torn_in_the_middle_of_a_line_is_mended(tmp_path: Path) -> None:
    plan = evolve(RECIPE, evaluation=None, train=evolve(RECIPE.train, save_every=1))
    run(tmp_path, evolve(plan, train=evolve(plan.train, steps=3))).train()
    log = tmp_path / "log.jsonl"
    size = log.stat().st_size
    again = Trainer(plan, CATALOG, tmp_path, log=lambda line: None, allow_changed=True)
    with room(size + 20), pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be written: File too large"):
        atomic_files.append(log, {"step": 4, "words": "x" * 100})
    assert log.stat().st_size == size + 20, "half a line is there"
    again.train()
    assert [line["step"] for line in atomic_files.read_log(log)] == [1, 2, 3, 4, 5, 6]
    assert len(log.read_text().splitlines()) == 6


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x\.json: cannot be written: .*; choose another output"):
        atomic_files.write_json(tmp_path / "file" / "x.json", {})
