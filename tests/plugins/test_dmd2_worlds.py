"""Distribution matching where the answer is known: exact Gaussians, and a mixture whose fake has to learn."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from attrs import frozen
from lens_dmd2 import losses
from lens_dmd2.losses import MatchingOptions, Schedule, Views
from lens_dmd2.method import DMD2, MicroBatch
from torch import Tensor, nn

from lens_core.types import TextFeatures

DOUBLE = torch.float64

# ---- a Gaussian teacher, an affine student, a fake that is always right ------------------------------------------

MEAN = torch.tensor([1.0, 0.5], dtype=DOUBLE)
ROOT = torch.tensor([[0.6, 0.0], [0.2, 0.5]], dtype=DOUBLE)
COVARIANCE = ROOT @ ROOT.T
SPREAD = float(torch.linalg.matrix_norm(ROOT, 2))  # 0.67: the largest standard deviation


def gaussian(mean: Tensor, covariance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """E[noise - data | x_t] for data ~ N(mean, covariance), in two dimensions."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t, y = t.to(DOUBLE).view(-1, 1), x.flatten(1)
        total = (1 - t[..., None]) ** 2 * covariance + t[..., None] ** 2 * torch.eye(2, dtype=DOUBLE)
        off = torch.linalg.solve(total, y - (1 - t) * mean)
        return ((y - mean - (1 - t) * off @ covariance) / t).view_as(x)

    return velocity


@frozen
class End:
    """Where a student is after its training: distances of its moments from the teacher's, and its widest spread."""

    mean: float
    covariance: float
    spread: float


def distil(matching: str, options: MatchingOptions, guidance: float = 1.0, steps: int = 400, rate: float = 1.0) -> End:
    """x = noise A' + b, from A = 1 and b = 0, by plain gradient descent whose rate falls to 0."""
    draws = torch.Generator().manual_seed(0)
    a, b = torch.eye(2, dtype=DOUBLE).requires_grad_(), torch.zeros(2, dtype=DOUBLE).requires_grad_()
    cond, uncond = gaussian(MEAN, COVARIANCE), gaussian(0 * MEAN, torch.eye(2, dtype=DOUBLE))
    for step in range(steps):
        x = (torch.randn(64, 2, generator=draws, dtype=DOUBLE) @ a.T + b).view(-1, 2, 1, 1)
        views = Views(cond, uncond, gaussian(b.detach(), (a @ a.T).detach()), guidance)
        g = losses.MATCHINGS[matching](x.detach(), views, 0.95, options, draws).g
        grads = torch.autograd.grad(losses.descend(x, g), (a, b))
        with torch.no_grad():
            for parameter, grad in zip((a, b), grads, strict=True):
                parameter -= rate * (1 - step / steps) * grad
    covariance = (a @ a.T).detach()
    spread = float(torch.linalg.matrix_norm(a.detach(), 2))
    return End(float((b.detach() - MEAN).norm()), float((covariance - COVARIANCE).norm()), spread)


@pytest.mark.parametrize(
    ("matching", "options", "guidance", "rate", "bars"),
    [
        ("joint", MatchingOptions(Schedule(3.0), 0.1), 1.0, 1.0, (2.8e-9, 4e-11)),
        ("joint", MatchingOptions(Schedule(3.0), 1e9), 1.0, 1e9, (2e-4, 2e-6)),  # never normalised: slower
        ("decoupled", MatchingOptions(Schedule(3.0), 0.1, ca_weight=0.0), 5.0, 1.0, (2.8e-9, 4e-11)),  # DM alone
    ],
)
def test_a_student_ends_exactly_at_the_teachers_gaussian(
    matching: str, options: MatchingOptions, guidance: float, rate: float, bars: tuple[float, float]
) -> None:
    end = distil(matching, options, guidance, rate=rate)
    assert end.mean < bars[0] and end.covariance < bars[1]
    flipped = distil(matching, options, guidance, steps=100, rate=-rate)
    assert flipped.mean > 10 and flipped.covariance > 10, "a flipped sign must not pass"


def test_ca_alone_collapses_and_runs_away_while_dm_holds_it() -> None:
    ca = distil("decoupled", MatchingOptions(Schedule(3.0), 0.1, dm_weight=0.0), guidance=5.0)
    both = distil("decoupled", MatchingOptions(Schedule(3.0), 0.1), guidance=5.0)
    longer = distil("decoupled", MatchingOptions(Schedule(3.0), 0.1), guidance=5.0, steps=600)
    assert ca.spread < 0.1 * SPREAD and ca.mean > 2
    assert 0.75 * SPREAD < both.spread < 1.25 * SPREAD and both.mean < 0.4
    assert longer.mean == pytest.approx(both.mean, abs=0.1) and longer.spread == pytest.approx(both.spread, abs=0.1)


