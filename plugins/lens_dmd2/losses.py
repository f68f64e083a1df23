"""Distribution matching and what stabilises it, as pure functions (DMD2; Decoupled DMD; SenseFlow; APT).

x is the student's guess of the data, [B,C,h,w]; x_t is x with noise at t [B]. The velocities are the teacher's with the
caption (cond), without it (uncond) and guided, and the fake score network's, which follows the student. g is the
gradient on x. Papers: DMD (Yin et al., 2023), DMD2 (arXiv 2405.14867), Decoupled DMD (Liu et al., 2025), SenseFlow (Ge
et al., 2025), APT (Lin et al., 2025). Their equations are rewritten for t = 1 noise and velocities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.flow import Velocity
from lens_core.types import ConfigError, move


def shifted(u: Tensor, shift: float) -> Tensor:
    """Even times to the times of a schedule: t = k u / (1 + (k - 1) u), for the shift k. Keeps 0, 1 and the order."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(t: float, shift: float) -> float:
    """The inverse of `shifted`."""
    return t / (shift - (shift - 1) * t)


def even(rows: int, rng: torch.Generator) -> Tensor:
    """u [B], even in [0, 1)."""
    return torch.rand(rows, generator=rng)


def logit_normal(rows: int, rng: torch.Generator) -> Tensor:
    """u [B] in (0, 1) with logit(u) ~ N(0, 1): the middle more often than the ends (SenseFlow's for the fake)."""
    return torch.randn(rows, generator=rng).sigmoid()


NOISE_LEVELS = {"even": even, "logit_normal": logit_normal}
"""Name -> a function of (rows, rng): noise levels before they are shifted."""


@frozen
class Schedule:
    """Which noise levels things are compared at."""

    shift: float
    noise_levels: str = "even"


def noised(x: Tensor, rng: torch.Generator, schedule: Schedule, until: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t float32 [B], noise), each row at its own t <= `until`; before the shift, the schedule's levels shrunk."""
    u = NOISE_LEVELS[schedule.noise_levels](len(x), rng)
    t = shifted(u * unshifted(until, schedule.shift), schedule.shift)
    t, noise = (move(part, x.device) for part in (t, torch.randn(x.shape, generator=rng, dtype=x.dtype)))
    return flow.mix(x, noise, t), t, noise


# ---- distribution matching ------------------------------------------------------------------------------------


def gradient(
    x: Tensor, x_t: Tensor, t: Tensor, ahead: Tensor, behind: Tensor, anchor: Tensor, min_distance: float
) -> Tensor:
    """g = (behind's guess of the data - ahead's), over the mean distance, a row, of x from anchor's guess
    (at least `min_distance`).

    x - g moves from where `behind` expects the data towards where `ahead` does. All three are velocities at x_t.
    Source: DMD2's distribution matching gradient; the normaliser is equation 8 of DMD.
    """
    # In velocities the two guesses x_t - t v differ by t (ahead - behind). The normaliser makes steps of equal size at
    # all t: near t = 1 guesses are poor and far from x, and their difference alone would rule the sum.
    away = (x - flow.data_from(x_t, anchor, t)).abs().flatten(1).mean(1).clamp(min=min_distance)
    return t.to(x.dtype).view(-1, 1, 1, 1) * (ahead - behind) / away.view(-1, 1, 1, 1)


def descend(x: Tensor, g: Tensor) -> Tensor:
    """1/2 mean (x - sg(x - g))^2: its value is 1/2 mean g^2, its gradient on x is g / numel."""
    # Grouped so that x cancels exactly: x - (x - g) would round g to the precision of x.
    return 0.5 * (x - x.detach() + g.detach()).square().mean()


@frozen
class Views:
    """Three velocities at x_t; `guidance` is the teacher's scale."""

    cond: Velocity
    uncond: Velocity
    fake: Velocity
    guidance: float

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's (cond, guided) velocities."""
        cond = self.cond(x, t)
        return cond, cond if self.guidance == 1 else flow.guide(cond, self.uncond(x, t), self.guidance)


@frozen
class Matching:
    """The gradient on x, and what predicts collapse: `gap` is the rms of teacher - fake over the teacher's,
    `cosine` is between the two."""

    g: Tensor
    parts: Mapping[str, Tensor]


@frozen
class MatchingOptions:
    """How the gradient of distribution matching is normalised and weighted."""

    schedule: Schedule
    min_distance: float  # least distance that a gradient is divided by
    ca_weight: float = 1.0
    dm_weight: float = 1.0


