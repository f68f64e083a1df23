"""One writer a folder: the other is named, the dead do not count, and a disk without hard links is no obstacle."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.io import locks
from lens_core.io.atomic_files import WriteError
from lens_core.io.locks import LockedError, locked
from lens_core.io.system_files import is_system_file
from lens_core.recipe import ComponentSpec, Recipe, Training
from lens_core.training.trainer import Trainer

HOLD = """
import sys
from pathlib import Path
from lens_core.io.locks import LockedError, locked
try:
    with locked(Path(sys.argv[1]), "run"):
        print("held", flush=True)
        sys.stdin.read()
except LockedError:
    print("refused", flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that takes the lock of a folder, if it can, and holds it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def word(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of `tmp_path`."""
    process = start(tmp_path)
    assert word(process) == "held"
    with process:
        yield process
        process.kill()


def take(folder: Path) -> None:
    with locked(folder, "run"):
        pass


def rewrite(folder: Path, seconds_ago: float = 0.0, **changes: object) -> None:
    path = folder / locks.NAME
    owner = {**locks._self(), "token": "other", **changes}
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_the_owner_is_named_and_the_lock_goes_with_its_death(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(LockedError, match=rf"process {other.pid} on \S+ is writing to this run"):
        take(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended yet
    with locked(tmp_path, "run"):
        assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_given_back_after_a_failure_and_excludes_this_process_too(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path, "run"):
            with pytest.raises(LockedError, match=f"process {os.getpid()} "):
                take(tmp_path)
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()


def test_another_process_with_the_dead_ones_number_is_not_the_owner(tmp_path: Path) -> None:
    rewrite(tmp_path, started="1")
    take(tmp_path)


def test_on_another_machine_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(tmp_path, machine="another", host="node7", pid=1)
    with pytest.raises(LockedError, match=r"process 1 on node7 .*last sign of life \d+ s ago"):
        take(tmp_path)
    rewrite(tmp_path, locks.STALE + 1, machine="another", host="node7", pid=1)
    monkeypatch.setattr(locks, "RENEW", 0.01)
    with locked(tmp_path, "run"):
        os.utime(tmp_path / locks.NAME, (0, 0))
        until = time.monotonic() + 60
        while (tmp_path / locks.NAME).stat().st_mtime == 0:
            assert time.monotonic() < until, "no sign of life was given"
            time.sleep(0.01)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "[" * 4000])
def test_a_lock_that_names_no_owner_counts_for_a_while(text: str, tmp_path: Path) -> None:
    (tmp_path / locks.NAME).write_text(text)
    with pytest.raises(LockedError, match=str(tmp_path)):
        take(tmp_path)
    os.utime(tmp_path / locks.NAME, (0, 0))
    take(tmp_path)


def test_a_disk_without_hard_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path, "run"), pytest.raises(LockedError, match=f"process {os.getpid()} "):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match="cannot be written") as caught:
            take(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(WriteError, match="cannot be written"):
        take(Path("/proc/nowhere"))


def test_of_many_who_find_a_dead_owner_one_gets_the_lock(tmp_path: Path) -> None:
    rewrite(tmp_path, started="1")
    many = [start(tmp_path) for _ in range(4)]
    assert sorted(map(word, many)) == ["held", "refused", "refused", "refused"]
    for process in many:
        process.communicate()


@pytest.mark.parametrize(
    ("path", "system"),
    [
        ("._a.png", True), ("sub/._model.safetensors", True), ("__MACOSX/a.png", True), ("a/.DS_Store", True),
        ("Thumbs.db", True), ("a/desktop.ini", True), ("a.png", False), ("_a.png", False), (".a.png", False),
        ("a._b.png", False), ("a/b.png", False), (".", False),
    ],
)  # fmt: skip
def test_what_operating_systems_leave_behind_is_known(path: str, system: bool) -> None:
    assert is_system_file(path) is system


def test_a_run_has_one_writer_and_the_log_is_not_doubled(
    other: subprocess.Popen[str], tmp_path: Path, catalog: Catalog
) -> None:
    train = Training(steps=2, log_every=1)
    plan = Recipe(method=ComponentSpec("fit"), dataset=ComponentSpec("squares"), train=train, pipeline=toy.NARROW)
    with pytest.raises(LockedError, match=f"process {other.pid} on"):
        Trainer(plan, catalog, tmp_path, log=lambda line: None).train()
    assert [p.name for p in tmp_path.iterdir()] == [locks.NAME]
    other.kill()
    other.wait()
    Trainer(plan, catalog, tmp_path, log=lambda line: None).train()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / locks.NAME).exists()


def test_training_where_nothing_can_be_written_ends_in_one_line(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: catalog))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{method: fit, dataset: squares, train: {steps: 1}, "
        "pipeline: {vae: blocks, text_encoder: letters, backbone: mixer, sampler: even, steps: 2}}"
    )
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        assert main(["train", str(recipe), "--output", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"lens: {out}: cannot be written: ")
