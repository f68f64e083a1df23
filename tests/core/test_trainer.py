"""The loop: exact resumption, isolation of modules, and what it does when numbers or files go bad."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve
from torch import Tensor

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints import manifest, tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, Evaluation, LoraSpec, PipelineSpec, Recipe, Training
from lens_core.training import checkpointing, optimizers
from lens_core.training.step import lr_factor
from lens_core.training.trainer import Trainer
from lens_core.types import (
    Batch,
    CheckpointError,
    ConfigError,
    LensError,
    Loss,
    NumericalError,
    TextFeatures,
)

RECIPE = Recipe(
    method=ComponentSpec("fit"),
    dataset=ComponentSpec("squares"),
    train=Training(steps=6, lr=1e-2, warmup=2, lr_decay_fraction=0.5, ema_decay=0.9, save_every=2, log_every=2),
    pipeline=toy.NARROW,
    seed=3,
)


def recipe(method: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return evolve(RECIPE, method=ComponentSpec("fit", method or {}), train=evolve(RECIPE.train, **train))


class Runner:
    """Runs recipes in a folder; `said` is what the loop had to say."""

    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self.catalog, self.folder = catalog, folder
        self.said: list[str] = []

    def run(self, plan: Recipe, name: str) -> Trainer:
        return Trainer(plan, self.catalog, self.folder / name, log=self.said.append)

    def state(self, name: str, step: int) -> dict[str, Tensor]:
        return tensor_files.read_tensors(self.folder / name / "checkpoints" / f"step-{step:07d}" / "state.safetensors")

    def model(self, name: str) -> dict[str, Tensor]:
        return tensor_files.read_weights(self.folder / name / "model" / "transformer")


@pytest.fixture
def runner(catalog: Catalog, tmp_path: Path) -> Runner:
    return Runner(catalog, tmp_path)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_model_can_be_read(runner: Runner, catalog: Catalog, tmp_path: Path) -> None:
    report = runner.run(recipe(steps=60, log_every=10, save_every=60, ema_decay=0.0), "a").train()
    log = lines(tmp_path / "a")
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["backbone/error"] < 0.8 * log[0]["backbone/error"]
    assert report.steps == 60 and report.model == tmp_path / "a" / "model"
    assert report.losses["backbone/loss"] == pytest.approx(log[-1]["backbone/loss"], abs=1e-6)
    drawn = LensPipeline.from_pretrained(report.model, catalog=catalog)("red", height=16, width=16, seed=0)
    assert drawn.images[0].size == (16, 16)


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_a_stopped_run_goes_on_bit_for_bit(stop: int, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.run(recipe(), "whole").train()
    # The recipe of the stopped run differs only in when it stops, so its method is told by monkeypatching.
    halted = runner.run(recipe(), "halted")
    halted.method.config = toy.Fit.Config(stop=stop)
    monkeypatch.setattr(toy.Fit, "halt", staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    report = halted.train()
    assert (report.steps, report.model) == (stop + 1, None)
    torch.manual_seed(99)  # whatever the next process's generators hold must not matter
    runner.run(recipe(), "halted").train()
    same(runner.state("whole", 6), runner.state("halted", 6))
    same(runner.model("whole"), runner.model("halted"))


def test_a_killed_run_goes_on_bit_for_bit_from_its_last_checkpoint(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(recipe(), "whole").train()
    killed = runner.run(recipe(), "killed")
    killed.method.config = toy.Fit.Config(stop=4)

    def kill() -> None:
        raise MemoryError

    monkeypatch.setattr(toy.Fit, "halt", staticmethod(kill))
    with pytest.raises(MemoryError):
        killed.train()
    runner.run(recipe(), "killed").train()
    assert any("resumed at step 4" in line for line in runner.said)
    same(runner.state("whole", 6), runner.state("killed", 6))
    same(runner.model("whole"), runner.model("killed"))


def test_where_no_checkpoint_can_be_read_none_is_lost(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner.run(recipe(), "a").train()
    there = sorted((tmp_path / "a" / "checkpoints").rglob("*"))
    monkeypatch.setattr("lens_core.training.checkpointing.SCHEMA", 99)
    runner.said.clear()
    message = r"none of its checkpoints can be read; choose a new --output or .* is of schema 2; this Lens reads 99"
    with pytest.raises(CheckpointError, match=message):
        runner.run(recipe(), "a").train()
    assert "is of schema 2; this Lens reads 99" in runner.said[0]
    assert sorted((tmp_path / "a" / "checkpoints").rglob("*")) == there


@pytest.mark.parametrize("damage", ["truncate", "halve", "empty", "zeros", "json", "gone", "bit", "number", "sums"])
def test_a_damaged_checkpoint_falls_back_on_the_one_before(damage: str, runner: Runner, tmp_path: Path) -> None:
    runner.run(recipe(), "whole").train()
    newest = tmp_path / "whole" / "checkpoints" / "step-0000006"
    before = runner.state("whole", 6)
    tensors, state = newest / "state.safetensors", newest / "state.json"
    whole = tensors.read_bytes()
    # zeros are what a power failure may leave: the length without the content
    damaged = {"truncate": whole[:-10], "halve": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}
    if damage in damaged:
        tensors.unlink()  # a new file: `before` still reads the old one
        tensors.write_bytes(damaged[damage])
    elif damage == "json":
        state.write_text(state.read_text()[:-10])
    elif damage == "gone":
        tensors.unlink()
    elif damage == "bit":  # in the middle of some weight: a sound file, with another number in it
        tensors.unlink()
        tensors.write_bytes(whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:])
    elif damage == "number":
        state.write_text(state.read_text().replace('"step": 6', '"step": 7'))
    else:
        (newest / "sums.json").unlink()
    runner.said.clear()
    runner.run(recipe(), "whole").train()
    assert "step-0000006" in runner.said[0] and "the one before it is used" in runner.said[0]
    assert "resumed at step 4" in runner.said[1]
    same(before, runner.state("whole", 6))


def test_files_that_a_desktop_leaves_in_a_checkpoint_are_no_damage(runner: Runner, tmp_path: Path) -> None:
    runner.run(recipe(), "a").train()
    (tmp_path / "a" / "checkpoints" / "step-0000006" / ".DS_Store").touch()
    runner.said.clear()
    runner.run(recipe(), "a").train()
    assert runner.said[0].startswith("resumed at step 6")


def test_a_finished_run_run_again_changes_nothing(runner: Runner) -> None:
    runner.run(recipe(), "a").train()
    before = runner.model("a")
    assert runner.run(recipe(), "a").train().steps == 6
    same(before, runner.model("a"))


def test_only_so_many_checkpoints_are_kept(runner: Runner, tmp_path: Path) -> None:
    runner.run(recipe(), "a").train()
    kept = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == ["step-0000004", "step-0000006"]


def test_the_seed_decides_everything(runner: Runner) -> None:
    runner.run(recipe(), "a").train()
    torch.manual_seed(99)
    runner.run(recipe(), "b").train()
    same(runner.state("a", 6), runner.state("b", 6))
    runner.run(evolve(recipe(), seed=4), "c").train()
    assert not torch.equal(runner.model("a")["inner.weight"], runner.model("c")["inner.weight"])


def test_a_checkpoint_that_cannot_be_finished_is_not_seen(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner.run(recipe(), "a")

    def full(path: Path, data: object) -> None:
        if path.name == "state.json":
            raise manifest.CheckpointError("full")
        write(path, data)

    write = atomic_files.write_json
    monkeypatch.setattr(atomic_files, "write_json", full)
    with pytest.raises(manifest.CheckpointError, match="full"):
        run.train()
    assert list((tmp_path / "a" / "checkpoints").glob("step-*")) == []


def test_only_the_updated_module_has_gradients(runner: Runner) -> None:
    run = runner.run(recipe(), "a")
    run.train()
    assert [module_name for module_name, _ in toy.Fit.seen[:3]] == ["critic", "backbone", "backbone"]
    assert all(learning == {module_name} for module_name, learning in toy.Fit.seen)
    assert not any(p.requires_grad for p in run.pipeline.vae.parameters())


def test_parts_that_are_not_trainable_do_not_change(runner: Runner) -> None:
    run = runner.run(recipe(), "a")
    before = run.pipeline.text_encoder.table.weight.clone()
    run.train()
    assert torch.equal(run.pipeline.text_encoder.table.weight, before)


def test_the_average_follows_its_closed_form(runner: Runner) -> None:
    run = runner.run(recipe(steps=3, save_every=1, keep_checkpoints=3), "a")
    average = run.modules["backbone"].inner.weight.detach().clone()
    run.train()
    for step in range(3):
        weight = runner.state("a", step + 1)["net/backbone/inner.weight"]
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(runner.state("a", step + 1)["ema/backbone/inner.weight"], average)
    torch.testing.assert_close(runner.model("a")["inner.weight"], average)


def test_a_non_finite_step_is_skipped_and_reported(runner: Runner, tmp_path: Path) -> None:
    runner.run(recipe({"bad": [1, 2]}, save_every=1, keep_checkpoints=9), "a").train()
    same_name = "net/backbone/inner.weight"
    one, two, three, four = (runner.state("a", n)[same_name] for n in (1, 2, 3, 4))
    assert torch.equal(one, two) and torch.equal(two, three) and not torch.equal(three, four)
    assert sum("backbone has a non-finite loss or gradient; skipped" in line for line in runner.said) == 2
    assert all(v == v for line in lines(tmp_path / "a") for v in line.values()), "no NaN is logged"


def test_too_many_non_finite_steps_in_a_row_stop_the_run(runner: Runner) -> None:
    # The critic's good turns in between must not hide that the backbone learns nothing.
    with pytest.raises(
        NumericalError, match=r"3 bad steps in a row of backbone at step 3: a non-finite loss .*; lower train\.lr"
    ):
        runner.run(recipe({"bad": [1, 2, 3]}, max_skipped_steps=3), "a").train()


def test_a_changed_recipe_is_refused_and_named(runner: Runner) -> None:
    runner.run(recipe(), "a").train()
    changes = r"\$\.train\.lr was 0\.01 and is 0\.001; \$\.train\.steps was 6 and is 8"
    message = rf"another recipe: {changes}\. Choose a new --output"
    with pytest.raises(ConfigError, match=message):
        runner.run(recipe(lr=1e-3, steps=8), "a").train()
    again = Trainer(
        recipe(lr=1e-3, steps=8), runner.catalog, runner.folder / "a", log=runner.said.append, allow_changed=True
    )
    assert again.train().steps == 8
    assert "changed, as allowed: $.train.lr was 0.01 and is 0.001" in runner.said
    runner.run(recipe(lr=1e-3, steps=8), "a").train()  # which is the run's recipe from now on


def changed(runner: Runner, plan: Recipe, name: str) -> Trainer:
    return Trainer(plan, runner.catalog, runner.folder / name, log=runner.said.append, allow_changed=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pipeline": evolve(toy.PARTS, backbone=ComponentSpec("mixer", {"width": 4}))},
            r"checkpoint's backbone is another network than the recipe's: inner\.bias is \[8\] there and \[4\] here",
        ),
        ({"dataset": ComponentSpec("ranks")}, r"checkpoint's dataset is another than the recipe's.*undo the change"),
    ],
)
def test_a_change_that_does_not_fit_the_checkpoint_is_one_line_and_leaves_the_run_its_recipe(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    class Counted(toy.Squares):
        def load_state_dict(self, state: Any) -> None:
            self.served = state["count"]

    counted = types.ModuleType("counted")
    counted.lens_datasets = hookimpl(lambda: {"ranks": Counted}, specname="lens_datasets")  # type: ignore[attr-defined]
    runner.catalog = Catalog.of(toy, counted)
    runner.run(recipe(steps=2), "a").train()
    before = (runner.folder / "a" / "recipe.json").read_bytes()
    with pytest.raises(CheckpointError, match=message) as caught:
        changed(runner, evolve(recipe(steps=4), **change), "a").train()
    assert len(str(caught.value).splitlines()) == 1
    assert (runner.folder / "a" / "recipe.json").read_bytes() == before
    runner.run(recipe(steps=2), "a").train()


def test_another_rank_of_lora_does_not_fit_the_checkpoint(runner: Runner) -> None:
    def plan(rank: int) -> Recipe:
        return recipe(steps=2, ema_decay=0.0, lora={"backbone": LoraSpec(rank=rank, targets=("inner",))})

    runner.run(plan(2), "a").train()
    with pytest.raises(CheckpointError, match="checkpoint's backbone is another network than the recipe's"):
        changed(runner, plan(4), "a").train()


def test_averages_that_begin_later_begin_at_the_weights_of_the_checkpoint(runner: Runner) -> None:
    runner.run(recipe(steps=2, ema_decay=0.0), "a").train()
    weights = runner.state("a", 2)
    run = changed(runner, recipe(steps=2, ema_decay=0.9), "a")
    run.train()
    for name, value in run.ema["backbone"].items():
        assert torch.equal(value, weights[f"net/backbone/{name}"])
    changed(runner, recipe(steps=4, ema_decay=0.9), "a").train()
    after = runner.state("a", 4)
    moved = [n for n in run.ema["backbone"] if not torch.equal(after[f"ema/backbone/{n}"], after[f"net/backbone/{n}"])]
    assert moved, "and then they follow"


def test_a_model_that_no_run_made_is_not_replaced_unasked(runner: Runner) -> None:
    mine = runner.folder / "a" / "model" / "mine.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"weeks of work")
    with pytest.raises(ConfigError, match=r"holds model/, but the recipe\.json of their run is missing.*replace it"):
        runner.run(recipe(steps=2), "a").train()
    assert mine.read_bytes() == b"weeks of work"
    changed(runner, recipe(steps=2), "a").train()
    (runner.folder / "a" / "recipe.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints/ and model/, .* go on with --allow-changed"):
        runner.run(recipe(steps=4), "a").train()
    assert changed(runner, recipe(steps=4), "a").train().steps == 4


def test_a_run_refuses_a_start_that_has_changed_since_it_began(runner: Runner) -> None:
    def start(seed: int) -> None:
        torch.manual_seed(seed)
        LensPipeline.from_parts(toy.NARROW, runner.catalog).save_pretrained(runner.folder / "start")

    adapter = {"backbone": LoraSpec(rank=2, targets=("inner",))}
    plan = recipe(steps=2, ema_decay=0.0, lora=adapter)
    plan = evolve(plan, pipeline=PipelineSpec(start=str(runner.folder / "start")))
    longer = evolve(plan, train=evolve(plan.train, steps=4))
    start(1)
    runner.run(plan, "a").train()
    start(2)  # the adapters were learned beside weights that are gone
    with pytest.raises(CheckpointError, match=r"stand on other weights.*start .*, whose hash was \w+ and is \w+;"):
        runner.run(plan, "a").train()
    assert changed(runner, longer, "a").train().steps == 4
    assert any(line.startswith("changed, as allowed: the start ") for line in runner.said)
    start(1)
    runner.said.clear()
    with pytest.raises(CheckpointError, match="stand on other weights"):
        runner.run(longer, "a").train()


def test_a_run_does_not_begin_in_its_own_start(runner: Runner) -> None:
    LensPipeline.from_parts(toy.NARROW, runner.catalog).save_pretrained(runner.folder / "start")
    plan = evolve(recipe(steps=2), pipeline=PipelineSpec(start=str(runner.folder / "start")))
    with pytest.raises(ConfigError, match=r"run: lies in the start checkpoint .*start, .* an --output elsewhere"):
        runner.run(plan, "start/run").train()
    assert not list((runner.folder / "start" / "run").glob("[!.]*")), "nothing is written"
    runner.run(plan, "start-run").train()


def test_a_run_may_write_below_a_folder_that_is_named_like_its_start_on_the_hub(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runner.folder)
    plan = evolve(recipe(steps=2), pipeline=PipelineSpec(start="org/name"))
    checkpointing.check_recipe(types.SimpleNamespace(out=Path("org/name/run"), recipe=plan), allow_changed=False)


def test_what_a_killed_save_left_is_removed_when_the_run_goes_on(runner: Runner) -> None:
    runner.run(recipe(steps=2), "a").train()
    partial = runner.folder / "a" / "checkpoints" / ".step-0000003.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(bytes(1000))
    changed(runner, recipe(steps=4), "a").train()
    assert sorted(p.name for p in partial.parent.iterdir()) == ["step-0000002", "step-0000004"]


def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(runner: Runner) -> None:
    runner.run(recipe(steps=2), "a").train()
    kept = runner.folder / "a" / "checkpoints" / "step-0000002-good"
    shutil.copytree(kept.with_name("step-0000002"), kept)
    changed(runner, recipe(steps=6, keep_checkpoints=1), "a").train()
    assert sorted(p.name for p in kept.parent.iterdir()) == ["step-0000002-good", "step-0000006"]


def test_a_method_with_nothing_to_learn_from_says_so(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.Fit, "steps", lambda *_: iter(()))
    with pytest.raises(LensError, match="nothing to learn from at step 0"):
        runner.run(recipe(), "a").train()


def test_bfloat16_keeps_float32_weights(runner: Runner) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about autocast on some CPUs
        runner.run(recipe(precision="bf16"), "a").train()
    assert {v.dtype for v in runner.model("a").values()} == {torch.float32}


def test_signals_are_given_back(runner: Runner) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    runner.run(recipe(), "a").train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    train = Training(steps=10, warmup=2, lr_decay_fraction=0.4)
    assert [lr_factor(train, s) for s in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [lr_factor(Training(steps=4), s) for s in range(4)] == [1.0] * 4
    assert [lr_factor(Training(steps=4, lr_decay_fraction=1.0), s) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = Training(steps=9, lr_decay_fraction=0.667, lr_schedule="cosine")
    assert [lr_factor(cosine, s) for s in (2, 3, 6)] == pytest.approx([1, 1, 0.5], abs=2e-3)
    with pytest.raises(ConfigError, match="lr_schedule: must be linear or cosine, not 'step'"):
        Training(steps=1, lr_schedule="step")


def test_activations_are_computed_again_where_a_module_can(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[object] = []
    monkeypatch.setattr(toy.Mixer, "enable_gradient_checkpointing", lambda net: enabled.append(net), raising=False)
    started = runner.run(recipe(activation_checkpointing=True), "a")
    assert enabled == [started.modules["backbone"]]
    assert runner.said == ["critic has no blocks to compute again; its activations are all kept"]


def test_a_module_can_have_its_own_learning_rate(runner: Runner) -> None:
    def moved(rates: dict[str, float], name: str) -> dict[str, Tensor]:
        run = runner.run(recipe(steps=1, warmup=0, ema_decay=0.0, lr_multipliers=rates), name)
        before = {
            module_name: torch.cat([p.detach().flatten() for p in net.parameters()])
            for module_name, net in run.modules.items()
        }
        run.train()
        return {
            module_name: torch.cat([p.detach().flatten() for p in net.parameters()]) - before[module_name]
            for module_name, net in run.modules.items()
        }

    plain, slow = moved({}, "a"), moved({"critic": 0.25}, "b")
    assert torch.equal(plain["backbone"], slow["backbone"])
    torch.testing.assert_close(slow["critic"], plain["critic"] * 0.25)  # Adam's first step is the rate itself
    with pytest.raises(
        ConfigError, match=r"train\.lr_multipliers: no trainable module is called 'critics'; there are backbone, critic"
    ):
        runner.run(recipe(lr_multipliers={"critics": 1.0}), "c")


def test_a_recipe_without_a_dataset_is_for_methods_that_read_none(runner: Runner) -> None:
    with pytest.raises(LensError, match=r"nothing to learn from at step 0; check \$\.dataset"):
        runner.run(evolve(RECIPE, dataset=None), "a").train()


# ---- numbers that are not finite ------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*"))


def endless(**train: Any) -> Recipe:
    """A recipe with numbers that its ranges would refuse: the loop must be safe by itself."""
    plan = recipe(ema_decay=0.0, warmup=0, lr_decay_fraction=0.0)
    for name, value in train.items():
        object.__setattr__(plan.train, name, value)
    return plan


@pytest.mark.parametrize("save_every", [1, 2, 4, 500])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("fault", [{"lr": 1e38}, {"lr": float("inf")}, {"max_grad_norm": float("nan")}])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    fault: dict[str, float], ema: float, save_every: int, runner: Runner, tmp_path: Path
) -> None:
    plan = endless(**fault, steps=4, save_every=save_every, ema_decay=ema)
    message = (
        r"of (backbone|critic) are not finite after step \d; they are not saved; lower train.lr; nothing was saved yet"
    )
    with pytest.raises(NumericalError, match=message):
        runner.run(plan, "a").train()
    assert not (tmp_path / "a" / "model").exists() and left(tmp_path / "a") == []


def poisoned(runner: Runner, monkeypatch: pytest.MonkeyPatch, after: int, value: float, **train: Any) -> Trainer:
    """A run whose weights become `value` in the step after `after` good ones."""
    run = runner.run(endless(**{"steps": 20, "save_every": 1, "keep_checkpoints": 1, **train}), "a")
    step = optimizers.apply_step

    def spoil(optimizer: torch.optim.Optimizer) -> None:
        step(optimizer)
        if run.step == after:
            with torch.no_grad():
                run.modules["backbone"].inner.weight.fill_(value)

    monkeypatch.setattr(optimizers, "apply_step", spoil)
    return run


def test_good_checkpoints_do_not_rotate_away_for_weights_that_are_not_finite(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NumericalError, match=r"not finite after step 4; .*step-0000003 is the last finite checkpoint"):
        poisoned(runner, monkeypatch, 3, math.nan, keep_checkpoints=2).train()
    assert left(tmp_path / "a") == ["step-0000002", "step-0000003"]


def test_good_checkpoints_do_not_rotate_away_for_finite_weights_without_a_finite_loss(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights of 1e38 are finite; what comes of them is not, which the next step shows, after they were saved."""
    monkeypatch.setattr(torch, "tanh", lambda x: x)
    message = (
        "3 bad steps in a row of backbone .* step-0000003 is the last checkpoint that gave finite losses: move the"
    )
    with pytest.raises(NumericalError, match=message):
        poisoned(runner, monkeypatch, 3, 1e38, max_skipped_steps=3).train()
    assert "step-0000003" in left(tmp_path / "a")
    for newer in left(tmp_path / "a"):
        if newer > "step-0000003":
            shutil.rmtree(tmp_path / "a" / "checkpoints" / newer)
    monkeypatch.undo()
    assert runner.run(endless(steps=20, save_every=1, keep_checkpoints=1, max_skipped_steps=3), "a").train().steps == 20
    assert left(tmp_path / "a") == ["step-0000020"]


