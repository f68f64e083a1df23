"""What a person sees while work goes on: live lines on a terminal, nothing elsewhere; a run's banner and headline."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from attrs import evolve
from stage_worker import run
from test_trainer import RECIPE, recipe

from lens_core.attribution import headline_of
from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.progress import hub_bars, print_line, progress, progress_bar
from lens_core.recipe import LoraSpec, Recipe
from lens_core.training import banner
from lens_core.training.trainer import Trainer
from lens_core.types import PluginError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; set inside the test, for pytest sets stderr anew after its fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_bar_is_drawn_on_a_terminal_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    assert list(progress("abc", "letter", desc="read", mininterval=0)) == ["a", "b", "c"]
    drawn = terminal.getvalue()
    assert "read:   0%" in drawn and "3/3" in drawn and "letter/s" in drawn
    assert drawn.endswith("\r") and not drawn.split("\r")[-2].strip(), "the line is cleared"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_nothing_is_drawn_where_stderr_is_no_terminal_or_by_further_processes(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO() if rank == "0" else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    assert list(progress(iter("ab"), "letter")) == ["a", "b"]
    with progress_bar(3, "step") as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_a_line_is_printed_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    with progress_bar(2, "step", mininterval=0) as bar:
        bar.update()
        print_line("evaluated")
    before, after = terminal.getvalue().split("evaluated\n")
    assert "1/2" in before and "1/2" in after


def test_a_benchmark_run_shows_what_it_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = watched(monkeypatch)
    run(tmp_path / "run")
    drawn = terminal.getvalue()
    assert "generate:   0%" in drawn and "/9 [" in drawn and "perceive:" in drawn


def test_loading_says_what_it_loads(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, catalog: Catalog) -> None:
    terminal = watched(monkeypatch)
    LensPipeline.from_pretrained(checkpoint, catalog=catalog)
    for part in ("vae", "text encoder", "backbone"):
        assert f"load {checkpoint} ({part})"[:60] in terminal.getvalue()


def test_without_a_terminal_only_lines_are_printed(
    catalog: Catalog, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Trainer(RECIPE, catalog, tmp_path / "run").train()
    printed = capfd.readouterr().err
    assert "\r" not in printed and "\x1b" not in printed and "%" not in printed
    assert printed.startswith("method    fit\n") and "\nstep 6/6  " in printed


def train(plan: Recipe, catalog: Catalog, folder: Path) -> tuple[Trainer, list[str]]:
    said: list[str] = []
    trainer = Trainer(plan, catalog, folder, log=said.append)
    trainer.train()
    return trainer, said


def test_a_run_begins_with_what_it_is(catalog: Catalog, tmp_path: Path) -> None:
    plan = recipe(lora={"backbone": LoraSpec(rank=2)}, ema_decay=0.0)
    said: list[str] = []
    trainer = Trainer(plan, catalog, tmp_path / "run", log=said.append)
    whole = sum(p.numel() for p in trainer.modules["backbone"].parameters())
    learned = sum(p.numel() for n, p in trainer.modules["backbone"].named_parameters() if ".lora_" in n)
    critic = sum(p.numel() for p in trainer.modules["critic"].parameters())
    trainer.train()
    rows = {line[:10].strip(): line[10:] for line in said if not line.startswith("step ")}
    assert [*rows] == [
        "method",
        "device",
        "precision",
        "learns",
        "optimizer",
        "data",
        "steps",
        "memory",
        "folder",
        "time",
    ]
    assert 0 < learned < whole
    assert rows["learns"] == f"backbone {learned} of {banner._count(whole)} (LoRA of rank 2), critic {critic}"
    assert rows["optimizer"] == "adamw, lr 0.01"
    assert rows["steps"] == "6 in all" and rows["folder"] == str(tmp_path / "run")
    assert rows["data"] == "squares" and rows["device"] == "cpu (1 threads)"
    assert rows["time"].endswith("evaluations come on top") and "for 3 steps" in rows["time"]


@pytest.mark.parametrize(
    ("precision", "fast", "hint"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_on_a_cpu_without_it_is_said_to_be_slow(
    precision: str, fast: bool, hint: bool, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banner, "has_fast_bfloat16", lambda device: fast)
    trainer = Trainer(recipe(precision=precision), catalog, tmp_path / "run", log=lambda line: None)
    (line,) = [line for line in banner.lines(trainer, 0) if line.startswith("precision")]
    assert ("--set train.precision=fp32" in line) is hint and line.split()[1].startswith(precision)
    assert not any("--set" in line for line in banner.lines(trainer, 1)), "a resumed run keeps its precision"


def test_what_muon_leaves_to_adamw_is_said(catalog: Catalog, tmp_path: Path) -> None:
    trainer = Trainer(recipe(optimizer="muon", lr=0.02), catalog, tmp_path / "run", log=lambda line: None)
    backbone: Any = trainer.modules["backbone"]
    backbone.blocks = lambda: [backbone]
    matrices = sum(p.numel() for p in backbone.parameters() if p.ndim == 2)
    (line,) = [line for line in banner.lines(trainer, 0) if line.startswith("optimizer")]
    part = f"muon for {matrices} of backbone, nothing of critic (no repeated blocks); adamw for all else; lr 0.02"
    assert line == f"optimizer {part}" and matrices > 0


def test_the_memory_is_that_of_weights_gradients_moments_and_averages(catalog: Catalog, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, catalog, tmp_path / "run", log=lambda line: None)
    nets = {id(net): net for net in (*trainer.pipeline.present().values(), *trainer.modules.values())}.values()
    weights = sum(4 * t.numel() for net in nets for t in (*net.parameters(), *net.buffers()))
    learned = sum(4 * p.numel() for net in trainer.modules.values() for p in net.parameters())
    averaged = sum(4 * t.numel() for t in trainer.pipeline.backbone.state_dict().values())
    assert banner._bytes(trainer) == weights + 3 * learned + averaged


def test_a_resumed_run_says_how_far_it_is(catalog: Catalog, tmp_path: Path) -> None:
    train(recipe(steps=4), catalog, tmp_path / "run")
    said: list[str] = []
    Trainer(recipe(steps=6), catalog, tmp_path / "run", log=said.append, allow_changed=True).train()
    assert "steps     6 in all, 4 of them made" in said


def test_the_terminal_shows_the_headline_and_the_log_has_everything(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.Fit, "headline", ("critic/grad_norm", "backbone/error"), raising=False)
    _, said = train(RECIPE, catalog, tmp_path / "run")
    *_, line = [line for line in said if line.startswith("step ")]
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    words = line.split("  ")
    shown = [f"critic/grad_norm {logged['critic/grad_norm']:.4g}", f"backbone/error {logged['backbone/error']:.4g}"]
    assert words[:3] == ["step 6/6", *shown] and "steps/s" in words[3] and "left" in words[4] and len(words) == 5
    assert {"backbone/loss", "backbone/grad_norm", "critic/loss", "samples_per_second", "data_wait"} <= logged.keys()


def test_without_a_headline_each_loss_is_shown(catalog: Catalog, tmp_path: Path) -> None:
    trainer, _ = train(evolve(RECIPE, train=evolve(RECIPE.train, steps=1)), catalog, tmp_path / "run")
    assert trainer.headline == ("backbone/loss", "critic/loss")


@pytest.mark.parametrize(
    "wrong", ["backbone/loss", (), ("other/loss",), (1,), tuple("backbone/loss" for _ in range(6))]
)
def test_a_headline_that_names_no_figures_is_refused(wrong: Any) -> None:
    method = type("Method", (), {"headline": wrong})()
    with pytest.raises(PluginError, match=r"Method\.headline .*at most 5 names of figures, MODULE/NAME, of backbone"):
        headline_of(method, ["backbone"])


def test_the_hubs_bars_are_off_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    assert not are_progress_bars_disabled()
    for stream, hidden in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with hub_bars():
            assert are_progress_bars_disabled() is hidden
        assert not are_progress_bars_disabled(), "as it was before"
