"""The arithmetic of diffusion_nft: advantages, reflection, and the policy that its minimum is."""

from __future__ import annotations

import math

import pytest
import torch
from lens_nft.objective import Advantages, advantages, optimality, reflected_loss, squared_distance
from torch import Tensor

FORMS = pytest.mark.parametrize("normalise", [False, True], ids=["velocity", "x0"])
BOTH = {"beta": 0.3, "clip": 5.0}


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(count: int = 4, seed: int = 3) -> tuple[Tensor, ...]:
    """float64: v, old, target, each [B,2,3,2], and t [B] in [0.1, 0.9]."""
    g = rng(seed)
    v, old, target = (torch.randn(count, 2, 3, 2, generator=g, dtype=torch.float64) for _ in range(3))
    return v, old, target, 0.1 + 0.8 * torch.rand(count, generator=g, dtype=torch.float64)


def gradient(v: Tensor, old: Tensor, target: Tensor, t: Tensor, r: Tensor, **how: float) -> Tensor:
    v = v.clone().requires_grad_(True)
    reflected_loss(v, old, target, t, r, **{**BOTH, **how}).sum().backward()
    return v.grad


def group(values: list[float], min_std: float = 1e-4) -> Advantages:
    """Advantages of one group of one reward."""
    failed = torch.zeros(len(values), dtype=torch.bool)
    table = torch.tensor([values], dtype=torch.float64)
    return advantages(table, failed, [7] * len(values), (1.0,), min_std)


@FORMS
def test_at_the_old_policy_the_loss_does_not_know_the_reward(normalise):
    _, old, target, t = drawn()
    rewards = (torch.full((4,), r, dtype=torch.float64) for r in (0.0, 0.3, 1.0))
    losses = [reflected_loss(old, old, target, t, r, **BOTH, normalise=normalise) for r in rewards]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-14, atol=0)


@FORMS
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("clip", [2.5, 5.0, 10.0])
def test_at_the_old_policy_the_gradient_is_the_advantage_times_that_of_flow_matching(normalise, beta, clip):
    _, old, target, t = drawn()
    a = torch.tensor([-2.4, -0.5, 0.0, 2.0], dtype=torch.float64)
    grad = gradient(old, old, target, t, optimality(a, clip), beta=beta, clip=clip, normalise=normalise)
    # By hand: mean squared error of x_t - t v - data in each row, over its mean absolute value; or of v - target.
    v = old.clone().requires_grad_(True)
    over = t.view(-1, 1, 1, 1)
    error = over * (v - target)
    plain = (error**2).sum((1, 2, 3)) / error.detach().abs().sum((1, 2, 3)) if normalise else (v - target) ** 2 / 12
    (a.view(-1, *[1] * (plain.ndim - 1)) * plain).sum().backward()
    torch.testing.assert_close(grad, v.grad, rtol=1e-11, atol=1e-13)


@FORMS
def test_no_advantage_no_gradient_at_the_old_policy(normalise):
    _, old, target, t = drawn()
    assert gradient(old, old, target, t, torch.full((4,), 0.5), normalise=normalise).abs().max() < 1e-15


def test_off_the_old_policy_half_an_optimality_pulls_back_to_it():
    v, old, target, t = drawn()
    grad = gradient(v, old, target, t, torch.full((4,), 0.5), normalise=False)
    cosines = torch.cosine_similarity(grad.flatten(1), (v - old).flatten(1))
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_self_normalised_it_still_pulls_back_though_not_straight():
    old, target, d = (torch.randn(8, 16, 8, 8, generator=rng(n), dtype=torch.float64) for n in range(3))
    for length in (0.01, 0.3, 3.0):
        half = torch.full((8,), 0.5)
        grad = gradient(old + length * d, old, target, half, half, normalise=True)
        cosines = torch.cosine_similarity(grad.flatten(1), d.flatten(1))
        assert 0.96 < cosines.min() < cosines.max() < 1 - 1e-9


@FORMS
def test_good_and_bad_are_mirror_images(normalise):
    v, old, target, t = drawn()
    r = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    one = reflected_loss(v, old, target, t, r, **BOTH, normalise=normalise)
    other = reflected_loss(2 * old - v, old, target, t, 1 - r, **BOTH, normalise=normalise)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    assert not torch.allclose(one, reflected_loss(2 * old - v, old, target, t, r, **BOTH, normalise=normalise))


def test_in_velocities_the_loss_is_a_quadratic():
    v, old, target, t = drawn()
    r, beta = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64), 0.3
    e, d = old - target, v - old
    by_hand = (e * e / beta + (2 * (2 * r - 1)).view(-1, 1, 1, 1) * e * d + beta * d * d).sum((1, 2, 3)) / 12
    loss = reflected_loss(v, old, target, t, r, beta=beta, clip=4.0, normalise=False)
    torch.testing.assert_close(loss / 4.0, by_hand, rtol=1e-13, atol=0)