# ---- a mixture of three, one step, and a fake that has to learn ---------------------------------------------------

CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.6], [-1.0, -1.6]])
SHARES = torch.tensor([0.5, 0.3, 0.2])
WIDTH = 0.4


class Mixture(nn.Module):
    """The exact velocity of a mixture of three round Gaussians."""

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        t, y = t.view(-1, 1, 1), x.flatten(1)[:, None]
        variance = (1 - t) ** 2 * WIDTH**2 + t**2
        off = y - (1 - t) * CENTRES
        share = (SHARES.log() - off.square().sum(-1) / (2 * variance[..., 0])).softmax(1)[..., None]
        data = share * (CENTRES + (1 - t) * WIDTH**2 / variance * off)
        return ((y - data.sum(1, keepdim=True)) / t).view_as(x)


class Net(nn.Module):
    """A small velocity field."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        t = t.view(-1, 1)
        out: Tensor = self.net(torch.cat([x.flatten(1), t, t * t, (3 * t).cos(), (6 * t).cos()], 1))
        return out.view_as(x)


def student() -> DMD2:
    """The method itself, in one step without guidance, with the exact teacher in the place of the copy."""
    torch.manual_seed(0)
    pipeline: Any = SimpleNamespace(
        backbone=Net(),
        sampler=toy.Even(toy.Even.Config()),
        vae=SimpleNamespace(channels=2, downscale=1),
        presets={"steps": 20, "guidance_scale": 1.0},
        version="",
    )
    m = DMD2(DMD2.Config(steps=1, matching="joint", shift=1.0, ida=1.0), pipeline)
    m.teacher = Mixture()
    return m


def train(m: DMD2, steps: int, sign: float = 1.0, warmup: int = 100) -> None:
    """One update of the fake for each of the generator, after `warmup` of the fake alone."""
    batch = MicroBatch(TextFeatures(torch.zeros(128, 1, 0, 1), torch.zeros(128, 0, dtype=torch.bool)), (1, 1))
    draws, rates = torch.Generator().manual_seed(1), {"fake": 5e-3, "generator": 1e-3}
    optimizers = {
        module_name: torch.optim.Adam(
            m.trainable_modules()[module_name].parameters(), rate, betas=(0.5, 0.99), fused=True
        )
        for module_name, rate in rates.items()
    }
    for step in range(-warmup, steps):
        for module_name in ("fake", "generator")[: 1 if step < 0 else 2]:
            m.trainable_modules()[module_name].requires_grad_(True)
            total = m.loss(module_name, m.trainable_modules(), batch, draws).total * (
                sign if module_name == "generator" else 1
            )
            optimizers[module_name].zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizers[module_name].param_groups[0]["lr"] = rates[module_name] * max(0.02, min(1, 2 - 2 * step / steps))
            optimizers[module_name].step()
            m.trainable_modules()[module_name].requires_grad_(False)


def errors(m: DMD2) -> tuple[float, float, float]:
    """Of 20,000 draws: the largest errors of the mean, of the covariance and of a mode's share."""
    noise = torch.randn(20_000, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x = (noise - m.trainable_modules()["generator"](noise, torch.ones(len(noise)), None)).flatten(1)
    mean = SHARES @ CENTRES
    covariance = torch.diag(SHARES.sqrt()) @ (CENTRES - mean)
    nearest = torch.cdist(x, CENTRES).argmin(1)
    return (
        float((x.mean(0) - mean).abs().max()),
        float((torch.cov(x.T) - covariance.T @ covariance - WIDTH**2 * torch.eye(2)).abs().max()),
        float((torch.bincount(nearest, minlength=3) / len(x) - SHARES).abs().max()),
    )


def test_a_student_with_a_learned_fake_finds_the_mixture() -> None:
    m = student()
    before = errors(m)
    assert before[0] > 0.4 and before[1] > 1 and before[2] > 0.1
    train(m, 800)
    mean, covariance, share = errors(m)
    assert mean < 0.08 and covariance < 0.2 and share < 0.02


def test_a_student_that_descends_the_wrong_way_leaves_the_mixture() -> None:
    m = student()
    before = errors(m)
    train(m, 80, sign=-1)
    assert errors(m)[0] > 2 * before[0]
