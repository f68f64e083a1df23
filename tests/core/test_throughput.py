"""What a run tells of itself: pace, waiting, memory, trackers; and the steps that it does not take."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from attrs import evolve

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.recipe import ComponentSpec, Evaluation, LoraSpec, Recipe, Training
from lens_core.training import spikes as spikess
from lens_core.training import throughput
from lens_core.training.spikes import SpikeDetector
from lens_core.training.step import flops
from lens_core.training.throughput import Throughput, TimedLoader, memory, peak
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, Loss, NumericalError

RECIPE = Recipe(
    method=ComponentSpec("fit"),
    dataset=ComponentSpec("squares"),
    train=Training(steps=6, lr=1e-2, save_every=2, log_every=2),
    pipeline=evolve(toy.NARROW, steps=2),
    seed=3,
)


def recipe(**train: Any) -> Recipe:
    return evolve(RECIPE, train=evolve(RECIPE.train, **train))


def run(plan: Recipe, out: Path, said: list[str] | None = None) -> Trainer:
    return Trainer(plan, Catalog.of(toy), out, log=(said if said is not None else []).append)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---- pace -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "monotonic", clock)
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    return clock


def test_rates_are_of_the_time_since_the_last_line_without_evaluations(clock: Clock) -> None:
    def batches() -> Any:
        while True:
            clock.now += 1
            yield Batch(None, ("a", "b", "c"))

    feed, pace = TimedLoader(), Throughput(step=10)
    stream = feed.through(batches())
    for _ in range(2):  # each step: 1 s for its batch, 3 s of work
        next(stream)
        clock.now += 3
    assert pace.line(12, feed, world=2) == {"steps_per_second": 0.25, "samples_per_second": 1.5, "data_wait": 0.25}
    next(stream)
    clock.now += 50  # an evaluation
    pace.excluded += 50
    assert pace.line(13, feed, world=1) == {"steps_per_second": 1.0, "samples_per_second": 3.0, "data_wait": 1.0}
    # 59 s for 3 steps, the evaluation included: 7 more at that pace
    assert pace.left(13, 20) == f"{59 / 3 * 7 / 60:.1f} min left"
    assert pace.left(13, 2013) == f"{59 / 3 * 2000 / 3600:.1f} h left"


def test_a_feed_ends_where_its_batches_end() -> None:
    feed = TimedLoader()
    assert len(list(feed.through(iter([Batch(None, ("a",)), Batch(None, ("b", "c"))])))) == 2
    assert feed.samples == 3


def test_a_method_that_reads_no_batch_reports_no_wait(clock: Clock) -> None:
    pace = Throughput(0)
    clock.now += 2
    assert pace.line(1, TimedLoader(), world=1) == {"steps_per_second": 0.5}


def test_what_is_computed_is_reported_a_second_and_of_the_most_that_is_known(clock: Clock) -> None:
    for most, rates in ((None, {"tflops": 3.0}), (4e12, {"tflops": 3.0, "mfu": 0.75})):
        pace = Throughput(0, most)
        pace.flops += 6e12
        clock.now += 2
        assert pace.line(1, TimedLoader(), world=8) == {"steps_per_second": 0.5, **rates}
        clock.now += 2
        assert pace.line(2, TimedLoader(), world=8) == {"steps_per_second": 0.5}, "the count begins anew at each line"


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-PCIE-40GB", 312e12),  # older drivers leave the maker out
        ("NVIDIA H200", 989e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A1000 6GB Laptop GPU", None),
        ("NVIDIA A1000", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 of tomorrow", None),
        ("", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_name_or_none(
    name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda")) == flops


def test_a_cpu_has_no_peak() -> None:
    assert peak(torch.device("cpu")) is None


def test_backward_counts_twice_as_far_as_weights_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        toy.Fit, "flops", lambda self, module_name, batch: {"backbone": 1e15, "critic": 0}[module_name], raising=False
    )
    full, adapted = (
        run(recipe(), tmp_path / "full"),
        run(recipe(lora={"backbone": LoraSpec(1, 1.0)}), tmp_path / "a"),
    )
    batch = [[None, None], [None]]  # two parts of a batch, of three micro-batches
    assert flops(full, "backbone", batch) == 9e15 and flops(full, "critic", batch) == 0
    names = dict(adapted.modules["backbone"].named_parameters())
    share = sum(p.numel() for k, p in names.items() if "lora_" in k) / sum(p.numel() for p in names.values())
    assert flops(adapted, "backbone", batch) == pytest.approx(3e15 * (2 + share)) and 0 < share < 1
    full.train()
    assert all(line["tflops"] > 1 for line in log(tmp_path / "full"))


def test_memory_is_the_peak_of_this_process() -> None:
    before = memory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 200 MB, all of it touched
    after = memory(torch.device("cpu"))
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line)
    assert before is not None and after is not None and after >= before and held[-1] == 1
    assert after == pytest.approx(int(status["VmHWM"].split()[0]) * 1024 / 1e9, rel=0.05)


def test_a_line_tells_pace_memory_and_losses(tmp_path: Path) -> None:
    said: list[str] = []
    run(recipe(), tmp_path, said).train()
    for line in log(tmp_path):
        assert {"step", "seconds", "steps_per_second", "samples_per_second", "data_wait", "memory_gb"} <= line.keys()
        assert line["samples_per_second"] == pytest.approx(4 * line["steps_per_second"], rel=1e-3, abs=2e-3)
        assert 0 <= line["data_wait"] <= 1 and "backbone/skipped" not in line
    (line,) = (line for line in said if line.startswith("step 2/6  "))
    assert "steps/s" in line and " min left" in line  # the other figures are in log.jsonl alone


# ---- spikes ---------------------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_median_of_the_steps_before() -> None:
    spikes = SpikeDetector(3.0, ("a", "b"))
    norms = [1.0 + 0.1 * (n % 5) for n in range(spikess.LEAST - 1)]
    assert [spikes.fault("a", 1.0, n) for n in [100.0, *norms][: spikess.LEAST]] == [None] * spikess.LEAST
    usual = statistics.median([100.0, *norms])
    assert spikes.fault("a", 1.0, 3.0 * usual) is None
    assert spikes.fault("a", 1.0, 3.01 * usual + 1) is not None
    assert spikes.fault("a", 4.0, usual) == "a loss of 4, 4.0 times the usual one"
    assert spikes.fault("b", 4.0, 1e9) is None, "each module has its own"
    assert (spikes.row, spikes.skipped) == ({"a": 2, "b": 0}, {"a": 2, "b": 0})
    assert spikes.fault("a", 1.0, 1.0) is None and (spikes.row["a"], spikes.skipped["a"]) == (0, 2)


def test_losses_around_zero_are_no_measure() -> None:
    spikes = SpikeDetector(3.0, ("a",))
    for n in range(40):
        assert spikes.fault("a", (-1) ** n * 0.01, 1.0) is None
    assert spikes.fault("a", 5.0, 1.0) is None and spikes.fault("a", 0.0, 5.0) is not None


def test_without_a_factor_only_what_is_not_finite_is_bad() -> None:
    spikes = SpikeDetector(0.0, ("a",))
    assert [spikes.fault("a", 1.0, 1.0) for _ in range(50)] == [None] * 50
    assert spikes.fault("a", 1e9, 1e9) is None
    assert all(spikes.fault("a", *pair) for pair in ((math.nan, 1.0), (1.0, math.inf)))
    assert spikes.usual["a"]["loss"] == [], "and nothing is kept"


def test_the_history_is_of_the_last_good_steps() -> None:
    spikes = SpikeDetector(3.0, ("a",))
    for n in range(spikess.HISTORY + 30):
        spikes.fault("a", 1.0, 1.0 + n / 1000)
    spikes.fault("a", 1.0, 99.0)
    kept = spikes.usual["a"]["gradient"]
    assert (len(kept), kept[0], kept[-1]) == (spikess.HISTORY, 1.03, 1.129)


@pytest.fixture
def spiky(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone's losses 23 and 26 are a thousand times as large."""
    plain = toy.Fit.loss

    def loss(self: toy.Fit, module_name: str, *arguments: Any) -> Loss:
        loss = plain(self, module_name, *arguments)
        return Loss(loss.total * 1000) if module_name == "backbone" and self.count - 1 in (23, 26) else loss

    monkeypatch.setattr(toy.Fit, "loss", loss)