def test_a_run_that_ends_without_a_finite_loss_exports_nothing(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "tanh", lambda x: x)
    for _ in range(2):  # the same command again finds no more to export
        with pytest.raises(
            NumericalError, match="the last 2 steps of backbone had no finite loss, so it is not exported"
        ):
            poisoned(runner, monkeypatch, 3, 1e38, steps=6).train()
    assert not (tmp_path / "a" / "model").exists() and "step-0000003" in left(tmp_path / "a")


def test_the_advice_fits_the_precision(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, words in (("fp32", "lower train.lr; "), ("bf16", "lower train.lr, or use precision: fp32; ")):
        run = runner.run(endless(lr=math.inf, precision=precision), precision)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about autocast on some CPUs
            with pytest.raises(NumericalError, match=words):
                run.train()


# ---- what a step is made of -----------------------------------------------------------------------------------------


class Slopes(toy.Fit):
    """Method: part n of a step has the micro-batches `given[n]`, of (slope, weight): the loss's gradient is the slope
    in every weight. `updates` are the sums that it got."""

    micro_batch_losses: tuple[tuple[tuple[float, float | None], ...], ...] = ()

    def __init__(self, config: Any, pipeline: Any) -> None:
        super().__init__(config, pipeline)
        self.updates: list[tuple[float, float]] = []
        self.opened = 0

    def trainable_modules(self) -> dict[str, Any]:
        return {"backbone": self.pipeline.backbone}

    def update_order(self, step: int) -> list[str]:
        return ["backbone"]

    def steps(self, batches: Any, modules: Any, rng: torch.Generator) -> Any:
        mine = Slopes.micro_batch_losses[self.opened]
        self.opened += 1
        for _ in batches:
            yield mine

    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        slope, weight = batch
        total = slope * torch.stack([p.sum() for p in modules[module_name].parameters()]).sum()
        about = torch.tensor([slope, 1.0])
        return Loss(total - total.detach() + slope, {"twice": torch.tensor(2.0 * slope)}, weight, {"about": about})

    def after_update(self, module_name: str, modules: Any, sums: Any) -> None:
        self.updates.append(tuple(sums["about"].tolist()))


plugin = types.ModuleType("slopes")
plugin.lens_methods = hookimpl(lambda: {"slopes": Slopes}, specname="lens_methods")  # type: ignore[attr-defined]


def sloping(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *micro_batch_losses: Any, steps: int = 1, bad_steps: int = 9
) -> tuple[Trainer, dict[str, float]]:
    monkeypatch.setattr(Slopes, "micro_batch_losses", micro_batch_losses)
    train = Training(
        steps=steps,
        lr=1e-3,
        max_grad_norm=0.0,
        micro_batches=len(micro_batch_losses),
        log_every=1,
        max_skipped_steps=bad_steps,
    )
    run = Trainer(
        evolve(RECIPE, method=ComponentSpec("slopes"), train=train),
        Catalog.of(toy, plugin),
        folder,
        log=lambda line: None,
    )
    run.train()
    return run, lines(folder)[-1]


def slope(run: Trainer) -> float:
    (value,) = {round(float(v), 5) for p in run.trainable_parameters["backbone"] for v in p.grad.flatten()}
    return value


def test_a_step_is_the_mean_over_its_parts_of_the_means_of_their_micro_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    micro_batch_losses = (((1.0, None), (2.0, None), (6.0, None)), ((8.0, None),))
    run, line = sloping(tmp_path, monkeypatch, *micro_batch_losses)
    assert slope(run) == 5.5 and (line["backbone/loss"], line["backbone/twice"]) == (5.5, 11.0)


def test_losses_that_bring_a_weight_count_by_it_however_they_are_divided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a, b, c = (1.0, 10.0), (2.0, 20.0), (6.0, 70.0)
    for name, micro_batch_losses in {"one": [(a, b, c)], "two": [(a,), (b, c)], "other": [(c, a), (b,)]}.items():
        run, line = sloping(tmp_path / name, monkeypatch, *micro_batch_losses)
        assert slope(run) == 4.7 and (line["backbone/loss"], line["backbone/twice"]) == (4.7, 9.4)


def test_losses_of_which_some_bring_no_weight_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        LensError, match="slopes: of the losses of backbone, some have a weight and some have none at step 0"
    ):
        sloping(tmp_path / "a", monkeypatch, ((1.0, 1.0), (1.0, None)))
    with pytest.raises(LensError, match="slopes: of the losses of backbone, they weigh 0 in all at step 0"):
        sloping(tmp_path / "b", monkeypatch, ((1.0, 0.0),))


