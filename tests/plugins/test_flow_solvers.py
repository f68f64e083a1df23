"""The other samplers: each arrives where the flow does, at its order, or keeps its distribution."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import lens_flow
import pytest
import torch
import toy
from attrs import evolve
from lens_flow.euler import Euler
from lens_flow.solvers import DPMpp, EulerAncestral, Heun
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, PipelineSpec
from lens_core.testing import check_sampler
from lens_core.types import ConfigError

MEAN, SPREAD = 0.7, 0.4  # of the data, a Gaussian: its flow is known
EVEN = {"mu": 0.0}


def spread(t: Tensor | float) -> Tensor:
    """The standard deviation of (1 - t) data + t noise."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.sqrt((1 - t) ** 2 * SPREAD**2 + t**2)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x_t = x] for Gaussian data, in closed form."""
    t = t.double().view(-1, 1, 1, 1)
    away = x.double() - (1 - t) * MEAN
    return ((t - (1 - t) * SPREAD**2) / spread(t) ** 2 * away - MEAN).to(torch.float64)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self.double())


def error(sampler, steps: int) -> float:
    noise = torch.linspace(-2, 2, 8, dtype=torch.float64).view(1, 1, 2, 4)
    *_, (t, x) = sampler.sample(velocity, noise, steps)
    assert t == 0
    return float((x - (MEAN + SPREAD * noise)).abs().max())


@pytest.mark.parametrize(("cls", "order"), [(Euler, 1), (Heun, 2), (DPMpp, 2)])
def test_the_error_falls_at_the_order_of_the_method(cls, order, float64):
    sampler = cls(cls.Config(**EVEN))
    errors = [error(sampler, steps) for steps in (64, 128, 256, 512)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.25), (errors, slopes)


def test_on_the_same_budget_the_second_order_is_nearer(float64):
    euler, heun, dpmpp = (c(c.Config(**EVEN)) for c in (Euler, Heun, DPMpp))
    assert error(dpmpp, 20) < error(euler, 20) / 3
    assert error(heun, 10) < error(euler, 19) / 2  # 19 passes each


@pytest.mark.parametrize("cls", [Heun, DPMpp])
@pytest.mark.parametrize("mu", [None, -1.0])
def test_they_keep_the_contract_of_a_sampler(cls, mu):
    check_sampler(cls(cls.Config(mu=mu)))