@torch.no_grad()
def joint(x: Tensor, views: Views, until: float, options: MatchingOptions, rng: torch.Generator) -> Matching:
    """DMD2: from the fake to the guided teacher, at noise levels over the full range. `until` is not used."""
    x_t, t, _ = noised(x, rng, options.schedule)
    _, guided = views.both(x_t, t)
    fake = views.fake(x_t, t)
    return Matching(gradient(x, x_t, t, guided, fake, guided, options.min_distance), _agreement(guided, fake))


@torch.no_grad()
def decoupled(x: Tensor, views: Views, until: float, options: MatchingOptions, rng: torch.Generator) -> Matching:
    """Decoupled DMD: CA, the engine, goes from the teacher to itself guided; DM, the shield, from fake to teacher.

    The noise levels of CA are cleaner than `until`, the time of the step that made x; those of DM are not bounded.
    `ca_dm_ratio` is the ratio of the two gradients' norms.
    """
    # Guidance decides structure that the rollout has settled by `until`: at noisier levels than that, CA would rewrite
    # what this step can no longer change. In the paper's ablation this combination scores best.
    x_t, t, _ = noised(x, rng, options.schedule, until)
    cond, guided = views.both(x_t, t)
    ca = options.ca_weight * gradient(x, x_t, t, guided, cond, cond, options.min_distance)
    # New noise: the two terms are estimates of their own, each with its own normaliser.
    x_t, t, _ = noised(x, rng, options.schedule)
    cond, fake = views.cond(x_t, t), views.fake(x_t, t)
    dm = options.dm_weight * gradient(x, x_t, t, cond, fake, cond, options.min_distance)
    return Matching(ca + dm, {**_agreement(cond, fake), "ca_dm_ratio": ratio(ca, dm)})


MATCHINGS = {"joint": joint, "decoupled": decoupled}
"""Name -> a function of (x, views, until, options, rng)."""


def _agreement(teacher: Tensor, fake: Tensor) -> dict[str, Tensor]:
    cosine = F.cosine_similarity(teacher.flatten(1), fake.flatten(1)).mean()
    return {"gap": ratio(teacher - fake, teacher), "cosine": cosine}


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Of two norms; finite where b is 0."""
    quotient: Tensor = a.norm() / b.norm().clamp(min=1e-12)
    return quotient


# ---- what goes with it ----------------------------------------------------------------------------------------


def tracking(v: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The loss of the fake score network: flow matching on what the student makes (DMD2)."""
    error: Tensor = v - flow.velocity(x, noise)
    return error.square().mean()


def real_or_fake(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, of logits that are high for real pictures."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def passes_as_real(fake: Tensor) -> Tensor:
    """The student's loss against the discriminator (non-saturating)."""
    return F.softplus(-fake).mean()


def approximate_r1(logits: Callable[[Tensor], Tensor], x_t: Tensor, at: Tensor, sigma: float, n: Tensor) -> Tensor:
    """E (D(x_t) - D(x_t + sigma n))^2 / sigma^2, about the squared norm of D's gradient (APT's approximate R1).

    x_t is *noised* real data, as D sees it, `at` = D(x_t), n ~ N(0, 1). D's rows must not depend on each other.
    """
    # Finite differences, for the exact R1 needs second derivatives, which fused attention does not have.
    change: Tensor = (logits(x_t + sigma * n) - at) / sigma
    return change.square().mean()


def guidance_within_a_step(
    student: Velocity, teacher: Velocity, x: Tensor, v: Tensor, t: float, after: float, u: float
) -> Tensor:
    """SenseFlow's ISG: the step from t to `after` in one, against the teacher to a time within it and then the student.

    v is the student's velocity at (x, t) and alone has a gradient. The time is the share u in (0, 1) of the way.
    """
    middle = t + u * (after - t)
    with torch.no_grad():
        start = x.detach()
        halfway = start + (middle - t) * teacher(start, x.new_full((len(x),), t, dtype=torch.float32))
        target = halfway + (after - middle) * student(halfway, x.new_full((len(x),), middle, dtype=torch.float32))
    error: Tensor = start + (after - t) * v - target
    return error.square().mean()


@torch.no_grad()
def align(fake: nn.Module, student: nn.Module, keep: float) -> None:
    """SenseFlow's IDA: fake <- keep fake + (1 - keep) student, in place, for every parameter.

    Raises ConfigError for adapters: between two products of low rank, the middle of the factors is another matrix.
    """
    mine, theirs = dict(fake.named_parameters()), dict(student.named_parameters())
    if mine.keys() != theirs.keys() or any("lora_" in name for name in mine):
        raise ConfigError("dmd2: ida averages whole weights, and an adapter is learning; use ida: 1")
    torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - keep)