def test_self_normalised_the_good_branch_is_t_times_squared_over_absolute_error():
    v, old, target, t = drawn()
    loss = reflected_loss(v, old, target, t, torch.ones(4), beta=0.3, clip=1.0, normalise=True) * 0.3
    error = old + 0.3 * (v - old) - target
    by_hand = t * (error**2).mean((1, 2, 3)) / error.abs().mean((1, 2, 3))
    torch.testing.assert_close(loss, by_hand, rtol=1e-13, atol=0)
    # and in data space, as the paper's code writes it: x_t - t v+ - x0
    data = torch.randn(v.shape, generator=rng(9), dtype=torch.float64)
    over = t.view(-1, 1, 1, 1)
    miss = (data + over * target) - over * (old + 0.3 * (v - old)) - data
    torch.testing.assert_close(loss, (miss**2).mean((1, 2, 3)) / miss.abs().mean((1, 2, 3)), rtol=1e-10, atol=0)


def test_a_perfect_prediction_divides_by_no_zero():
    _, old, _, t = drawn()
    assert reflected_loss(old, old, old, t, torch.ones(4), **BOTH, normalise=True).tolist() == [0.0] * 4
    assert squared_distance(old, old).tolist() == [0.0] * 4


def test_optimality_is_a_half_for_the_average_and_saturates():
    a = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0])
    assert optimality(a, 5.0).tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1, 1])


def test_advantages_sum_to_zero_and_do_not_know_the_scale_of_the_reward():
    values = torch.rand(24, generator=rng()).double().tolist()
    one, other = group(values).value, group([250 * v - 17 for v in values]).value
    assert abs(float(one.sum())) < 1e-12
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert float(one.std(correction=0)) == pytest.approx(1)


def test_the_largest_advantage_in_a_group_of_24_is_the_root_of_23():
    result = group([1.0] + [0.0] * 23)
    assert float(result.value.max()) == pytest.approx(math.sqrt(23))
    assert float(result.value[1:].unique()) == pytest.approx(-1 / math.sqrt(23))


def test_a_judges_noise_below_the_floor_stays_small():
    noise = [0.5, 0.501] * 12
    assert float(group(noise).value.abs().max()) == pytest.approx(1)
    assert float(group(noise, min_std=0.05).value.abs().max()) == pytest.approx(0.0005 / 0.05)


def test_the_spread_of_a_whole_rollout_counts_differences_between_prompts():
    values = torch.tensor([[0.0, 1.0, 5.0, 7.0]])
    groups, failed = [2, 2, 9, 9], torch.zeros(4, dtype=torch.bool)
    apart = advantages(values, failed, groups, [1.0], 1e-4)
    assert apart.value.tolist() == pytest.approx([-1, 1, -1, 1])
    together = advantages(values, failed, groups, [1.0], 1e-4, over_rollout=True)
    spread = math.sqrt((3.25**2 + 2.25**2 + 1.75**2 + 3.75**2) / 4)
    assert together.value.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread, -1 / spread, 1 / spread])


def test_the_order_of_pictures_does_not_matter():
    g = rng()
    values, groups = torch.rand(2, 60, generator=g), (torch.arange(60) // 12 + 2**40).tolist()
    failed = torch.rand(60, generator=g) < 0.1
    order = torch.randperm(60, generator=g)
    for over_rollout in (False, True):
        one = advantages(values, failed, groups, [1.0, 0.3], 1e-4, over_rollout)
        other = advantages(values[:, order], failed[order], [groups[i] for i in order], [1.0, 0.3], 1e-4, over_rollout)
        torch.testing.assert_close(other.value, one.value[order], rtol=1e-12, atol=1e-13)
        assert torch.equal(other.valid, one.valid[order]) and torch.equal(other.zero_variance, one.zero_variance[order])


def test_group_ids_beyond_float_precision_stay_apart():
    values, none = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 1.0]]), torch.zeros(6, dtype=torch.bool)
    result = advantages(values, none, [2**60, 2**60, 2**60 + 1, 2**60 + 1, 2**60 + 2, 2**60 + 2], [1.0], 1e-4)
    assert result.value.tolist() == pytest.approx([-1, 1, -1, 1, 0, 0])
    assert result.zero_variance.tolist() == [False] * 4 + [True] * 2


def test_a_failed_picture_is_as_if_it_had_never_been():
    values, nan = [0.1, 0.9, 0.4, 0.6], math.nan
    with_it = advantages(torch.tensor([[*values, nan]]), torch.tensor([False] * 4 + [True]), [1] * 5, [1.0], 1e-4)
    torch.testing.assert_close(with_it.value[:4], group(values).value)
    assert with_it.valid.tolist() == [True] * 4 + [False] and float(with_it.value[4]) == 0
    # A value that stands beside the failure of another reward does not count either.
    both = advantages(
        torch.tensor([[*values, 100.0], [*values, nan]]), torch.tensor([False] * 4 + [True]), [1] * 5, [1.0, 1.0], 1e-4
    )
    torch.testing.assert_close(both.value[:4], group(values).value)


