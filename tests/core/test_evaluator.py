"""Evaluation during a run: training never notices, the best weights are kept, a resumed run repeats no evaluation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens_dmd2
import lens_flow
import lens_mmdit
import lens_nft
import pytest
import torch
import toy
from attrs import evolve, frozen
from PIL import Image
from torch import Tensor

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.evaluation import report as reports
from lens_core.evaluation import run as runs
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_pixels
from lens_core.recipe import ComponentSpec, Evaluation, LoraSpec, Recipe, Training, read_recipe
from lens_core.training import optimizers
from lens_core.training.ema import exchange
from lens_core.training.trainer import Trainer
from lens_core.types import ConfigError, LensError, Prompt, Score


class Scripted:
    """Benchmark: what `script` scores in evaluation 0, 1, 2 …, or raises. It draws from the global generator."""

    script: tuple[Any, ...] = ()
    evaluations = 0

    @frozen
    class Config:
        count: int = 2

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.rand(3)

    def prompts(self) -> Sequence[Prompt]:
        return [Prompt(f"a {i}", i, "only") for i in range(self.config.count)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Score]:
        torch.rand(7)
        Scripted.evaluations += 1
        answer = self.script[Scripted.evaluations - 1] if self.script else 0.5
        if callable(answer):
            answer = answer()
        return [Score("ok", answer)] * len(prompts)


class Bright:
    """Reward: how bright a picture is."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Score]:
        return [Score("ok", float(image.float().mean() / 255)) for image in images]


plugin = types.ModuleType("scripted")
plugin.lens_rewards = hookimpl(lambda: {"bright": Bright}, specname="lens_rewards")  # type: ignore[attr-defined]
plugin.lens_benchmarks = hookimpl(lambda: {"scripted": Scripted}, specname="lens_benchmarks")  # type: ignore[attr-defined]

TRAIN = Training(steps=6, lr=1e-2, ema_decay=0.9, save_every=3, log_every=2, keep_checkpoints=9)
PARTS = evolve(toy.NARROW, steps=3)
BASE = Recipe(method=ComponentSpec("fit"), dataset=ComponentSpec("squares"), train=TRAIN, pipeline=PARTS, seed=3)
JUDGED = Evaluation(every=2, size=(16, 16), benchmarks=(ComponentSpec("scripted"),))
BEST = evolve(JUDGED, keep_best="scripted")


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.of(toy, plugin, lens_flow, lens_mmdit, lens_nft, lens_dmd2)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "evaluations", 0)
    monkeypatch.setattr(Scripted, "script", ())


class Runner:
    def __init__(self, catalog: Catalog, folder: Path) -> None:
        self.catalog, self.folder = catalog, folder
        self.said: list[str] = []

    def __call__(
        self, name: str, evaluation: Evaluation | None, allow_changed: bool = False, base: Recipe = BASE
    ) -> Trainer:
        plan = evolve(base, evaluation=evaluation)
        return Trainer(plan, self.catalog, self.folder / name, log=self.said.append, allow_changed=allow_changed)

    def state(self, name: str, step: int) -> dict[str, Tensor]:
        return tensor_files.read_tensors(self.folder / name / "checkpoints" / f"step-{step:07d}" / "state.safetensors")

    def model(self, name: str) -> dict[str, Tensor]:
        return tensor_files.read_weights(self.folder / name / "model" / "transformer")

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "evaluations.jsonl").read_text().splitlines()]

    def averages(self, name: str, step: int) -> dict[str, Tensor]:
        prefix = "ema/backbone/"
        return {k.removeprefix(prefix): v for k, v in self.state(name, step).items() if k.startswith(prefix)}


@pytest.fixture
def runner(catalog: Catalog, tmp_path: Path) -> Runner:
    return Runner(catalog, tmp_path)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def measured(*_: Any) -> dict[str, float]:
    torch.rand(5)
    return {"loss": 1.0}


