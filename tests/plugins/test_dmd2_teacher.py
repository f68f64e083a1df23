"""A teacher that is another checkpoint than the recipe's start, in both methods of distillation."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import lens_dmd2
import lens_flow
import pytest
import torch
import toy
from attrs import evolve
from lens_dmd2.method import DMD2
from lens_dmd2.regression import TrajectoryRegression

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints import packed_linear
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training, structure
from lens_core.training import memory_estimate
from lens_core.training.trainer import Trainer
from lens_core.types import CheckpointError, ConfigError

runes = types.ModuleType("runes")
runes.lens_text_encoders = hookimpl(lambda: {"runes": type("Runes", (toy.Letters,), {})})  # type: ignore[attr-defined]
runes.lens_text_encoders.__name__ = "lens_text_encoders"
PUBLISHED = {
    "components": {
        "vae": {"use": "toy:blocks"},
        "text_encoder": {"use": "runes:runes"},
        "backbone": {"use": "toy:mixer", "config": {"width": 64}},
        "sampler": {"use": "toy:even"},
    },
    "presets": {"guidance_scale": 3.0},
}


def lens_describe(folder: Path) -> dict[str, Any] | None:
    return PUBLISHED if str(folder) == memory_estimate.PUBLISHED else None


published = types.ModuleType("published")  # a model with another text encoder
published.lens_describe = hookimpl(lens_describe)  # type: ignore[attr-defined]
CATALOG = Catalog.of(toy, lens_dmd2, lens_flow, runes)
METHODS: dict[str, Any] = {"dmd2": DMD2, "trajectory_regression": TrajectoryRegression}


def checkpoint(folder: Path, seed: int, **parts: Any) -> LensPipeline:
    """A toy checkpoint in `folder`, as it is read again."""
    torch.manual_seed(seed)
    LensPipeline.from_parts(evolve(toy.PARTS, **parts), CATALOG).save_pretrained(folder)
    return LensPipeline.from_pretrained(folder, catalog=CATALOG)


def method(name: str, start: Path, **config: Any) -> Any:
    pipeline = LensPipeline.from_parts(PipelineSpec(start=str(start)), CATALOG)
    return METHODS[name](structure(METHODS[name].Config, config, "$.method"), pipeline)


def recipe(name: str, start: Path, **config: Any) -> Recipe:
    return Recipe(
        method=ComponentSpec(name, config),
        dataset=ComponentSpec("squares"),
        train=Training(steps=2, lr=1e-2, save_every=1),
        pipeline=PipelineSpec(start=str(start)),
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", METHODS)
def test_the_student_begins_at_the_start_and_the_teacher_is_the_checkpoint_that_is_named(
    name: str, tmp_path: Path
) -> None:
    guided, student = (
        checkpoint(tmp_path / "guided", 1, guidance_scale=3.0),
        checkpoint(tmp_path / "student", 2, guidance_scale=1.0),
    )
    m = method(name, tmp_path / "student", teacher=str(tmp_path / "guided"))
    assert same(m.teacher, guided.backbone) and same(m.pipeline.backbone, student.backbone)
    assert not same(guided.backbone, student.backbone)
    assert m.guidance == 3.0 and not any(p.requires_grad for p in m.teacher.parameters())
    assert m.state_dict() == {"teacher": guided.version}
    if name == "dmd2":
        assert same(m.trainable_modules()["fake"], guided.backbone)
    assert method(name, tmp_path / "student", teacher=str(tmp_path / "guided"), guidance_scale=2.0).guidance == 2.0


@pytest.mark.parametrize("name", METHODS)
def test_a_small_student_learns_from_a_large_teacher_which_stays_as_it_was(name: str, tmp_path: Path) -> None:
    large = checkpoint(tmp_path / "large", 1, guidance_scale=3.0)
    small = checkpoint(tmp_path / "small", 2, backbone=ComponentSpec("mixer", {"width": 8}))
    plan = recipe(name, tmp_path / "small", teacher=str(tmp_path / "large"), **({"ida": 1} if name == "dmd2" else {}))
    trainer = Trainer(plan, CATALOG, tmp_path / "run", log=lambda line: None)
    report = trainer.train()
    assert same(trainer.method.teacher, large.backbone) and report.model is not None
    model = LensPipeline.from_pretrained(report.model, catalog=CATALOG)
    assert model.backbone.inner.out_features == 8 and not same(model.backbone, small.backbone)
    assert (model.presets["steps"], model.presets["guidance_scale"]) == (4, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_refuses_a_teacher_that_has_changed(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "guided", 1, guidance_scale=3.0)
    checkpoint(tmp_path / "student", 2)
    plan = recipe(name, tmp_path / "student", teacher=str(tmp_path / "guided"))
    Trainer(plan, CATALOG, tmp_path / "run", log=lambda line: None).train()
    longer = evolve(plan, train=evolve(plan.train, steps=3))
    checkpoint(tmp_path / "guided", 3, guidance_scale=3.0)
    with pytest.raises(CheckpointError, match="was begun with the teacher"):
        Trainer(longer, CATALOG, tmp_path / "run", log=lambda line: None, allow_changed=True).train()
    checkpoint(tmp_path / "guided", 1, guidance_scale=3.0)
    again = Trainer(longer, CATALOG, tmp_path / "run", log=lambda line: None, allow_changed=True).train()
    assert again.steps == 3


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_that_cannot_teach_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "student", 2)
    checkpoint(tmp_path / "other", 1, guidance_scale=3.0, text_encoder=ComponentSpec("runes"))
    with pytest.raises(ConfigError, match="other has another text encoder than the student"):
        method(name, tmp_path / "student", teacher=str(tmp_path / "other"))
    checkpoint(tmp_path / "parts", 1, guidance_scale=3.0, backbone=None)
    with pytest.raises(ConfigError, match="parts has no backbone, so it cannot be the teacher"):
        method(name, tmp_path / "student", teacher=str(tmp_path / "parts"))
    with pytest.raises(CheckpointError, match="nowhere"):
        method(name, tmp_path / "student", teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="teacher"):
        method(name, tmp_path / "student", teacher=" ")


def test_options_that_need_the_starts_own_weights_as_the_teacher_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "large", 1, guidance_scale=3.0)
    checkpoint(tmp_path / "small", 2, backbone=ComponentSpec("mixer", {"width": 8}))
    with pytest.raises(ConfigError, match=r"large is of another size than the student; use ida: 1, not 0\.97"):
        method("dmd2", tmp_path / "small", teacher=str(tmp_path / "large"))
    with pytest.raises(ConfigError, match="the weights of the recipe's start, and the teacher is"):
        DMD2.Config(teacher="tiny:", lora_on_shared_base=("fake",), ida=1)


def test_one_unguided_step_of_another_teacher_is_something_to_learn(tmp_path: Path) -> None:
    checkpoint(tmp_path / "teacher", 1, guidance_scale=1.0)
    checkpoint(tmp_path / "student", 2, guidance_scale=1.0)
    with pytest.raises(ConfigError, match="is the student's own step"):
        method("trajectory_regression", tmp_path / "student", teacher_steps=1)
    method("trajectory_regression", tmp_path / "student", teacher_steps=1, teacher=str(tmp_path / "teacher"))


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_counts_the_teacher_at_its_own_size_and_reads_no_weights(name: str, tmp_path: Path) -> None:
    large = checkpoint(tmp_path / "large", 1, guidance_scale=3.0, backbone=ComponentSpec("mixer", {"width": 64}))
    checkpoint(tmp_path / "small", 2, backbone=ComponentSpec("mixer", {"width": 8}))
    for weights in tmp_path.glob("*/*/*.safetensors"):
        weights.unlink()
    plan = recipe(name, tmp_path / "small", teacher=str(tmp_path / "large"), **({"ida": 1} if name == "dmd2" else {}))
    sizes, _, _ = memory_estimate.memory(plan, CATALOG)
    assert sizes["teacher: weights"] == 4 * sum(p.numel() for p in large.backbone.parameters())
    student = "generator" if name == "dmd2" else "student"
    assert sizes[f"{student}: weights"] < sizes["teacher: weights"] / 4


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_does_not_compare_with_what_stands_in_for_an_absent_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "here", 1, guidance_scale=3.0, backbone=ComponentSpec("mixer", {"width": 8}))
    absent, catalog = tmp_path / "runs" / "absent", Catalog.of(toy, lens_dmd2, lens_flow, runes, published)
    plans = {
        str(absent): recipe(name, tmp_path / "here", teacher=str(absent)),
        "the start": recipe(name, absent, teacher=str(tmp_path / "here")),
    }
    for missing, plan in plans.items():
        with pytest.warns(UserWarning, match=f"{missing} is not on this disk; the teacher is taken to be as large as"):
            sizes, _, _ = memory_estimate.memory(plan, catalog)
        student = "generator" if name == "dmd2" else "student"
        assert sizes["teacher: weights"] == sizes[f"{student}: weights"]


def test_a_quantised_teacher_of_the_students_size_is_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LensPipeline.from_pretrained

    def packed(uri: Any, **options: Any) -> LensPipeline:
        pipeline = read(uri, **options)
        if not str(uri).endswith("teacher"):
            return pipeline
        layer = pipeline.backbone.inner
        halves = layer.weight.detach().half().contiguous()
        packed_linear.pack(layer, "F16", halves.view(torch.uint8).reshape(len(halves), -1))
        return pipeline

    checkpoint(tmp_path / "teacher", 1, guidance_scale=3.0)
    checkpoint(tmp_path / "student", 2)
    monkeypatch.setattr(LensPipeline, "from_pretrained", packed)
    made = method("dmd2", tmp_path / "student", teacher=str(tmp_path / "teacher"))
    assert packed_linear.packed_layers(made.teacher)