@pytest.mark.usefixtures("spiky")
def test_a_spike_is_skipped_counted_and_does_not_move_the_weights(tmp_path: Path) -> None:
    said: list[str] = []
    plan = recipe(steps=28, save_every=1, keep_checkpoints=99, spike=20.0)
    run(plan, tmp_path, said).train()

    def weight(step: int) -> torch.Tensor:
        path = tmp_path / "checkpoints" / f"step-{step:07d}" / "state.safetensors"
        return tensor_files.read_tensors(path)["net/backbone/inner.weight"]

    moved = [step for step in range(1, 28) if not torch.equal(weight(step), weight(step + 1))]
    assert sorted(set(range(1, 28)) - set(moved)) == [23, 26]
    assert sum("backbone has a loss of" in line and "skipped (1 in a row)" in line for line in said) == 2
    assert log(tmp_path)[-1]["backbone/skipped"] == 2
    with pytest.raises(NumericalError, match="1 bad steps in a row of backbone at step 23: a loss of"):
        run(recipe(steps=28, spike=20.0, max_skipped_steps=1), tmp_path / "b").train()


@pytest.mark.usefixtures("spiky")
def test_what_is_usual_is_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipe(steps=28, save_every=11, spike=20.0)
    run(plan, tmp_path / "whole").train()
    monkeypatch.setattr(toy.Fit, "halt", staticmethod(lambda: exec("raise MemoryError")))
    killed = run(plan, tmp_path / "killed")
    killed.method.config = toy.Fit.Config(stop=25)  # between the spikes; it goes on at 22, just before the first
    with pytest.raises(MemoryError):
        killed.train()
    run(plan, tmp_path / "killed").train()
    for name in ("state.safetensors", "state.json"):
        whole, again = (tmp_path / n / "checkpoints" / "step-0000028" / name for n in ("whole", "killed"))
        assert whole.read_bytes() == again.read_bytes()
    assert json.loads(whole.with_name("state.json").read_text())["spikes"]["skipped"] == {"backbone": 2, "critic": 0}


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    plan = evolve(recipe(save_every=1, max_skipped_steps=3), method=ComponentSpec("fit", {"bad": [1, 2, 3]}))
    with pytest.raises(NumericalError):
        run(plan, tmp_path).train()
    with pytest.raises(NumericalError, match="3 bad steps in a row of backbone at step 3"):
        run(plan, tmp_path).train()  # which goes on at step 3, after two