# ---- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_run_that_is_watched_ends_with_the_weights_of_one_that_is_not(
    kind: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {"backbone": LoraSpec(rank=2)} if kind == "adapter" else {}
    base = evolve(BASE, train=evolve(TRAIN, lora=adapters))
    careful = toy.Fit.steps

    def careless(*arguments: Any) -> Any:  # a method that draws from the global generator between its turns
        for micro in careful(*arguments):
            yield [(z + torch.rand(z.shape), text) for z, text in micro]

    monkeypatch.setattr(toy.Fit, "steps", careless)
    runner("plain", None, base=base).train()
    monkeypatch.setattr(toy.Fit, "validate", measured, raising=False)
    everything = evolve(JUDGED, every=1, prompts=("red", "blue"), validation=ComponentSpec("squares", {"seed": 9}))
    runner("watched", everything, base=base).train()
    assert [line["step"] for line in runner.lines("watched")] == [0, 1, 2, 3, 4, 5, 6]
    for step in (3, 6):
        same(runner.state("plain", step), runner.state("watched", step))
    same(runner.model("plain"), runner.model("watched"))


ROLLOUT = {
    "prompts_per_rollout": 2,
    "pictures_per_prompt": 3,
    "sizes": [[16, 16]],
    "rollout_steps": 2,
    "timesteps_per_image": 2,
}
METHODS = {
    "flow_matching": {},
    "diffusion_nft": {"prompts": {"use": "reds"}, "rewards": [{"use": "bright"}], **ROLLOUT},
    "dmd2": {"steps": 2, "guidance_scale": 3.0, "fake_score_updates": 1},
    "trajectory_regression": {"steps": 2, "guidance_scale": 3.0},
}


@pytest.mark.parametrize("name", METHODS)
def test_whatever_the_method_watching_it_changes_nothing(name: str, runner: Runner) -> None:
    base = evolve(
        BASE,
        method=ComponentSpec(name, METHODS[name]),
        dataset=None if name == "diffusion_nft" else ComponentSpec("squares"),
    )
    runner("plain", None, base=base).train()
    runner("watched", evolve(JUDGED, prompts=("red",)), base=base).train()
    assert [line["step"] for line in runner.lines("watched")] == [0, 2, 4, 6]
    for step in (3, 6):
        same(runner.state("plain", step), runner.state("watched", step))
    same(runner.model("plain"), runner.model("watched"))


@pytest.mark.parametrize("evaluation", [0, 1, 2, 3])
def test_a_run_killed_in_the_middle_of_an_evaluation_ends_with_the_same_weights(
    evaluation: int, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> float:
        raise MemoryError

    scores = (0.1, 0.4, 0.3, 0.2)
    monkeypatch.setattr(Scripted, "script", scores)
    runner("plain", None).train()
    runner("whole", BEST).train()
    monkeypatch.setattr(Scripted, "evaluations", 0)
    monkeypatch.setattr(Scripted, "script", (*scores[:evaluation], die, *scores[evaluation:]))
    with pytest.raises(MemoryError):
        runner("killed", BEST).train()
    runner("killed", BEST).train()
    same(runner.state("plain", 6), runner.state("killed", 6))
    same(runner.model("whole"), runner.model("killed"))
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in runner.lines("killed")]
    assert kept == [{k: v for k, v in line.items() if k != "seconds"} for line in runner.lines("whole")]


def test_an_evaluation_uses_the_averages_and_puts_the_weights_back(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, bool]] = []

    def validate(_: Any, batch: Any, modules: Any, rng: Any) -> dict[str, float]:
        seen.append((modules["backbone"].inner.weight.detach().clone(), modules["backbone"].training))
        return {"loss": 0.0}

    monkeypatch.setattr(toy.Fit, "validate", validate, raising=False)
    run = runner("a", Evaluation(every=3, validation_batches=1, validation=ComponentSpec("squares")))
    run.train()
    for (weight, training), step in zip(seen[1:], (3, 6), strict=True):
        assert torch.equal(weight, runner.averages("a", step)["inner.weight"]) and not training
        assert not torch.equal(weight, runner.state("a", step)["net/backbone/inner.weight"])


def test_tensors_that_two_names_share_come_back() -> None:
    shared, one, two = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    pairs = [(shared, one), (shared, two)]
    exchange(pairs)
    exchange(pairs[::-1])
    assert [float(t) for t in (shared, one, two)] == [1.0, 2.0, 3.0]


