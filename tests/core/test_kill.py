"""Kill it anywhere, resume, and the run is bit for bit the uninterrupted one: real processes, real SIGKILLs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kill_worker.py` saw: one whole run, and many that were killed once or several times and went on."""
    paths = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, str(ROOT / "tests" / "kill_worker.py"), str(tmp_path_factory.mktemp("kill"))]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def killed(results: dict[str, Any], exporting: bool) -> list[dict[str, Any]]:
    """The runs that died while training, or while the finished model was written."""
    return [run for run in results["sweep"] if (run["newest"] == "step-0000006") is exporting]


def test_a_run_killed_while_it_trains_or_saves_ends_with_the_same_bytes(results: dict[str, Any]) -> None:
    runs = killed(results, exporting=False)
    assert {run["code"] for run in runs} == {-9}
    assert {run["newest"] for run in runs} == {"", "step-0000002", "step-0000004"}, "each had its own point of return"
    assert [(run["moment"], run["again"]) for run in runs if run["again"] or run["is"] != results["whole"]] == []


def test_a_checkpoint_half_written_is_not_seen(results: dict[str, Any]) -> None:
    # Three checkpoints were broken off in the middle of their tensors; what was found is always the one before.
    halves = [run["newest"] for run in killed(results, exporting=False) if run["change"] == "half"]
    assert halves == ["", "step-0000002", "step-0000004"]


def test_a_run_killed_while_it_writes_the_model_ends_with_the_same_bytes(results: dict[str, Any]) -> None:
    runs = killed(results, exporting=True)
    assert sum(run["change"] == "half" for run in runs) == 3 and {run["code"] for run in runs} == {-9}
    assert [(run["moment"], run["again"]) for run in runs if run["again"] or run["is"] != results["whole"]] == []


def test_a_run_killed_from_outside_again_and_again_ends_with_the_same_bytes(results: dict[str, Any]) -> None:
    assert set(results["random"]["codes"]) <= {-9, 0} and -9 in results["random"]["codes"]
    assert (results["random"]["again"], results["random"]["is"]) == (0, results["whole"])


def test_a_run_killed_during_an_evaluation_ends_with_the_bytes_of_one_without(results: dict[str, Any]) -> None:
    evaluations = results["evaluations"]
    assert evaluations["checkpoint"] == evaluations["plain"]
    assert {run["code"] for run in evaluations["runs"]} == {-9}
    assert {run["newest"] for run in evaluations["runs"]} == {"", "step-0000002", "step-0000004", "step-0000006"}
    assert [run for run in evaluations["runs"] if run["again"] or run["is"] != evaluations["is"]] == []
    assert [run["evaluations"] for run in evaluations["runs"]] == [[0, 2, 4, 6]] * len(evaluations["runs"])
