"""`lens doctor --check`: on a CPU, in small, all of it runs; what overruns is cut off, and what breaks is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lens_tools import gpu_check, gpu_report, gpu_training, timing
from lens_tools.gpu_check import CheckRequest
from lens_tools.gpu_latency import Subject, random_text
from lens_tools.gpu_training import Bench, Setup
from lens_tools.records import Records
from lens_tools.timing import distance, in_turn, ratio

from lens_core import Catalog
from lens_core.recipe import build
from lens_core.training.muon import block_matrices
from lens_core.types import ConfigError, LensError

SMALL: dict[str, Any] = {"device": "cpu", "small": True}


def test_the_whole_check_runs_on_a_cpu_and_keeps_what_it_measured(tmp_path: Path) -> None:
    """Each stage in its own process, as on a GPU; the tests for a GPU are represented by those of one name."""
    # Enough time for a busy machine: stages end when they are done.
    request = CheckRequest(tmp_path, 30.0, tests="packed_attention", **SMALL)
    summary = gpu_check.check(request)
    assert {name: stage["state"] for name, stage in summary["stages"].items()} == {
        "correctness": "finished", "latency": "finished", "training": "finished"
    }, (tmp_path / "log.txt").read_text()  # fmt: skip
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in summary["stages"]}
    assert [test["outcome"] for test in read["correctness"]["tests"].values()] == ["passed", "passed"]
    items = read["latency"]["items"]
    assert items["agreement 32x48"]["void"] == [] and items["agreement 32x48"]["lens, float32"] < 1e-4
    assert set(items["base 32x48"]["ways"]) == {"port", "lens", "compiled"}
    (setup,) = (item for item in read["training"]["items"].values() if "ways" in item)
    assert list(setup["ways"]) == list(gpu_training.WAYS) and all(
        way["images_per_s"] > 0 for way in setup["ways"].values()
    )
    page = (tmp_path / "report.md").read_text()
    assert "2 passed" in page and "| base 32x48 |" in page and "bucketed, compiled" in page


def test_a_stage_that_hangs_is_cut_off_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"

    def command(request: CheckRequest, stage: str, soft: float) -> list[str]:
        return [sys.executable, "-c", child if stage == "latency" else "raise SystemExit(3)"]

    monkeypatch.setattr(gpu_check, "stage_command", command)
    begun = time.monotonic()
    summary = gpu_check.check(CheckRequest(tmp_path, 0.15, ("latency", "training"), **SMALL))
    assert time.monotonic() - begun < 10
    states = {name: (stage["state"], stage["exit_code"]) for name, stage in summary["stages"].items()}
    assert states == {"latency": ("cut off", None), "training": ("failed", 3)}
    assert json.loads((tmp_path / "summary.json").read_text())["stages"].keys() == states.keys()


def test_an_item_that_breaks_costs_no_other_and_is_told_with_its_place(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.json", time.time() + 100)

    def broken(record: dict[str, Any]) -> None:
        record["before"] = 1.0
        raise ValueError("no\nroom")

    assert not records.run("a", broken)
    assert records.run("b", lambda record: record.update(x=float("nan")))
    assert not records.run("c", lambda record: record.update(x=1), need=1000)
    items = json.loads((tmp_path / "r.json").read_text())["items"]
    assert (
        items["a"]["before"] == 1
        and items["a"]["error"] == "ValueError: no room"
        and "broken" in items["a"]["where"][-1]
    )
    assert items["b"]["x"] is None and "1000 s needed" in items["c"]["skipped"]


def test_a_way_that_is_wrong_is_not_timed() -> None:
    from lens_tools import gpu_latency

    subject = Subject(Catalog.installed(), torch.device("cpu"), True)
    net = subject.compiled
    forward = net.forward
    net.forward = lambda x, t, text: 1.5 * forward(x, t, text)  # as a kernel that is off would
    record: dict[str, Any] = {}
    sound = gpu_latency.agreement(record, subject, (32, 48))
    assert set(sound) == {"port", "lens"} and record["void"] == ["compiled"]


@pytest.mark.parametrize(("change", "says"), [({"stages": ("speed",)}, "no stage is called 'speed'"), ({}, "no CUDA")])
def test_what_cannot_be_checked_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    if not change and torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ConfigError, match=says):
        gpu_check.check(CheckRequest(tmp_path, **change))


def test_rounds_take_turns_and_end_in_time() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    rounds = in_turn(runs, torch.device("cpu"), 4, 1)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba" + "ab" and len(rounds["a"]) == len(rounds["b"]) == 4
    slow = {"a": lambda: time.sleep(0.05)}
    assert len(in_turn(slow, torch.device("cpu"), 50, 0, lambda: 0.01)["a"]) == 1


def test_distances_and_ratios() -> None:
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    assert distance(torch.tensor([float("nan")]), torch.ones(1)) != 0
    assert ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_the_forecast_of_training_counts_what_adamw_holds() -> None:
    assert Setup(48, True, 16).bytes(10**9, 0, 1536) == 16 * 10**9
    kept, again = (Setup(48, c, 16).bytes(0, 1189, 1536) for c in (False, True))
    assert kept > 5 * again


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Catalog.installed(), torch.device("cpu"), True, Setup(1, False, 2), lambda: 100.0)


def test_a_way_of_training_that_is_wrong_is_not_timed_and_costs_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss would not tell: at random weights, that of wrong velocities is the same within a hundredth."""
    packed = bench.net.packed
    monkeypatch.setattr(bench.net, "packed", lambda xs, t, text: [0.9 * v for v in packed(xs, t, text)])
    chosen = {name: gpu_training.WAYS[name] for name in ("packed", "bucketed")}
    monkeypatch.setattr(gpu_training, "WAYS", chosen)
    record: dict[str, Any] = {}
    same = bench.samples([(64, 64)] * 2)
    bench_samples = lambda sizes: same  # noqa: E731  # one size: the reference is bucketed, and right
    monkeypatch.setattr(bench, "samples", bench_samples)
    bench.run(record, lambda: None)
    assert "from float32" in record["ways"]["packed"]["error"] and "images_per_s" in record["ways"]["bucketed"]