# ---- what is seen ---------------------------------------------------------------------------------------------------


def test_the_last_grid_shows_what_the_model_draws(runner: Runner, catalog: Catalog, tmp_path: Path) -> None:
    evaluation = Evaluation(every=4, prompts=("red", "a blue one", "green"), seed=5, size=(16, 32), batch_size=2)
    report = runner("a", evaluation).train()
    result = sorted(p.name for p in (tmp_path / "a" / "samples").iterdir())
    assert result == ["step-0000000.png", "step-0000004.png", "step-0000006.png"]
    assert report.model is not None
    drawn = LensPipeline.from_pretrained(report.model, catalog=catalog)(
        list(evaluation.prompts), seed=5, height=16, width=32, output_type="pt"
    ).images
    want = reports.contact_sheet(drawn, evaluation.prompts, [None] * 3, 3)
    with Image.open(tmp_path / "a" / "samples" / result[-1]) as sheet:
        assert sheet.tobytes() == want.tobytes()
    assert (tmp_path / "a" / "samples" / result[0]).read_bytes() != (
        tmp_path / "a" / "samples" / result[-1]
    ).read_bytes()


SMALL = {"in_channels": 4, "out_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
         "axes_dims_rope": [4, 4, 4], "enc_hidden_dim": 8, "selected_layer_index": [0]}  # fmt: skip
KERNELS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False, "fused": False}}


class Listen(toy.Fit):
    """Method: the text encoder learns too."""

    def trainable_modules(self) -> dict[str, Any]:
        return {"backbone": self.pipeline.backbone, "text_encoder": self.pipeline.text_encoder}

    def update_order(self, step: int) -> Sequence[str]:
        return ("text_encoder", "backbone")

    def steps(self, batches: Any, modules: Any, rng: torch.Generator) -> Any:
        yield from ([(z, captions)] for z, captions in self._plain(batches))

    def _plain(self, batches: Any) -> Any:
        for batch in batches:
            with torch.no_grad():
                z = self.pipeline.vae.encode(to_pixels(batch.images))
            yield z, batch.captions

    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Any:
        return super().loss("backbone", modules, (batch[0], modules["text_encoder"].encode(batch[1])), rng)