def test_a_step_begins_without_the_gradients_of_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert slope(sloping(tmp_path, monkeypatch, ((3.0, None),), steps=4)[0]) == 3.0


def test_a_method_gets_the_sums_of_all_parts_of_each_step_that_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    micro_batch_losses = (((1.0, None), (2.0, None)), ((8.0, None),))
    run, _ = sloping(tmp_path / "a", monkeypatch, *micro_batch_losses, steps=2)
    assert run.method.updates == [(11.0, 3.0)] * 2
    monkeypatch.setattr(Slopes, "micro_batch_losses", (((math.nan, None),),))
    train = Training(steps=3, lr=1e-3, max_skipped_steps=2)
    other = Trainer(
        evolve(RECIPE, method=ComponentSpec("slopes"), train=train), Catalog.of(toy, plugin), tmp_path / "b"
    )
    with pytest.raises(NumericalError, match="2 bad steps in a row"):
        other.train()
    assert other.method.updates == [], "steps that were skipped"


def test_dropout_is_a_function_of_seed_step_turn_and_part_alone(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runner.run(recipe(micro_batches=2), "plain")
    plain.train()
    careful = toy.Fit.steps

    def careless(*arguments: Any) -> Any:  # whatever else draws from the global generator
        for micro in careful(*arguments):
            torch.rand(7)
            yield micro

    monkeypatch.setattr(toy.Fit, "steps", careless)
    runner.run(recipe(micro_batches=2), "careless").train()
    ours, theirs = runner.state("plain", 6), runner.state("careless", 6)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if k.startswith("net/critic/"))