@pytest.mark.parametrize(("failures", "kept"), [(2, 2), (3, 0)])
def test_a_group_of_which_fewer_than_half_are_judged_is_masked(failures, kept):
    failed = torch.tensor([False] * (4 - failures) + [True] * failures)
    result = advantages(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), failed, [1] * 4, [1.0], 1e-4)
    assert int(result.valid.sum()) == kept and bool(result.value.any()) == (kept > 0)


def test_rewards_are_normalised_before_they_are_weighed():
    large, small = [0.0, 100.0, 0.0, 100.0], [0.0, 0.0, 0.1, 0.1]
    none = torch.zeros(4, dtype=torch.bool)
    result = advantages(torch.tensor([large, small]), none, [1] * 4, [3.0, 1.0], 1e-4)
    assert result.value.tolist() == pytest.approx([-1, 0.5, -0.5, 1])


def test_a_reward_that_abstains_on_a_group_leaves_it_to_the_others():
    nan, none = math.nan, torch.zeros(4, dtype=torch.bool)
    result = advantages(torch.tensor([[nan] * 4, [0.0, 1.0, 0.0, 1.0]]), none, [1] * 4, [3.0, 1.0], 1e-4)
    assert result.value.tolist() == pytest.approx([-1, 1, -1, 1]) and bool(result.valid.all())
    once = advantages(torch.tensor([[nan, 0.0, 2.0, 1.0]]), none, [1] * 4, [1.0], 1e-4)
    assert once.valid.tolist() == [False, True, True, True]
    assert once.value[1:].tolist() == pytest.approx([-math.sqrt(1.5), math.sqrt(1.5), 0])
    silent = advantages(torch.tensor([[nan] * 4]), none, [1] * 4, [1.0], 1e-4)
    assert not silent.valid.any()


def test_a_group_that_scored_alike_is_flat():
    result = group([0.3] * 6)
    assert bool(result.zero_variance.all()) and bool(result.valid.all()) and not result.value.any()
    assert not group([0.3] * 5 + [0.4]).zero_variance.any()


# ---- the analytic toy: a mixture at ±2 of spread 0.3, where right is good -------------------------------------------

MODES, SPREAD = torch.tensor([-2.0, 2.0], dtype=torch.float64), 0.3


def branches(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """x [N] -> the chance [N,2] that x_t = x comes from each mode, and the mean velocity [N,2] if it does."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    off = x[:, None] - (1 - t) * MODES
    chance = torch.softmax(-off.square() / (2 * variance), dim=1)
    data = MODES + (1 - t) * SPREAD**2 / variance * off
    return chance, t / variance * off - data


def best(x: Tensor, t: float, beta: float, good: int) -> Tensor:
    """The velocity [N] that minimises our loss over all that x [N] at t can come from.

    The loss is a parabola in v, of curvature 2 beta: one step of Newton from anywhere ends at its minimum.
    """
    chance, target = branches(x, t)
    old = (chance * target).sum(1)
    v = old.clone().requires_grad_(True)
    r = (torch.arange(2) == good).double().repeat(len(x))
    centre, guess, truth = (
        a[:, None].expand(-1, 2).reshape(-1, 1) if a.ndim == 1 else a.reshape(-1, 1) for a in (old, v, target)
    )
    times = torch.full((len(r),), t, dtype=torch.float64)
    loss = reflected_loss(guess, centre, truth, times, r, beta=beta, clip=1.0, normalise=False)
    (slope,) = torch.autograd.grad((chance.reshape(-1) * loss).sum(), v)
    return old - slope / (2 * beta)


def right_share(beta: float, good: int = 1, steps: int = 100) -> float:
    """The share of N(0, 1) that the ODE of the best velocity carries to the right mode, by midpoint steps."""
    x = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    for n in range(steps):
        t = 1 - n / steps
        x = x - best(x - best(x, t, beta, good) / (2 * steps), t - 0.5 / steps, beta, good) / steps
    return float((x > 0).double().mean())


def test_the_minimum_is_the_old_velocity_moved_towards_the_good_ones():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        chance, target = branches(x, t)
        old = (chance * target).sum(1)
        closed = old + 2 / 0.7 * chance[:, 1] * (target[:, 1] - old)  # old + (2 / beta) alpha (v+ - old)
        torch.testing.assert_close(best(x, t, 0.7, good=1), closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("beta", "share"), [(10.0, 0.552), (4.0, 0.626), (2.0, 0.726), (1.0, 0.858)])
def test_the_minimum_moves_mass_to_the_good_mode_as_the_theory_says(beta, share):
    learned_share = right_share(beta)
    assert learned_share == pytest.approx(share, abs=0.005)
    if beta >= 2:  # p_old exp(2 r / beta), which holds to first order in 1 / beta
        assert learned_share == pytest.approx(1 / (1 + math.exp(-2 / beta)), abs=0.02)


def test_when_left_is_good_the_mass_moves_left():
    assert right_share(2.0, good=0) == pytest.approx(1 - right_share(2.0), abs=1e-3)