def test_a_factor_must_be_above_one() -> None:
    with pytest.raises(ConfigError, match=r"spike: must be above 1, or 0, not 0\.5"):
        Training(steps=1, spike=0.5)


# ---- trackers -------------------------------------------------------------------------------------------------------


class Fake(GeneralTracker):  # type: ignore[misc]  # accelerate is not typed
    name, requires_logging_directory = "fake", False
    logged: list[tuple[int, dict[str, float]]]
    config: dict[str, Any]
    finished = 0
    broken = False

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        Fake.logged, Fake.finished = [], 0

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Fake.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.broken:
            raise OSError("no route to host")
        Fake.logged.append((step or 0, values))

    def finish(self) -> None:
        Fake.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(Fake, "broken", False)
    return Fake


def test_a_tracker_logs_what_the_log_holds_and_the_evaluations(fake: type[Fake], tmp_path: Path) -> None:
    evaluation = Evaluation(every=6, size=(16, 16), benchmarks=(ComponentSpec("reds"),))
    run(evolve(recipe(trackers=("fake",)), evaluation=evaluation), tmp_path).train()
    lines = {line.pop("step"): line for line in log(tmp_path)}
    logged = [(step, values) for step, values in fake.logged if "steps_per_second" in values]
    assert dict(logged) == lines and [step for step, _ in logged] == [2, 4, 6]
    seen = [(step, values["evaluation/reds"]) for step, values in fake.logged if "evaluation/reds" in values]
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert seen == [(line["step"], line["reds"]) for line in evaluations] and len(seen) == 2
    assert fake.config["train.lr"] == 1e-2 and fake.config["evaluation.every"] == 6
    assert fake.finished == 1


def test_a_tracker_that_fails_stops_nothing(fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "broken", True)
    said: list[str] = []
    assert run(recipe(trackers=("fake",)), tmp_path, said).train().steps == 6
    messages = [line for line in said if "the tracker" in line]
    assert (
        messages == ["the tracker fake failed and is left out from now on: no route to host"]
        and len(log(tmp_path)) == 3
    )


def test_a_tracker_that_fails_as_it_ends_takes_nothing_away(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(self: Fake) -> None:
        raise ConnectionError("the service\nis down")

    monkeypatch.setattr(fake, "finish", finish)
    said: list[str] = []
    assert run(recipe(trackers=("fake",)), tmp_path, said).train().model == tmp_path / "model"
    assert "the tracker fake failed as it ended: the service is down" in said


def test_a_tracker_is_finished_where_a_run_breaks(fake: type[Fake], tmp_path: Path) -> None:
    plan = evolve(recipe(trackers=("fake",), max_skipped_steps=1), method=ComponentSpec("fit", {"bad": [0]}))
    with pytest.raises(NumericalError):
        run(plan, tmp_path).train()
    assert fake.finished == 1


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    message = r"trackers: tensorboard is not installed; pip install 'lens-t2i\[track\]', or leave it out"
    with pytest.raises(ConfigError, match=message):
        run(recipe(trackers=("tensorboard",)), tmp_path)
    with pytest.raises(ConfigError, match="trackers: wandb is not installed; pip install wandb, or leave it out"):
        run(recipe(trackers=("wandb",)), tmp_path)
    with pytest.raises(ConfigError, match=r"no tracker is called 'tensorbord'\. Did you mean 'tensorboard'\?"):
        run(recipe(trackers=("tensorbord",)), tmp_path)