plugin.lens_methods = hookimpl(lambda: {"listen": Listen}, specname="lens_methods")  # type: ignore[attr-defined]
LEARNERS: dict[str, tuple[ComponentSpec, ComponentSpec, dict[str, LoraSpec]]] = {
    "all": (ComponentSpec("flow_matching"), ComponentSpec("mmdit", SMALL), {}),
    "adapter": (
        ComponentSpec("flow_matching"),
        ComponentSpec("mmdit", SMALL),
        {"backbone": LoraSpec(rank=2, targets=("linear_1", "proj_out"))},
    ),
    "encoder": (ComponentSpec("listen"), ComponentSpec("mixer", {"width": 8}), {}),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("learner", LEARNERS)
def test_the_last_evaluation_uses_the_weights_that_are_exported(
    learner: str, ema: float, kernel: str, runner: Runner, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes the steps, and although what follows from weights was kept at earlier evaluations."""
    method, backbone, adapters = LEARNERS[learner]
    monkeypatch.setattr(
        optimizers, "adamw", lambda weights, train: torch.optim.AdamW(weights, lr=train.lr, **KERNELS[kernel])
    )
    seen: list[Tensor] = []
    draw = runs.generate_images

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append(torch.cat(list(draw(*arguments, **settings))))
        yield seen[-1]

    monkeypatch.setattr(runs, "generate_images", watched)
    train = evolve(TRAIN, steps=12, lr=3e-2, ema_decay=ema, save_every=12, lora=adapters)
    base = evolve(BASE, method=method, train=train, pipeline=evolve(PARTS, backbone=backbone))
    prompts = ("red", "a blue one")
    run = runner("a", Evaluation(every=6, prompts=prompts, size=(32, 32)), base=base)
    with torch.no_grad():
        for weight in run.modules["backbone"].parameters():  # a new backbone is 0 in many places, and then hides faults
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    report = run.train()
    assert len(seen) == 3 and report.model is not None
    assert not torch.equal(seen[1], seen[2]), "the run must have learned, or being equal says nothing"
    monkeypatch.undo()
    model = LensPipeline.from_pretrained(report.model, catalog=catalog)
    drawn = torch.cat(list(runs.generate_images(model, [Prompt(p) for p in prompts], 0, 16, height=32, width=32)))
    assert int((drawn.int() - seen[-1].int()).abs().max()) <= 1  # an adapter is merged into what is exported


def test_a_line_holds_the_overall_score_and_the_tasks(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "script", (0.25, 0.5, 0.75, 1.0))
    twice = evolve(JUDGED, benchmarks=(ComponentSpec("scripted"), ComponentSpec("toy:reds", {"prompts": 6})))
    runner("a", twice).train()
    lines = runner.lines("a")
    assert [(n["step"], n["scripted"], n["scripted/only"]) for n in lines] == [
        (0, 0.25, 0.25), (2, 0.5, 0.5), (4, 0.75, 0.75), (6, 1.0, 1.0),
    ]  # fmt: skip
    assert all("reds/red" in n and "reds/other" not in n and "score" not in n for n in lines), "other has no verdict"


def test_validation_is_a_mean_over_samples_of_the_same_first_batches(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def validate(_: Any, batch: Any, modules: Any, rng: torch.Generator) -> dict[str, float]:
        seen.append((batch.captions, float(torch.rand((), generator=rng))))
        part = {"loss/8x8": 10.0} if len(seen) % 2 else {}
        return {"loss": float(len(seen)), **part}

    monkeypatch.setattr(toy.Fit, "validate", validate, raising=False)
    runner("a", Evaluation(every=6, validation_batches=2, validation=ComponentSpec("squares", {"seed": 9}))).train()
    assert seen[:2] == seen[2:] and seen[0] != seen[1]
    lines = runner.lines("a")
    assert [n["validation/loss"] for n in lines] == [1.5, 3.5] and lines[0]["validation/loss/8x8"] == 10.0


def test_flow_matching_is_validated_by_time_and_by_size(runner: Runner) -> None:
    base = evolve(
        BASE, method=ComponentSpec("flow_matching"), train=evolve(TRAIN, steps=40, save_every=40, ema_decay=0.0)
    )
    runner("a", Evaluation(every=40, validation=ComponentSpec("squares", {"seed": 9})), base=base).train()
    first, last = runner.lines("a")
    assert last["validation/loss"] < 0.9 * first["validation/loss"], "it must have learned"
    times = [v for k, v in last.items() if "/t" in k]
    assert len(times) == 5 and last["validation/loss"] == pytest.approx(sum(times) / 5, abs=1e-5)
    assert last["validation/loss/16x16"] == last["validation/loss"]


def test_a_benchmark_that_fails_is_reported_and_the_run_goes_on(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> float:
        raise LensError("the judge is out")

    monkeypatch.setattr(Scripted, "script", (0.5, fail, 0.2, 0.1))
    assert runner("a", evolve(BEST, patience=2)).train().steps == 6
    assert "step 2: the benchmark scripted failed, and the run goes on: the judge is out" in runner.said
    assert runner.lines("a")[1]["failed"] == {"scripted": "the judge is out"}
    assert "score" not in runner.lines("a")[1], "no verdict is not a verdict: patience counts the other two"


def test_what_a_benchmark_keeps_in_memory_is_freed_after_each_evaluation(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> float:
        raise LensError("the judge is out")

    closed: list[int] = []
    monkeypatch.setattr(Scripted, "close", lambda self: closed.append(Scripted.evaluations), raising=False)
    monkeypatch.setattr(Scripted, "script", (0.5, fail, 0.2, 0.1))
    runner("a", JUDGED).train()
    assert closed == [1, 2, 3, 4]


# ---- the best -------------------------------------------------------------------------------------------------------


def test_the_model_is_the_best_one(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.6, 0.6, 0.3))
    base = evolve(BASE, train=evolve(TRAIN, save_every=2))
    runner("a", BEST, base=base).train()
    same(runner.model("a"), runner.averages("a", 2))
    assert [p.name for p in (tmp_path / "a" / "best").iterdir()] == ["step-0000002.safetensors"]
    assert runner.said[-1] == "the model is that of step 2: scripted 0.6000, the best of 4 evaluations"


def test_the_best_adapter_is_the_one_that_is_written(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.6, 0.6, 0.3))
    train = evolve(TRAIN, save_every=2, ema_decay=0.0, lora={"backbone": LoraSpec(rank=2)})
    runner("a", BEST, base=evolve(BASE, train=train)).train()
    written = tensor_files.read_tensors(tmp_path / "a" / "adapters" / "backbone" / "pytorch_lora_weights.safetensors")
    want = runner.state("a", 2)["net/backbone/inner.lora_B.default.weight"]
    assert torch.equal(written["transformer.inner.lora_B.weight"], want) and want.any()


def test_the_best_outlives_its_checkpoint(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.6, 0.5, 0.3))
    base = evolve(BASE, train=evolve(TRAIN, save_every=2, keep_checkpoints=1))
    runner("a", BEST, base=base).train()
    before = runner.model("a")
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-0000006"]
    runner("a", BEST, base=base).train()
    same(before, runner.model("a"))
    assert Scripted.evaluations == 4, "a finished run is not evaluated again"


def test_patience_ends_the_run_and_the_end_survives_a_resume(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "script", (0.2, 0.6, 0.5, 0.6, 0.9))
    patient, base = evolve(BEST, every=1, patience=2), evolve(BASE, train=evolve(TRAIN, save_every=1))
    report = runner("a", patient, base=base).train()
    assert (report.steps, report.model is None) == (3, False)
    assert "early stopping: no improvement of scripted in 2 evaluations; the run ends at step 3 of 6" in runner.said
    same(runner.model("a"), runner.averages("a", 1))
    again = runner("a", patient, base=base).train()
    assert (again.steps, again.model is None, Scripted.evaluations) == (3, False, 4)
    same(runner.model("a"), runner.averages("a", 1))


def test_a_run_that_ends_early_is_saved_where_it_ended(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "script", (0.2, 0.1))
    runner("a", evolve(BEST, patience=1)).train()
    assert runner.state("a", 2)
    assert runner("a", evolve(BEST, patience=1)).train().steps == 2
    assert any("resumed at step 2" in line for line in runner.said)


def test_a_run_that_ended_early_ends_there_again(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "script", (0.2, 0.6, 0.5))
    runner("a", evolve(BEST, patience=1)).train()
    before = runner.state("a", 4)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-0000004")  # as if killed before it was written
    assert runner("a", evolve(BEST, patience=1)).train().steps == 4
    same(before, runner.state("a", 4))
    assert Scripted.evaluations == 3


def test_evaluations_beyond_the_last_checkpoint_are_not_repeated(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.2, 0.6, 0.3))
    runner("whole", BEST).train()
    monkeypatch.setattr(Scripted, "evaluations", 0)

    def die() -> None:
        raise MemoryError

    killed = runner("killed", BEST)
    killed.method.config = toy.Fit.Config(stop=4)  # after the evaluation at step 4, past the checkpoint of step 3
    monkeypatch.setattr(toy.Fit, "halt", staticmethod(die))
    with pytest.raises(MemoryError):
        killed.train()
    assert Scripted.evaluations == 3
    runner("killed", BEST).train()
    assert Scripted.evaluations == 4 and [n["step"] for n in runner.lines("killed")] == [0, 2, 4, 6]
    same(runner.model("whole"), runner.model("killed"))


def test_another_recipe_forgets_the_evaluations_of_steps_that_are_made_again(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.2, 0.6, 0.3, 0.4, 0.5))
    runner("a", BEST).train()
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-0000006")  # it goes on at 3; the best, of step 4, was beyond
    other = evolve(BASE, train=evolve(TRAIN, lr=1e-3))
    runner("a", BEST, allow_changed=True, base=other).train()
    assert Scripted.evaluations == 6 and [n["step"] for n in runner.lines("a")] == [0, 2, 4, 6]
    assert any("the weights of step 2, the best so far, are gone; the best is chosen anew" in s for s in runner.said)
    same(runner.model("a"), runner.averages("a", 6))


def test_a_run_without_a_checkpoint_begun_with_another_recipe_is_evaluated_anew(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner("a", JUDGED).train()
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    other = evolve(BASE, seed=4)
    with pytest.raises(
        ConfigError, match=r"holds the model of another recipe: \$\.seed .*replace it with --allow-changed"
    ):
        runner("a", JUDGED, base=other).train()
    runner("a", JUDGED, base=other, allow_changed=True).train()
    assert Scripted.evaluations == 8 and [n["step"] for n in runner.lines("a")] == [0, 2, 4, 6]
    log = [json.loads(line)["step"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6], "its log begins anew as well"


def test_a_damaged_best_is_reported_and_the_last_weights_are_written(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "script", (0.1, 0.6, 0.5, 0.3))
    runner("a", BEST).train()
    path = tmp_path / "a" / "best" / "step-0000002.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    runner("a", BEST).train()
    assert runner.said[-1].startswith("the model is that of the last step, 6, for the best cannot be read: ")
    same(runner.model("a"), runner.averages("a", 6))


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [1, 3])
def test_a_signal_during_an_evaluation_saves_first_and_it_is_repeated_later(
    evaluation: int, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner("plain", None).train()
    drawn: list[int] = []
    draw = runs.generate_images

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        for part in draw(*arguments, **settings):
            drawn.append(1)
            if len(drawn) == evaluation + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield part

    monkeypatch.setattr(runs, "generate_images", interrupted)
    report = runner("a", JUDGED).train()
    assert (report.steps, report.model) == (2 * evaluation, None)
    assert runner.said[-1] == f"stopped at step {2 * evaluation} of 6; the same command goes on from here"
    assert [n["step"] for n in runner.lines("a")] == [0, 2, 4][:evaluation]
    assert runner.state("a", 2 * evaluation)
    runner("a", JUDGED).train()
    assert [n["step"] for n in runner.lines("a")] == [0, 2, 4, 6]
    same(runner.state("plain", 6), runner.state("a", 6))


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_cannot_draw_is_refused_at_the_start(runner: Runner) -> None:
    blind = evolve(BASE, pipeline=evolve(PARTS, sampler=None))
    with pytest.raises(
        ConfigError, match=r"^\$\.evaluation: a pipeline without a sampler cannot draw; add what is missing"
    ):
        runner("a", JUDGED, base=blind)
    with pytest.raises(ConfigError, match=r"height 17 is not a multiple of 16 px"):
        runner("a", evolve(JUDGED, size=(17, 16)))


def test_what_cannot_be_measured_is_refused_at_the_start(runner: Runner) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.validation: Fit has no validate\(\)"):
        runner("a", Evaluation(every=1, validation=ComponentSpec("squares")))
    with pytest.raises(ConfigError, match=r"evaluation\.benchmarks\[0\]: scripted has no prompts"):
        runner("a", evolve(JUDGED, benchmarks=(ComponentSpec("scripted", {"count": 0}),)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ("a",), "every": 0}, "every: must be at least 1"),
        ({}, "evaluates nothing; name prompts, benchmarks or validation"),
        ({"prompts": ("a", " ")}, "must be text that is not blank"),
        ({"prompts": ("a",), "keep_best": "shapes"}, "keep_best is 'shapes', which is no benchmark .* there is none"),
        ({"benchmarks": (ComponentSpec("x:reds"), ComponentSpec("reds")), "keep_best": "red"}, "there is reds, reds_1"),
        ({"benchmarks": (ComponentSpec("reds"),), "patience": 3}, "patience waits for a better score"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Evaluation(**{"every": 1, **fields})


def test_what_evaluation_names_is_checked_with_the_recipe(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "method: fit\ntrain: {steps: 1}\nevaluation: {every: 1, benchmarks: [{use: reds, promts: 3}, {use: rods}],"
        " validation: {use: squares, batch: many}}\n"
    )
    with pytest.raises(ConfigError) as error:
        read_recipe(tmp_path / "r.yaml", catalog)
    paths = [p.partition("r.yaml: ")[2].partition(": ")[0] for p in error.value.problems]
    assert paths == ["$.evaluation.benchmarks[0].promts", "$.evaluation.benchmarks[1]", "$.evaluation.validation.batch"]
