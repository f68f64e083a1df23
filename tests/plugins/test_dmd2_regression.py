"""The method trajectory_regression: what a step of the student is held against, and that it gets there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lens_dmd2
import lens_flow
import pytest
import torch
import toy
from attrs import evolve
from lens_dmd2.regression import Segment, TrajectoryRegression, mean_velocity
from torch import Tensor

from lens_core import flow
from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training
from lens_core.testing import check_method
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, CheckpointError, ConfigError, LensError, TextFeatures

CATALOG = Catalog.of(toy, lens_dmd2, lens_flow)
WORDS = ["red", "green", "blue", "", "yellow", "a", "bc", "d"]


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def method(sampler: ComponentSpec = toy.PARTS.sampler, apart: bool = True, **config: Any) -> TrajectoryRegression:
    """A method whose student has learnt something already, so that it differs from its teacher; unless not `apart`."""
    torch.manual_seed(0)
    made = TrajectoryRegression(
        TrajectoryRegression.Config(**config),
        LensPipeline.from_parts(evolve(toy.PARTS, sampler=sampler, guidance_scale=3.0), CATALOG),
    )
    for p in made.pipeline.backbone.parameters() if apart else ():
        p.data += 0.3 * torch.randn(p.shape, generator=rng())
    return made


def segment(m: TrajectoryRegression, number: int, rows: int = 4) -> Segment:
    return Segment(m.pipeline.encode(WORDS[:rows]), (3, 2), number)


def batches(captions: list[str]) -> Any:
    return iter([Batch(None, tuple(captions))])


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_losses_of_a_step_weigh_as_many_as_it_has_captions(count: int) -> None:
    m = method(steps=4)
    (parts,) = list(m.steps(batches(WORDS[:count]), m.trainable_modules(), rng()))
    losses = [m.loss("student", m.trainable_modules(), part, rng()) for part in parts]
    assert sum(loss.weight or 0.0 for loss in losses) == pytest.approx(count)


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["even", "euler"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_step_is_held_against_guided_steps_of_the_teacher_from_where_the_student_is(
    sampler: str, number: int
) -> None:
    m = method(ComponentSpec(sampler), teacher_steps=3)
    batch = segment(m, number)
    m.pipeline.backbone.requires_grad_(True)
    loss = m.loss("student", m.trainable_modules(), batch, rng(11))
    loss.total.backward()  # type: ignore[no-untyped-call]
    # the same, written apart: noise, the student's own steps, and then the teacher's with both branches
    student, nothing = copy.deepcopy(m.pipeline.backbone), TextFeatures.empty(4, 1, 8, batch.text.features)
    x = torch.randn(4, 4, 3, 2, generator=rng(11))
    times = m.pipeline.sampler.times((3, 2), 4).tolist()
    with torch.no_grad():
        for i in range(number):
            x = x + (times[i + 1] - times[i]) * student(x, torch.full((4,), times[i]), batch.text)
        y, t, by = x, times[number], (times[number + 1] - times[number]) / 3
        for i in range(3):
            at = torch.full((4,), t + i * by)
            y = y + by * flow.guide(m.teacher(y, at, batch.text), m.teacher(y, at, nothing), 3.0)
    reached = x + 3 * by * student(x, torch.full((4,), t), batch.text)
    expected = ((reached - y) / (3 * by)).square().mean()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(expected, list(student.parameters()))
    for p, grad in zip(m.pipeline.backbone.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in m.teacher.parameters())


def test_one_unguided_step_of_a_teacher_is_refused_and_more_or_guidance_teach_its_copy() -> None:
    with pytest.raises(ConfigError, match="use teacher_steps: 2 or more, or a guidance_scale other than 1"):
        method(teacher_steps=1, guidance_scale=1.0)
    for different in ({"teacher_steps": 2, "guidance_scale": 1.0}, {"teacher_steps": 1, "guidance_scale": 2.0}):
        m = method(apart=False, **different)
        assert float(m.loss("student", m.trainable_modules(), segment(m, 0), rng()).total.detach()) > 1e-5


def test_what_is_unexplained_is_a_share_of_the_variance() -> None:
    m = method(teacher_steps=2)
    loss = m.loss("student", {"student": lambda x, t, text: torch.zeros_like(x)}, segment(m, 0, 8), rng())  # type: ignore[dict-item]
    noise = torch.randn(8, 4, 3, 2, generator=rng())
    wanted = mean_velocity(m.teacher, m.pipeline.encode(WORDS), 3.0, noise, 1.0, 0.75, 2)
    assert float(loss.total) == pytest.approx(float(wanted.square().mean()), rel=1e-4)
    assert float(loss.parts["unexplained"]) == pytest.approx(float(wanted.square().mean() / wanted.var()), rel=1e-4)


def test_a_student_learns_to_reach_in_four_steps_what_its_teacher_reaches_in_twelve_guided_ones() -> None:
    m = method(apart=False)
    net = m.pipeline.backbone
    optimizer, draws = torch.optim.Adam(net.requires_grad_(True).parameters(), 5e-3), rng(1)

    def distance() -> float:
        noise, text = torch.randn(8, 4, 3, 2, generator=rng(77)), m.pipeline.encode(WORDS)
        teacher = copy.copy(m.pipeline)
        teacher.backbone = m.teacher
        with torch.no_grad():
            (*_, (_, far)), (*_, (_, near)) = (
                teacher.sample(text, noise, 12, 3.0),
                m.pipeline.sample(text, noise, 4, 1.0),
            )
        return float((far - near).square().mean())

    before = distance()
    for _ in range(150):
        for number in range(4):
            m.loss("student", m.trainable_modules(), segment(m, number, 8), draws).total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < before / 20


def test_gradients_survive_the_students_own_steps_under_autocast() -> None:
    m = method()
    m.pipeline.backbone.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = m.loss("student", m.trainable_modules(), segment(m, 2), rng()).total
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in m.pipeline.backbone.parameters())


# ---- micro-batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 8])
def test_captions_are_shared_out_among_the_steps_each_of_which_learns_in_every_process(rows: int) -> None:
    m = method()
    (parts,) = m.steps(batches(WORDS[:rows]), m.trainable_modules(), rng())
    assert [p.number for p in parts] == [0, 1, 2, 3], "as many passes, however many captions a process has"
    everything = m.pipeline.encode(WORDS[:rows]).features
    for i, part in enumerate(parts):
        torch.testing.assert_close(part.text.features, everything[i::4] if rows >= 4 else everything[[i % rows]])
        weight = m.loss("student", m.trainable_modules(), part, rng()).weight
        assert weight == pytest.approx(len(part) * rows / max(4, rows)), "a caption that is used again counts once"
    assert sum(map(len, parts)) == max(4, rows)


@pytest.mark.parametrize(
    ("rows", "shares", "counts"),
    [
        (8, (1.0, 1.0, 1.0, 1.0), [2, 2, 2, 2]),
        (8, (0.5, 0.25, 0.125, 0.125), [4, 2, 1, 1]),
        (8, (100.0, 1.0, 1.0, 1.0), [5, 1, 1, 1]),
        (3, (0.7, 0.1, 0.1, 0.1), [1, 1, 1, 1]),
    ],
)
def test_the_steps_have_their_shares_of_the_captions_and_each_has_one(
    rows: int, shares: tuple[float, ...], counts: list[int]
) -> None:
    m = method(shares=shares)
    (parts,) = m.steps(batches(WORDS[:rows]), m.trainable_modules(), rng())
    assert [len(part) for part in parts] == counts and [part.number for part in parts] == [0, 1, 2, 3]
    weights = [m.loss("student", m.trainable_modules(), part, rng()).weight for part in parts]
    assert weights == pytest.approx([count * rows / sum(counts) for count in counts])
    everything = m.pipeline.encode(WORDS[:rows]).features
    learned = torch.cat([part.text.features for part in parts])
    if rows >= 4:  # every caption is learned from once
        assert sorted(learned.flatten(1).sum(1).tolist()) == pytest.approx(
            sorted(everything.flatten(1).sum(1).tolist())
        )


def test_shares_of_other_numbers_of_steps_or_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="shares has 3 ratios for 4 steps"):
        TrajectoryRegression.Config(shares=(1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="above 0"):
        TrajectoryRegression.Config(shares=(1.0, 1.0, 1.0, 0.0))


def test_cached_latents_give_the_size_and_cached_text_is_not_encoded_again() -> None:
    m = method()
    text = m.pipeline.encode(["x", "yz"])
    cached = Batch(None, ("red", "blue"), latents=torch.zeros(2, 4, 2, 6), text=text)
    part = next(iter(m.steps(iter([cached]), {}, rng())))[0]
    assert part.size == (2, 6)
    torch.testing.assert_close(part.text.features, text.features[:1])
    packed = Batch(None, ("red", "blue"), latents=(torch.zeros(4, 2, 2), torch.zeros(4, 2, 6)), text=text)
    with pytest.raises(LensError, match="cannot train on packed batches"):
        next(iter(m.steps(iter([packed]), {}, rng())))


def test_a_teacher_makes_two_passes_a_step_however_small_the_batch() -> None:
    m = method(teacher_steps=2)
    for rows in (1, 8):
        m.teacher.calls.clear()
        m.loss("student", m.trainable_modules(), segment(m, 1, rows), rng())
        assert [count for count, _ in m.teacher.calls] == [rows] * 4


def test_sizes_are_those_of_the_pictures_or_of_the_recipe() -> None:
    m = method(sizes=((16, 32), (48, 16)))
    assert {m.steps(batches(WORDS), {}, rng(s)).__next__()[0].size for s in range(20)} == {(1, 2), (3, 1)}
    pictures = Batch(torch.zeros(2, 3, 32, 64, dtype=torch.uint8), ("red", "blue"))
    assert next(iter(m.steps(iter([pictures]), {}, rng())))[0].size == (2, 4)


# ---- refusals and promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["heun", "dpmpp", "euler_ancestral"])
def test_a_sampler_that_does_not_step_as_the_student_will_is_refused(sampler: str) -> None:
    with pytest.raises(ConfigError, match=r"trajectory_regression: .* does not step by Euler's method"):
        method(ComponentSpec(sampler))
    method(ComponentSpec("euler", {"mu": 1.0}))
    with torch.device("meta"):  # where a dry run builds it
        method(ComponentSpec("euler"), apart=False)


def test_the_pipeline_takes_the_students_presets() -> None:
    m = method(steps=3)
    assert (m.pipeline.presets["steps"], m.pipeline.presets["guidance_scale"], m.guidance) == (3, 1.0, 3.0)
    assert method(guidance_scale=2.5).guidance == 2.5


def test_it_keeps_the_promises_of_a_method() -> None:
    def make() -> TrajectoryRegression:
        return TrajectoryRegression(TrajectoryRegression.Config(), LensPipeline.from_parts(toy.PARTS, CATALOG))

    check_method(make, [Batch(torch.zeros(2, 3, 16, 32, dtype=torch.uint8), ("red", "blue"))])


def test_a_stopped_run_goes_on_bit_for_bit_with_the_same_teacher_and_refuses_another(tmp_path: Path) -> None:
    torch.manual_seed(1)
    start = tmp_path / "start"
    LensPipeline.from_parts(evolve(toy.PARTS, guidance_scale=3.0), CATALOG).save_pretrained(start)
    recipe = Recipe(
        method=ComponentSpec("trajectory_regression"),
        dataset=ComponentSpec("squares"),
        train=Training(steps=4, lr=1e-2, ema_decay=0.9, save_every=2),
        pipeline=PipelineSpec(start=str(start)),
    )

    def run(out: str, stop: Callable[[int], bool] = lambda step: False) -> tuple[dict[str, Tensor], Path | None]:
        trainer = Trainer(recipe, CATALOG, tmp_path / out, log=lambda line: None)
        after = trainer.method.after_step

        def maybe_stop(step: int, modules: Any) -> None:
            after(step, modules)
            if stop(step):
                raise MemoryError

        trainer.method.after_step = maybe_stop
        report = trainer.train()
        return tensor_files.read_tensors(
            tmp_path / out / "checkpoints" / "step-0000004" / "state.safetensors"
        ), report.model

    whole, model = run("whole")
    with pytest.raises(MemoryError):
        run("halted", lambda step: step == 2)
    resumed, _ = run("halted")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert model is not None
    student = LensPipeline.from_pretrained(model, catalog=CATALOG)
    assert (student.presets["steps"], student.presets["guidance_scale"]) == (4, 1.0)
    torch.manual_seed(2)
    LensPipeline.from_parts(evolve(toy.PARTS, guidance_scale=3.0), CATALOG).save_pretrained(tmp_path / "other")
    (tmp_path / "start").rename(tmp_path / "gone")
    (tmp_path / "other").rename(start)
    with pytest.raises(CheckpointError, match="its checkpoints stand on other weights"):
        run("halted")
