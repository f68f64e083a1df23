"""A run of two processes is the run of one: same batches, noise and weights; and either goes on with the other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from lens_data.imports import import_folder
from PIL import Image
from torch import Tensor

from lens_core import checkpoint
from lens_core.loop import Ranks
from lens_core.types import ConfigError

TESTS = Path(__file__).resolve().parents[1]
NAMES = pytest.mark.parametrize("name", sorted(rank_worker.METHODS))


def pictures(store: Path) -> None:
    """A training store of 48 pictures of four sizes."""
    folder = store.with_name("pictures")
    folder.mkdir()
    for n in range(48):
        height, width = [(16, 16), (16, 24), (24, 16), (32, 32)][n % 4]
        Image.new("RGB", (width, height), (5 * n, 255 - 5 * n, 99)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"number {n}")
    import_folder(str(store), folder)


def launch(folder: Path) -> None:
    """The worker twice, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "plugins")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "rank_worker.py"), str(folder)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(paths),
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(err[-2000:] for _, err in told)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `alone` and `pair`, each with a finished run of every method."""
    root = tmp_path_factory.mktemp("ranks")
    pictures(root / "store")
    rank_worker.METHODS["packed"]["dataset"]["store"] = os.environ["RANKS_STORE"] = str(root / "store")
    for name in rank_worker.METHODS:
        rank_worker.run(name, root / "alone" / name)
    launch(root / "pair")
    return root


def state(run: Path, step: int = 20) -> dict[str, Tensor]:
    return checkpoint.read_tensors(run / "checkpoints" / f"step-{step:07d}" / "state.safetensors")


def apart(a: dict[str, Tensor], b: dict[str, Tensor], kind: str) -> float:
    names = [n for n in a if n.startswith(kind)]
    assert names and a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in names)


@NAMES
def test_two_processes_end_with_the_weights_of_one(name: str, both: Path) -> None:
    one, two = state(both / "alone" / name), state(both / "pair" / name)
    for kind in ("net/", "ema/"):
        assert apart(one, two, kind) <= 1e-5
    begun = state(both / "alone" / name, 10)
    assert apart(begun, one, "net/") > 1e-3, "it must have learned, or being equal says nothing"


@NAMES
def test_they_tell_the_same(name: str, both: Path) -> None:
    logs = [
        [json.loads(line) for line in (both / where / name / "log.jsonl").read_text().splitlines()]
        for where in ("alone", "pair")
    ]
    assert len(logs[0]) == len(logs[1]) == 2  # one process writes
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        told = [k for k in a if "/" in k]
        assert [b[k] for k in told] == pytest.approx([a[k] for k in told], rel=1e-3, abs=1e-5)
    first, second = (json.loads((both / "pair" / name / f"rank-{r}.json").read_text()) for r in range(2))
    assert (first["world"], first["mine"], second["mine"]) == (2, [0], [1])
    assert first["said"] and not second["said"]


@NAMES
def test_a_run_of_two_goes_on_as_one(name: str, both: Path, tmp_path: Path) -> None:
    shutil.copytree(both / "pair" / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000020")
    shutil.rmtree(tmp_path / "run" / "model")
    rank_worker.run(name, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "rank-0.json").read_text())
    assert any(line.startswith("resumed at step 10") for line in told["said"])
    assert apart(state(both / "pair" / name), state(tmp_path / "run"), "net/") <= 1e-5


def test_the_parts_decide_and_not_only_the_batch(both: Path, tmp_path: Path) -> None:
    rank_worker.run("one", tmp_path / "run", parts=1)
    assert apart(state(both / "alone" / "one"), state(tmp_path / "run"), "net/") > 1e-4, "noise is drawn part by part"


class Fake:
    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")


def test_parts_are_shared_out_evenly() -> None:
    assert [list(Ranks(Fake(r, 2), 6).mine) for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert Ranks(Fake(1, 4), 1).parts == 4  # at least one each
    with pytest.raises(ConfigError, match="3 parts have no equal shares for 2 processes"):
        Ranks(Fake(0, 2), 3)
