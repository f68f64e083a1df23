"""The sampler euler: the published schedule, and exact steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lens_flow.euler import Euler, published_mu

from lens_core.flow import guide
from lens_core.testing import check_sampler
from lens_core.types import ConfigError

EULER = Euler(Euler.Config())


@pytest.mark.parametrize(
    ("side", "steps", "mu"), [(1024, 4, 2.291), (1024, 20, 2.198), (1024, 50, 2.023), (1440, 20, 1.828)]
)
def test_mu_has_the_published_values(side, steps, mu):
    assert published_mu((side // 16) ** 2, steps) == pytest.approx(mu, abs=5e-4)


def test_above_4300_tokens_mu_ignores_the_steps():
    assert published_mu(4301, 4) == published_mu(4301, 50)
    assert published_mu(4300, 4) != published_mu(4300, 50)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (46, 92), (90, 90)])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_the_times_are_those_of_diffusers(size, steps, tmp_path):
    Euler(Euler.Config()).save(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.use_dynamic_shifting and scheduler.config.time_shift_type == "exponential"
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=published_mu(size[0] * size[1], steps))
    times = EULER.times(size, steps)
    assert times.dtype == torch.float32
    assert torch.equal(times, scheduler.sigmas)


@pytest.mark.parametrize("mu", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_mu_that_is_set_is_a_fixed_shift_of_diffusers(mu, steps, tmp_path):
    sampler = Euler(Euler.Config(mu=mu))
    sampler.save(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    torch.testing.assert_close(sampler.times((8, 8), steps), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mu", [None, -1.0])
def test_it_keeps_the_contract_of_a_sampler(mu):
    check_sampler(Euler(Euler.Config(mu=mu)))


def test_mu_can_be_set():
    even = Euler(Euler.Config(mu=0.0)).times((64, 64), 4)
    torch.testing.assert_close(even, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    shifted = Euler(Euler.Config(mu=math.log(3))).times((8, 8), 2)
    torch.testing.assert_close(shifted, torch.tensor([1, 0.75, 0]))


def test_a_linear_velocity_is_integrated_by_products():
    noise = torch.ones(1, 1, 2, 2)
    times = Euler(Euler.Config(mu=0.0)).times((2, 2), 4)
    # dx/dt = x: each quarter step multiplies by 3/4
    walk = list(Euler(Euler.Config(mu=0.0)).sample(lambda x, t: x, noise, 4))
    for k, (t, x) in enumerate(walk, 1):
        assert t == float(times[k])
        assert torch.equal(x, noise * 0.75**k)


def test_the_velocity_sees_float32_and_the_time_before_the_step():
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        assert x.dtype == torch.float32 and t.dtype == torch.float32
        return x.bfloat16()

    walk = list(EULER.sample(velocity, torch.ones(3, 1, 2, 2, dtype=torch.bfloat16), 4))
    assert torch.equal(torch.stack(seen), EULER.times((2, 2), 4)[:-1, None].expand(4, 3))
    assert all(x.dtype == torch.float32 for _, x in walk)


def test_guidance_keeps_each_tokens_conditional_norm():
    draw = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 3, 2, 2, generator=draw)
    cond[0, :, 0, 0] = uncond[0, :, 0, 0] = 0
    guided = guide(cond, uncond, 5.0)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                c, u = cond[b, :, i, j].tolist(), uncond[b, :, i, j].tolist()
                comb = [q + 5 * (p - q) for p, q in zip(c, u, strict=True)]
                norm = math.hypot(*comb)
                scale = math.hypot(*c) / norm if norm else 1.0
                torch.testing.assert_close(guided[b, :, i, j], torch.tensor([k * scale for k in comb]))


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ConfigError, match=f"the number of steps is {steps}"):
        EULER.times((8, 8), steps)


def test_an_infinite_mu_is_refused():
    with pytest.raises(ConfigError, match="mu: must be finite"):
        Euler.Config(mu=math.inf)


@pytest.mark.parametrize(("mu", "steps"), [(20.0, 40), (12.0, 100), (14.0, 50), (15.0, 30)])
def test_times_that_float32_does_not_tell_apart_are_refused(mu: float, steps: int) -> None:
    sampler = Euler(Euler.Config(mu=mu))
    with pytest.raises(ConfigError, match=rf"with mu {mu:g} some of the times of {steps} steps are equal in float32"):
        sampler.times((4, 4), steps)
    assert len(sampler.times((4, 4), 1)) == 2