def test_the_parts_of_a_step_have_different_noise(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    loss = toy.Fit.loss

    def drawing(self: Any, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        seen.append(torch.cat([torch.rand(2, generator=torch.Generator().set_state(rng.get_state())), torch.rand(2)]))
        return loss(self, module_name, modules, batch, rng)

    monkeypatch.setattr(toy.Fit, "loss", drawing)
    runner.run(recipe(micro_batches=2, steps=3), "a").train()
    assert len(seen) == 10 and len({tuple(row.tolist()) for row in seen}) == 10, "by step, by turn and by part"


# ---- what a dataset may yield ---------------------------------------------------------------------------------------


def square(**changes: Any) -> Batch:
    return evolve(Batch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ("red", "blue")), **changes)


PACKED = tuple(torch.zeros(3, 16, 16 * n, dtype=torch.uint8) for n in (1, 2))
FLAWS: dict[str, tuple[Any, str]] = {
    "floats": (square(images=torch.zeros(2, 3, 16, 16)), r"float32 \[2, 3, 16, 16\]; images must be a uint8 tensor"),
    "ints": (square(images=torch.zeros(2, 3, 16, 16, dtype=torch.int64)), r"int64 \[2, 3, 16, 16\]"),
    "last": (square(images=torch.zeros(2, 16, 16, 3, dtype=torch.uint8)), r"uint8 \[2, 16, 16, 3\]"),
    "grey": (square(images=torch.zeros(2, 1, 16, 16, dtype=torch.uint8)), r"uint8 tensor \[2,3,H,W\]"),
    "one": (square(images=torch.zeros(3, 16, 16, dtype=torch.uint8)), r"uint8 \[3, 16, 16\]"),
    "array": (square(images=torch.zeros(2, 3, 16, 16).numpy()), "ndarray"),
    "captions": (square(captions=("red",)), r"\[2, 3, 16, 16\]; images must be a uint8 tensor \[1,3,H,W\]"),
    "text": (square(captions="ab"), "str; the captions of a Batch must be a tuple of texts"),
    "numbers": (square(captions=(1, 2)), "the captions of a Batch must be a tuple of texts"),
    "keys": (square(keys=(1,)), "1 keys are for 2 captions"),
    "empty": (Batch(None, ()), "at least one"),
    "dict": ({"images": 1}, "dict; it must yield Batches"),
    "tensor": (torch.zeros(2, 3, 16, 16), "it must yield Batches"),
    "latents": (square(images=None, latents=torch.zeros(2, 4, 2, 2, dtype=torch.uint8)), "latents must be a float"),
    "flat": (square(images=None, latents=torch.zeros(2, 4, 2)), r"float32 \[2, 4, 2\]"),
    "packed": (square(images=(PACKED[0], PACKED[1].float())), r"or a tuple of 2 of \[3,H,W\]"),
    "fewer": (square(images=PACKED[:1]), r"or a tuple of 2 of \[3,H,W\]"),
    "words": (
        square(text=TextFeatures(torch.zeros(3, 1, 1, 8), torch.ones(3, 1).bool())),
        "text must be a TextFeatures of 2 captions",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_dataset_that_yields_something_else_is_refused_by_name_at_its_first_batch(
    flaw: str, runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batch, words = FLAWS[flaw]
    monkeypatch.setattr(toy.Squares, "batches", lambda self, rank, world: iter([batch]))
    with pytest.raises(LensError, match=rf"squares\.batches yielded .*{words}"):
        runner.run(recipe(), "a").train()
    assert left(tmp_path / "a") == []


def test_a_validation_dataset_is_asked_about_the_encoders_before_they_change(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_in: list[str] = []

    def check_encoders(_: Any, pipeline: Any, precision: str) -> None:
        assert precision == "bf16" and pipeline.text_encoder.table.weight.dtype == torch.float32
        asked_in.append(precision)
        if len(asked_in) == 2:  # the training's, then the validation's
            raise LensError("made by others")

    monkeypatch.setattr(toy.Fit, "validate", lambda *_: {"loss": 0.0}, raising=False)
    monkeypatch.setattr(toy.Squares, "check_encoders", check_encoders, raising=False)
    plan = evolve(recipe(precision="bf16"), evaluation=Evaluation(every=1, validation=ComponentSpec("squares")))
    with pytest.raises(LensError, match="made by others"):
        runner.run(plan, "a")


def test_a_validation_dataset_is_checked_as_well(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.Fit, "validate", lambda *_: {"loss": 0.0}, raising=False)
    run = runner.run(evolve(recipe(), evaluation=Evaluation(every=1, validation=ComponentSpec("squares"))), "a")
    monkeypatch.setattr(toy.Squares, "batches", lambda self, rank, world: iter([FLAWS["floats"][0]]))
    with pytest.raises(LensError, match=r"squares\.batches yielded Tensor float32"):
        run.train()
