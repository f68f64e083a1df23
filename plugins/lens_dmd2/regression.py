"""The method `trajectory_regression`: each step of a student learns what several guided steps of its teacher do.

Distillation by regression on the teacher's trajectory (Luhman and Luhman, 2021; Salimans and Ho, 2022), with guidance
built in (Meng et al., 2023). The student learns at the points that its own steps reach, as in the rollouts of `dmd2`:
on the teacher's trajectory alone it would never see its own errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.attribution import name_of
from lens_core.protocols import BaseMethod, Sampler
from lens_core.types import Batch, ConfigError, Loss, TextFeatures, move
from lens_core.validators import GUIDANCE, PIXELS, STEPS, each, integer, optional, real, text
from lens_dmd2.rollout import ode
from lens_dmd2.student import check_teacher, empty_text, grid_of, teacher_of, text_of_batch, velocity_of

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


@frozen
class Segment:
    """A micro-batch: the captions' text, the latent grid (h, w), the step of the student that learns from it, and
    what each row weighs: less than 1 where captions are there several times."""

    text: TextFeatures
    size: tuple[int, int]
    number: int
    row_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.text)


class TrajectoryRegression(BaseMethod):
    """Distil the pipeline into a student of few steps, by regression on guided steps.

    The pipeline's backbone becomes the student of `steps` steps without guidance. As it was, it is the teacher, unless
    `teacher` names another checkpoint. From where the student's own steps lead, the teacher goes on for one step of the
    student, in `teacher_steps` guided steps of Euler's method. The student learns the mean velocity of that: the loss
    is the squared distance.

    The captions of a batch are shared out among the student's steps, so that a training step teaches all of them. The
    pipeline's presets become the student's. The teacher is not trained and not saved: a resumed run reads it anew,
    and refuses another one.
    """

    headline = ("student/loss", "student/unexplained")

    @frozen
    class Config:
        steps: int = field(default=4, validator=STEPS)  # the student's
        # Checkpoint of the teacher, with the student's VAE and text encoder; None: the recipe's start.
        teacher: str | None = field(default=None, validator=optional(text()))
        # The teacher's; None: that of its presets.
        guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
        teacher_steps: int = field(default=3, validator=integer(at_least=1))  # of the teacher, for one of the student
        # Of the captions of a batch, for each of the student's steps, as ratios; (): all alike. Each step has one
        # caption or more of every process's batch, so that small batches are shared out more evenly.
        shares: tuple[float, ...] = field(default=(), validator=each(real(above=0)))
        # px, for captions without pictures; (): the preset square.
        sizes: tuple[tuple[int, int], ...] = field(default=(), validator=each(each(PIXELS)))

        def __attrs_post_init__(self) -> None:
            if self.shares and len(self.shares) != self.steps:
                raise ConfigError(
                    f"shares has {len(self.shares)} ratios for {self.steps} steps of the student; give one for each"
                )

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        if pipeline.sampler is None:
            raise ConfigError(
                "trajectory_regression: the pipeline has no sampler; start from a checkpoint that can draw"
            )
        if not _is_euler(pipeline.sampler):
            raise ConfigError(
                f"trajectory_regression: {name_of(pipeline.sampler)} does not step by Euler's method, as the student "
                "does; name one that does in the recipe: pipeline: {start: …, sampler: euler}"
            )
        teacher = teacher_of("trajectory_regression", config.teacher, pipeline)
        scale = teacher.guidance_scale if config.guidance_scale is None else config.guidance_scale
        if scale == 1 and config.teacher_steps == 1 and config.teacher is None:
            raise ConfigError(
                "trajectory_regression: one step of the teacher without guidance is the student's own step; "
                "use teacher_steps: 2 or more, or a guidance_scale other than 1"
            )
        self.config, self.pipeline, self.guidance = config, pipeline, float(scale)
        self.teacher = teacher.backbone
        self._teacher_version = teacher.version
        pipeline.presets |= {"steps": config.steps, "guidance_scale": 1.0}

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return {"student": self.pipeline.backbone}

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def update_order(self, step: int) -> Sequence[str]:
        return ("student",)

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Segment]]:
        """One batch of captions a step, cut into a part for each step of the student. Where there are fewer captions
        than steps, each is used several times: all processes must make as many passes, or with FSDP all would hang."""
        for batch in batches:
            grid, text = grid_of(self.pipeline, batch, self.config.sizes, rng), text_of_batch(self.pipeline, batch)
            step_of_row = _shared_out(max(self.config.steps, len(text)), self.config.shares or (1,) * self.config.steps)
            weight = len(text) / len(step_of_row)
            yield [
                Segment(text[[row % len(text) for row, of in enumerate(step_of_row) if of == step]], grid, step, weight)
                for step in range(self.config.steps)
            ]

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Segment, rng: torch.Generator) -> Loss:
        """`rng` gives the noise that the student begins with."""
        pipeline, config = self.pipeline, self.config
        student = velocity_of(modules["student"], batch.text)
        noise = torch.randn(len(batch), pipeline.vae.channels, *batch.size, generator=rng)
        noise = move(noise, batch.text.features.device)
        t, after = pipeline.sampler.times(batch.size, config.steps)[batch.number : batch.number + 2].tolist()
        x = ode(pipeline.sampler, student, noise, config.steps, batch.number, rng).float()
        wanted = mean_velocity(self.teacher, batch.text, self.guidance, x, t, after, config.teacher_steps)
        error = (student(x, flow.at(t, x)).float() - wanted).square().mean()
        # Against the best guess that is the same for all rows and places: what is left to learn, as a share.
        unexplained = error.detach() / wanted.var().clamp(min=1e-12)
        return Loss(error, {"unexplained": unexplained}, weight=batch.row_weight * len(batch))

    def state_dict(self) -> dict[str, Any]:
        """The teacher's hash: its weights are in its checkpoint."""
        return {"teacher": self._teacher_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_teacher("trajectory_regression", state["teacher"], self._teacher_version)


@torch.no_grad()
def mean_velocity(
    teacher: nn.Module, text: TextFeatures, guidance: float, x: Tensor, t: float, after: float, count: int
) -> Tensor:
    """Of `count` guided Euler steps of the teacher from t to `after`, evenly divided: the velocity that leads there in
    one step."""
    conditional, unconditional = velocity_of(teacher, text), velocity_of(teacher, empty_text(text))
    by = (after - t) / count
    total = torch.zeros_like(x)
    for i in range(count):
        at = flow.at(t + i * by, x)
        v = conditional(x, at)
        # Two passes, however small the batch: the pipeline joins small ones, and processes may differ in size.
        if guidance != 1:
            v = flow.guide(v, unconditional(x, at), guidance)
        total += v
        x = x + by * v
    return total / count


def _shared_out(rows: int, ratios: Sequence[float]) -> list[int]:
    """The step of each of `rows` rows, at least as many as steps: every step has one row or more, and after that each
    row goes to the step that is furthest behind its share. Equal shares give 0, 1, 2, ..., 0, 1, 2, ..."""
    counts, steps = [1] * len(ratios), list(range(len(ratios)))
    while len(steps) < rows:
        step = min(range(len(ratios)), key=lambda i: counts[i] / ratios[i])
        counts[step] += 1
        steps.append(step)
    return steps


def _is_euler(sampler: Sampler) -> bool:
    """Whether four steps along the velocities 1, 2, 3 and 4 are those of Euler's method."""
    if getattr(sampler, "stochastic", False):  # it adds noise
        return False
    calls = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(x, calls)

    with torch.device("cpu"):  # a dry run builds on the device meta, where nothing has a value
        *_, (_, end) = sampler.sample(velocity, torch.zeros(1, 1, 2, 2), 4)
        euler = (sampler.times((2, 2), 4).diff() * torch.arange(1, 5)).sum()
    return bool((end - euler).abs().max() < 1e-4)