def test_muon_takes_the_place_of_adamw_and_moves_nothing(bench: Bench) -> None:
    samples = bench.samples([(64, 64)] * 2)
    before = [p.detach().clone() for p in bench.net.parameters()]
    bench.use_optimizer("adamw")
    bench.step(bench.net, samples, False)
    old = weakref.ref(next(iter(bench.optimizer.state.values()))["exp_avg"])
    bench.use_optimizer("muon")
    assert old() is None, "AdamW's moments stay in memory"
    bench.step(bench.net, samples, False)
    moments = [set(state) for state in bench.optimizer.state.values()]
    assert {"momentum_buffer"} in moments and {"step", "exp_avg", "exp_avg_sq"} in moments
    assert all(torch.equal(a, b) for a, b in zip(before, bench.net.parameters(), strict=True))


def test_muon_needs_no_more_memory_than_the_forecast_has_for_adamw() -> None:
    """A moment less for each matrix of the published backbone makes room for the copies of its largest group."""
    spec = gpu_training.recipe(False).pipeline.backbone
    assert spec is not None
    with torch.device("meta"):
        net: Any = build(Catalog.installed(), "backbone", spec, "it")[1](
            build(Catalog.installed(), "backbone", spec, "it")[2]
        )
    matrices = block_matrices(net, list(net.parameters()))
    groups: dict[Any, int] = {}
    for p in matrices:
        groups[p.shape] = groups.get(p.shape, 0) + p.numel()
    # Of the largest: the stack and the step in float32 (4 + 4 + 4), and in bfloat16 the iteration's two (2 + 2).
    assert 16 * max(groups.values()) < 2 * 4 * sum(p.numel() for p in matrices)


def test_a_report_of_what_a_killed_check_left_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text('{"items": {"build": {"error": "OutOfMemoryError: no room"}}}')
    page = gpu_report.report(tmp_path)
    assert "OutOfMemoryError" in page and "Training" not in page


def test_the_script_says_how_it_is_used() -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"
    out = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    assert "--minutes" in out and "--stages" in out


def test_random_text_knows_its_mask_on_the_host() -> None:
    rng = torch.Generator().manual_seed(0)
    text = random_text(2, 3, 5, 8, torch.device("cpu"), rng)
    assert text.host is not None and text.features.shape == (2, 3, 5, 8) and bool(text.host.all())


@pytest.mark.parametrize(
    ("device", "visible", "only"),
    [("cuda", None, None), ("cpu", None, None), ("cuda:1", None, "1"), ("cuda:1", "4, GPU-8f", "GPU-8f")],
)
def test_a_stage_sees_the_gpu_that_is_checked_alone(
    device: str, visible: str | None, only: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_check.visible_device(device) == ({} if only is None else {"CUDA_VISIBLE_DEVICES": only})


def test_the_events_that_time_a_run_are_on_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any = "of the current device") -> None:
            streams.append(stream)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    assert timing.seconds(lambda: None, torch.device("cuda:1")) == 0.5 and streams == ["cuda:1"] * 2


def test_what_did_not_fit_is_gone_before_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Activations:
        pass

    held: list[Any] = []
    freed: list[bool] = []

    def run_out(*_: Any) -> Any:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench: Any = object.__new__(Bench)
    bench.catalog, bench.device, bench.small, bench.setup = None, torch.device("cpu"), True, Setup(1, False, 2)
    bench.net = bench.compiled = torch.nn.Linear(1, 1)
    bench.optimizer = torch.optim.SGD(bench.net.parameters())
    bench._recipe, bench.samples, bench.time = (lambda: None), (lambda sizes: None), run_out
    bench.reference = lambda samples: (None, 0.0)
    monkeypatch.setattr(gpu_training.memory_estimate, "memory", lambda *_: ({}, 0, 0))
    monkeypatch.setattr(gpu_training, "free_memory", lambda: freed.append(held[-1]() is None))
    record: dict[str, Any] = {}
    with pytest.raises(LensError, match="out of memory"):
        bench.run(record, lambda: None)
    assert freed == [True] and record["ways"] == {"bucketed, compiled": {"error": "out of memory"}}
