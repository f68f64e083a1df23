"""The folder of a checkpoint: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_core.io import atomic_files
from lens_core.training import checkpointing


def test_a_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with checkpointing.atomic_directory(tmp_path / "final") as partial:
            partial.mkdir()
            (partial / text).write_text(text)
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_what_could_not_be_filled_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()

    def fill() -> None:
        with checkpointing.atomic_directory(tmp_path / "final") as partial:
            partial.mkdir()
            raise OSError(28, "No space left on device")

    with pytest.raises(atomic_files.WriteError):
        fill()
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_checkpoints_are_listed_by_step_and_none_is_none(tmp_path: Path) -> None:
    assert checkpointing.folders(tmp_path) == [] and checkpointing.newest(tmp_path, print) is None
    for step in (500, 20):
        (tmp_path / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000020-good").mkdir()  # a copy that somebody has made
    (tmp_path / "checkpoints" / "step-notes.txt").touch()
    (tmp_path / "checkpoints" / "step-0000030").touch()
    assert [checkpointing.step_of(folder) for folder in checkpointing.folders(tmp_path)] == [20, 500]
