"""The arithmetic of DiffusionNFT: from rewards to advantages, and from advantages to a loss on velocities.

N pictures, J rewards, B rows; v velocities [B,...]; time as everywhere: t = 0 is data, v = noise - data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

MIN_ERROR = 1e-5  # least mean error that a self-normalised loss divides by; that of the authors' code


@frozen
class Advantages:
    """`value` float64 [N]: how much better than its group, in standard deviations, 0 where there is none.

    `valid` bool [N]: scored, in a group of which enough are scored. `zero_variance` bool [N]: valid, but all of its
    group scored alike.
    """

    value: Tensor
    valid: Tensor
    zero_variance: Tensor


def advantages(
    values: Tensor,
    failed: Tensor,
    groups: Sequence[int],
    weights: Sequence[float],
    min_std: float,
    over_rollout: bool = False,
    sum_first: bool = False,
    scales: Sequence[float] | None = None,
) -> Advantages:
    """Rewards `values` [J,N], NaN where a reward abstained, and `failed` bool [N] -> one advantage a picture.

    Each reward is centred on its mean over the group and divided by its standard deviation there (`over_rollout`: over
    all pictures), at least `min_std`; then rewards are averaged by weight. `sum_first`: they are averaged by weight
    as they are, and the average is centred and divided: a reward then counts by its scale too.
    Where the pictures are a part of a rollout, `scales` are the `standard_deviations` over all of it.
    A reward that abstains on more than half of a group has no part in it. A picture without the score of one that
    has, or that failed, is absent from every statistic; so is its whole group if that leaves fewer than half.
    """
    values, taking, valid, weights = _counted(values, failed, groups, weights, sum_first)
    if scales is None:
        scales = standard_deviations([_counted_scores(values, taking)])
    value, share, flat = torch.zeros(len(groups)).double(), torch.zeros(len(groups)).double(), valid.clone()
    keys = torch.tensor(groups)
    for reward, takes, weight, overall in zip(values, taking, weights, scales, strict=True):
        for key in sorted(set(groups)):
            here = takes & (keys == key)
            if not here.any():
                continue
            # Below `min_std` a difference is noise: without a floor, a reward's noise of 1e-3 in a group that is
            # otherwise decided would become advantages of 2 and more.
            scale = reward.new_tensor(overall) if over_rollout else _std(reward[here])
            value[here] += weight * (reward[here] - reward[here].mean()) / scale.clamp(min=min_std)
            share[here] += weight
            if reward[here].min() < reward[here].max():
                flat[here] = False
    return Advantages(value / share.where(share > 0, 1), valid, flat)


def _counted(
    values: Tensor, failed: Tensor, groups: Sequence[int], weights: Sequence[float], sum_first: bool
) -> tuple[Tensor, Tensor, Tensor, Sequence[float]]:
    """The rewards that are centred and divided: their values float64 [J,N], which scores count bool
    [J,N], the pictures that take part bool [N], and weights. See `advantages`."""
    values = values.double()
    keys = torch.tensor(groups)
    names = sorted(set(groups))
    valid = torch.zeros(len(groups), dtype=torch.bool)
    taking = torch.zeros(values.shape, dtype=torch.bool)  # whose score counts for which picture
    for key in names:
        mine = keys == key
        # Half and not all: a reward that abstains on one picture still ranks the others. The mean over nobody is NaN,
        # which compares as False.
        speaks = values[:, mine & ~failed].isnan().double().mean(1) <= 0.5
        here = mine & ~failed & ~values[speaks].isnan().any(0)
        if speaks.any() and 2 * int(here.sum()) >= int(mine.sum()):
            valid |= here
            taking |= speaks[:, None] & here
    if sum_first:
        parts = torch.tensor(weights).double()[:, None] * taking
        values = ((parts * values.nan_to_num()).sum(0) / parts.sum(0).where(valid, 1))[None]
        taking, weights = valid[None], [1.0]
    return values, taking, valid, weights


def counted_scores(
    values: Tensor, failed: Tensor, groups: Sequence[int], weights: Sequence[float], sum_first: bool
) -> list[list[float]]:
    """Each reward's scores that count, of the arguments of `advantages`."""
    return _counted_scores(*_counted(values, failed, groups, weights, sum_first)[:2])


def _counted_scores(values: Tensor, taking: Tensor) -> list[list[float]]:
    return [reward[takes].tolist() for reward, takes in zip(values, taking, strict=True)]


def standard_deviations(parts: Sequence[list[list[float]]]) -> list[float]:
    """The standard deviation of each reward over the `counted_scores` of all parts of a rollout; 0 without any."""
    rewards = [[v for part in rows for v in part] for rows in zip(*parts, strict=True)]
    return [float(_std(torch.tensor(r, dtype=torch.float64))) if r else 0.0 for r in rewards]


def _std(values: Tensor) -> Tensor:
    return values.std(correction=0)


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r = 1/2 + A / (2 clip), A clipped to ± clip: the probability that the picture is a good one.

    Source: DiffusionNFT (arXiv 2509.16117), the optimality reward; its normaliser Z is clip times the standard
    deviation, as in the authors' code.
    """
    return 0.5 + 0.5 * advantage.clamp(-clip, clip) / clip


def reflected_loss(
    v: Tensor, old: Tensor, target: Tensor, t: Tensor, r: Tensor, *, beta: float, clip: float, normalise: bool
) -> Tensor:
    """The loss [B] of velocities `v` for pictures of optimality `r` [B], with `target` = noise - data.

    The implicit positive and negative policies are v± = old ± beta (v - old), and the loss is
    clip (r loss(v+) + (1 - r) loss(v-)) / beta (DiffusionNFT, arXiv 2509.16117: its policy optimization objective).
    loss is the mean squared error; with `normalise`, that of the predicted data over its mean absolute error, the
    latter without a gradient (the authors' code): t MSE / MAE in velocities.
    At v = old the gradient is A times that of loss(v), whatever beta and clip are.
    """
    d = beta * (v - old)
    # v- is v mirrored in the old policy: to move v- towards a bad picture moves v away from it, without the unbounded
    # loss that a negative weight on loss(v) would give.
    good = _error(old + d - target, t, normalise)
    bad = _error(old - d - target, t, normalise)
    return clip * (r * good + (1 - r) * bad) / beta


def _error(error: Tensor, t: Tensor, normalise: bool) -> Tensor:
    square = error.square().flatten(1).mean(1)
    if not normalise:
        return square
    # x_t - t v - data = -t (v - target): written in velocities, nothing cancels at small t.
    # Each branch divides by its own error, so that a branch far from its target does not decide the step; detached, or
    # the gradient would also reward a larger error.
    size = t * error.detach().abs().flatten(1).mean(1)
    return t.square() * square / size.clamp(min=MIN_ERROR)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference [B] of two velocities.

    Between the policy and its reference it is the KL penalty: for equal noise, the divergence of two flow models is a
    weighted integral of it over t; the weight is left out, as in the authors' code.
    """
    return (a - b).square().flatten(1).mean(1)
