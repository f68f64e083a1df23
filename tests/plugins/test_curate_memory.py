"""What keeps the memory of a curation from growing with the number of its records."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_curate import engine, parts, tables, worker
from lens_curate.curation import curate
from lens_curate.recipe import CurationSpec
from lens_curate.verdicts import verdicts
from lens_data.store import Store
from PIL import Image
from test_curate_duplicates import texture

from lens_core.config import structure


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Eight pictures in two tars; the last of each is the first once more."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for at, seed in enumerate((0, 1, 2, 0)):
                data = io.BytesIO()
                Image.fromarray(texture(4 * number + seed, 64)).save(data, "PNG")
                for ending, part in (("png", data.getvalue()), ("txt", f"Texture {seed}.".encode())):
                    info = tarfile.TarInfo(f"{at}.{ending}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
    return folder


def spec(folder: Path, *filters: Any) -> CurationSpec:
    return structure(CurationSpec, {"sources": [{"use": "tars", "path": str(folder)}], "filters": list(filters)})


def content(store: Path) -> list[Any]:
    rows = Store(str(store)).columns("id", "image", "brief", "dense").to_pylist()
    return [
        sorted((row["id"], row["image"], row["brief"], row["dense"]) for row in rows),
        sorted(map(str, verdicts(str(store)))),
    ]


def test_ids_that_begin_alike_change_nothing(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharp = {"use": "clarity", "keep": {"edge": {"min": 8}}}
    for name, digits in (("whole", 64), ("alike", 0)):
        for module in (parts, tables, worker):
            monkeypatch.setattr(module, "SHORT", digits or 1)
        if not digits:  # every id begins like every other
            monkeypatch.setattr(tables, "short_texts", lambda ids: "0123456789abcdef")
        curate(spec(tars), tmp_path / name, runner="serial")
        curate(spec(tars, sharp), tmp_path / name, runner="serial")  # which scores by ids
    assert content(tmp_path / "whole") == content(tmp_path / "alike")
    assert len(content(tmp_path / "whole")[0]) == 6


def test_a_task_asks_for_pictures_in_few_digits_and_gets_each_once(tars: Path, tmp_path: Path) -> None:
    one = worker.Worker(spec(tars), str(tmp_path / "store"))
    part = next(iter(one.sources[0].source.parts()))
    (records, *_) = [tables.load(answer.body) for answer in one.run([worker.PartTask(0, part)])]
    ids = records["id"].to_pylist()
    digits = tables.short_texts(tables.hex_array(ids[:2], 32))
    text = worker.dump_task([worker.PartTask(0, part, False, (), None, digits)])
    answers = [tables.load(answer.body) for answer in one.run(worker.load_task(text))]
    assert [table["id"].to_pylist() for table in answers] == [ids[:2]] and ids[3] == ids[0]
    many = tables.short_texts(np.frombuffer(np.random.default_rng(0).bytes(32_000), "S32"))
    assert len(worker.dump_task([worker.PartTask(0, part, False, (), None, many)])) < 17_000


def test_a_plan_is_bounded_by_its_text_and_keeps_all_processes_at_work() -> None:
    tasks = [f"{number} " + "x" * (1 << 20) for number in range(20)]
    waves = list(engine._waves(tasks, 4))
    assert [len(wave) for wave in waves] == [8, 8, 4] and [task for wave in waves for task in wave] == tasks
    assert [len(wave) for wave in engine._waves(tasks, 16)] == [16, 4]
    assert [len(wave) for wave in engine._waves(map(str, range(engine.WAVE + 1)), 4)] == [engine.WAVE, 1]
    assert list(engine._waves([], 4)) == []


FREED = """
import ctypes, sys
import numpy as np
from lens_curate import tables
if sys.argv[1] == "steady":
    tables.steady_memory()
del (large := [np.ones(16 << 20, np.uint8)])[:]  # from now on glibc alone would keep arrays of this size on its heap
arrays, kept = [], []
for _ in range(64):
    arrays.append(np.ones(1 << 20, np.uint8))
    kept.append(np.ones(100_000, np.uint8))
del arrays
class Info(ctypes.Structure):
    _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
print(getattr(libc.mallinfo2(), "8") >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_arrays_that_are_freed_leave_no_holes() -> None:
    if not hasattr(tables._glibc(), "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    free = {}
    for how in ("steady", "alone"):
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
        free[how] = json.loads(done.stdout)
    assert free["steady"] < 8 and free["alone"] > 48, free
