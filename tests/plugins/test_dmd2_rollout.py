"""Rollouts: a student learns at the points its own sampling will pass, on the sampler's own grid."""

from __future__ import annotations

import pytest
import torch
import toy
from lens_dmd2.rollout import ode, renoise
from lens_flow.euler import Euler
from lens_flow.solvers import EulerAncestral
from torch import Tensor

from lens_core import flow

EULER = Euler(Euler.Config())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Field:
    """A velocity that remembers at which times it was asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert len(set(t.tolist())) == 1
        self.times.append(float(t[0]))
        return torch.tanh(x.flip(1)) + t.view(-1, 1, 1, 1)


def noise(h: int = 2, w: int = 3) -> Tensor:
    return torch.randn(4, 2, h, w, generator=rng(5))


@pytest.mark.parametrize("size", [(2, 3), (32, 32), (66, 66)])
def test_an_ode_rollout_and_its_exit_step_are_the_samplers_walk(size: tuple[int, int]) -> None:
    walk = list(EULER.sample(Field(), noise(*size), 4))
    grid = EULER.times(size, 4)
    for count in range(4):
        field = Field()
        x = ode(EULER, field, noise(*size), 4, count, rng())
        assert torch.equal(x, noise(*size) if count == 0 else walk[count - 1][1])
        assert field.times == grid[:count].tolist()
        row = grid[count].expand(4)
        then = x + (grid[count + 1] - grid[count]) * Field()(x, row)
        torch.testing.assert_close(then, walk[count][1])


def test_an_ode_rollout_of_a_sampler_that_adds_noise_is_that_samplers_walk() -> None:
    ancestral, drawn = EulerAncestral(EulerAncestral.Config()), rng(3)
    walk = list(ancestral.sample(Field(), noise(), 4, draw=lambda: torch.randn(noise().shape, generator=drawn)))
    for count in range(1, 4):
        assert torch.equal(ode(ancestral, Field(), noise(), 4, count, rng(3)), walk[count - 1][1])
    assert not torch.equal(ode(ancestral, Field(), noise(), 4, 3, rng(4)), walk[2][1])


def test_the_grid_goes_with_the_size_of_the_picture() -> None:
    # reference grids at 512, 1024 and 1056 px: the schedule jumps above 4300 cells
    grids = [EULER.times((n, n), 4)[:4].tolist() for n in (32, 64, 66)]
    for levels, published in zip(
        grids, [(1, 0.958, 0.884, 0.718), (1, 0.967, 0.908, 0.767), (1, 0.908, 0.768, 0.524)], strict=True
    ):
        assert levels == pytest.approx(published, abs=6e-4)
    for n, grid in zip((32, 64, 66), grids, strict=True):
        for rollout in (ode, renoise):
            field = Field()
            rollout(EULER, field, torch.zeros(1, 2, n, n), 4, 3, rng())
            assert field.times == grid[:3]


def test_a_renoising_rollout_mixes_each_guess_with_new_noise() -> None:
    x, draws, times = noise(), rng(), toy.Even(toy.Even.Config()).times((2, 3), 4)
    for i in range(3):
        row = times[i].expand(4)
        guess = x - times[i] * Field()(x, row)
        x = (1 - times[i + 1]) * guess + times[i + 1] * torch.randn(x.shape, generator=draws)
    x_end = renoise(toy.Even(toy.Even.Config()), Field(), noise(), 4, 3, rng())
    torch.testing.assert_close(x_end, x)
    other = renoise(toy.Even(toy.Even.Config()), Field(), noise(), 4, 3, rng(1))
    assert not torch.allclose(x_end, other, atol=0.1)


@pytest.mark.parametrize("rollout", [ode, renoise])
def test_a_rollout_of_a_perfect_model_stays_on_its_path(rollout: type) -> None:
    data = torch.randn(4, 2, 2, 3, generator=rng(2))

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        return (x - data) / t.view(-1, 1, 1, 1)

    x = rollout(EULER, perfect, noise(), 4, 3, rng())
    t = EULER.times((2, 3), 4)[3].expand(4)
    torch.testing.assert_close(flow.data_from(x, perfect(x, t), t), data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rollout", [ode, renoise])
def test_no_gradient_enters_a_rollout(rollout: type) -> None:
    weight = torch.ones(1, requires_grad=True)
    grad_enabled = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        grad_enabled.append(torch.is_grad_enabled())
        return weight * x

    assert not rollout(EULER, velocity, noise(), 4, 3, rng()).requires_grad
    assert grad_enabled == [False] * 3 and torch.is_grad_enabled()