@pytest.mark.parametrize("steps", [1, 2])
def test_where_there_is_no_step_before_dpmpp_is_euler(steps):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (list(c(c.Config()).sample(lambda x, t: x.tanh(), noise, steps)) for c in (DPMpp, Euler))
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_passes_are_counted():
    seen: list[float] = []

    def count(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x

    passes = {}
    for cls in (Euler, Heun, DPMpp):
        seen.clear()
        list(cls(cls.Config()).sample(count, torch.ones(1, 1, 2, 2), 6))
        passes[cls.__name__] = len(seen)
        assert min(seen) > 0
    assert passes == {"Euler": 6, "Heun": 11, "DPMpp": 6}


@pytest.mark.parametrize("cls", [Euler, Heun, DPMpp])
def test_a_walk_that_starts_later_is_the_rest_of_the_whole_one(cls):
    sampler = cls(cls.Config())
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = list(sampler.sample(lambda x, t: x.sin(), noise, 6))
    rest = list(sampler.sample(lambda x, t: x.sin(), whole[1][1], 6, 2))
    assert [t for t, _ in rest] == [t for t, _ in whole[2:]]
    if cls is not DPMpp:  # which remembers the step before
        assert torch.equal(rest[-1][1], whole[-1][1])


# ---- euler_ancestral -------------------------------------------------------------------------------------------------


def noisy(eta: float = 1.0) -> EulerAncestral:
    return EulerAncestral(EulerAncestral.Config(eta=eta, **EVEN))


def walk(sampler: EulerAncestral, count: int, steps: int, seed: int = 0) -> list[tuple[float, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 1, 1, generator=rng, dtype=torch.float64)
    return list(sampler.sample(velocity, noise, steps, 0, lambda: torch.randn(noise.shape, generator=rng)))


def test_without_new_noise_it_is_euler():
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = list(noisy(0.0).sample(lambda x, t: x.tanh(), noise, 5, 0, lambda: pytest.fail("nothing is to be drawn")))
    theirs = list(Euler(Euler.Config(**EVEN)).sample(lambda x, t: x.tanh(), noise, 5))
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_every_marginal_is_that_of_the_flow():
    path = walk(noisy(), 40_000, 100)
    for t, x in path[9::10]:
        x = x.double()
        # of 40,000 draws, the mean is known to 0.5 % of the spread, the spread to 0.35 %; Euler's own error is larger
        assert float(x.mean()) == pytest.approx((1 - t) * MEAN, abs=0.03 * float(spread(t)))
        assert float(x.std()) == pytest.approx(float(spread(t)), rel=0.04)
    # negative control: the same step back without shrinking what is there would grow the spread beyond that
    assert float(path[49][1].std()) < 1.1 * float(spread(path[49][0]))


def test_where_it_ends_has_little_to_do_with_where_it_began():
    rng = torch.Generator().manual_seed(5)
    start = torch.randn(20_000, 1, 1, 1, generator=rng, dtype=torch.float64)

    def correlation(eta: float) -> float:
        ends = list(noisy(eta).sample(velocity, start, 30, 0, lambda: torch.randn(start.shape, generator=rng)))[-1][1]
        return float(torch.corrcoef(torch.stack([start.flatten(), ends.double().flatten()]))[0, 1])

    assert correlation(0.0) == pytest.approx(1, abs=1e-6)
    assert abs(correlation(1.0)) < 0.2


def test_it_says_that_it_needs_noise():
    with pytest.raises(ConfigError, match="none to draw; use euler"):
        next(noisy().sample(velocity, torch.zeros(1, 1, 1, 1), 4))
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="eta: must be"):
            EulerAncestral.Config(eta=eta)


def test_another_sampler_keeps_the_shift_of_the_one_before_and_what_it_does_not_know_is_left() -> None:
    catalog = Catalog.of(toy, lens_flow)
    parts = evolve(toy.PARTS, sampler=ComponentSpec("euler_ancestral", {"mu": 0.7, "eta": 0.5}))
    pipeline = LensPipeline.from_parts(parts, catalog)
    times = pipeline.sampler.times((4, 4), 5)
    for name, options in (("heun", {"mu": 0.7}), ("dpmpp", {"mu": 0.7}), ("euler_ancestral", {"mu": 0.7, "eta": 1.0})):
        pipeline.use_sampler(name)
        assert dict(pipeline.specs["sampler"].options) == options
        assert torch.equal(pipeline.sampler.times((4, 4), 5), times)
    pipeline.use_sampler("heun", mu=0.2)
    assert pipeline.specs["sampler"].options["mu"] == 0.2
    pipeline.use_sampler("euler", mu=None)
    assert torch.equal(pipeline.sampler.times((4, 4), 5), Euler(Euler.Config()).times((4, 4), 5))


def test_a_recipe_that_names_another_sampler_keeps_the_shift_of_its_start(tmp_path: Path) -> None:
    catalog = Catalog.of(toy, lens_flow)
    parts = evolve(toy.PARTS, sampler=ComponentSpec("euler", {"mu": 0.7}))
    LensPipeline.from_parts(parts, catalog).save_pretrained(tmp_path)
    for spec, mu in (({}, 0.7), ({"mu": None}, None), ({"mu": 0.1}, 0.1)):
        start = PipelineSpec(start=str(tmp_path), sampler=ComponentSpec("heun", spec))
        assert LensPipeline.from_parts(start, catalog).specs["sampler"].options["mu"] == mu
