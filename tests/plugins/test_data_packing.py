"""Packing: every rank the same work, the budget filled, nothing lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from lens_data.buckets import LENS_BUCKETS
from lens_data.packing import Packs, balance, block_flops, compare, mixture, pack

from lens_core.types import ConfigError


def realistic(count: int, seed: int = 0) -> list[int]:
    """Tokens of a uniform mixture of the 27 sizes, with captions of about 109 words."""
    return mixture(count, [size for group in LENS_BUCKETS for size in group], seed)


def budget(images: float) -> float:
    """The cost of so many pictures of 1024^2 with 200 tokens of text."""
    return images * float(block_flops(np.array([4296.0]))[0])


def loads(plan: Packs, lengths: list[int]) -> np.ndarray:
    costs = block_flops(np.array(lengths, float))
    return np.array([[sum(costs[i] for i in share) for share in step] for step in plan.steps])


def test_flops_are_those_counted_for_the_backbone():
    # 512^2, 1024^2 and 1440^2 with 200 text tokens; 1024^2 without text. TFLOP, counted independently.
    counted = [3.77, 17.12, 42.9, 16.08]
    assert block_flops(np.array([1224.0, 4296.0, 8300.0, 4096.0])) / 1e12 == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("images", [6, 8, 16])
def test_64_ranks_are_balanced_and_the_budget_is_filled(images):
    lengths = realistic(10_000)
    figures = compare(lengths, budget(images), 64)
    packed = figures["packed"]
    assert packed.useful > 0.98 and packed.worst < 0.02 and packed.filled > 0.98
    assert figures["tokens"].useful < packed.useful and figures["tokens"].worst > 0.05
    assert figures["independent"].useful < 0.6 and figures["independent"].imbalance > 0.5


def test_independent_buckets_waste_what_was_counted_for_them():
    # Three areas of equal share, no text: the mean cost over that of the largest, which some rank of 64 always has.
    areas = [1024, 2304, 4096]
    mean = np.mean(block_flops(np.array(areas, float))) / block_flops(np.array([4096.0]))[0]
    lengths = np.random.default_rng(0).choice(areas, 64 * 400).tolist()
    assert compare(lengths, budget(4), 64)["independent"].useful == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_every_sample_is_in_one_step_and_no_step_overtakes_another(ranks):
    lengths = realistic(1500, seed=1)
    plan = pack(lengths, budget(3), ranks)
    steps = [sorted(i for share in step for i in share) for step in plan.steps]
    assert [i for step in steps for i in step] + list(plan.rest) == list(range(1500))
    assert all(before[-1] < after[0] for before, after in pairwise(steps))
    assert all(len(step) == ranks and all(step) for step in plan.steps)
    assert len(plan.steps) > 2 and len(plan.rest) < len(steps[0]) + ranks


def test_the_samples_of_a_step_do_not_depend_on_how_many_ranks_share_its_budget():
    lengths = realistic(3000, seed=2)
    plans = {ranks: pack(lengths, budget(96 / ranks), ranks) for ranks in (1, 8, 64)}
    steps = {r: [sorted(i for mine in step for i in mine) for step in p.steps] for r, p in plans.items()}
    assert steps[1] == steps[8] == steps[64] and len(steps[1]) > 10
    for ranks, plan in plans.items():
        work = loads(plan, lengths)
        assert work.mean(1).max() <= budget(96 / ranks) * (1 + 1e-12)
    assert loads(plans[8], lengths).max() <= budget(12) * 1.02


def test_the_mixture_is_uniform_over_the_27_sizes_with_captions_of_its_kind():
    tokens = np.array(mixture(27_000, [(16, 16), (160, 160)]))
    assert np.mean(tokens < 1000 / 2 + 0) == 1.0 and np.mean(tokens > 100 + 22 + 1.3 * 109) == pytest.approx(
        0.25, abs=0.02
    )


def test_equal_samples_are_shared_equally():
    plan = pack([1000] * 24, 4 * float(block_flops(np.array([1000.0]))[0]) * 1.0001, 2)
    assert [[len(share) for share in step] for step in plan.steps] == [[4, 4], [4, 4]] and len(plan.rest) == 8
    assert balance(loads(plan, [1000] * 24), 1.0).imbalance == pytest.approx(0, abs=1e-12)


def test_a_plan_is_a_pure_function_and_any_cost_will_do():
    def length(tokens: np.ndarray) -> np.ndarray:
        return tokens

    lengths = [5, 4, 3, 3, 2, 1, 6, 6, 6]
    plan = pack(lengths, 9.0, 2, length)
    assert plan == pack(lengths, 9.0, 2, length)
    assert sorted(sorted(lengths[i] for i in share) for share in plan.steps[0]) == [[1, 3, 5], [2, 3, 4]]
    assert plan.rest == (6, 7, 8)


def test_balance_of_loads_by_hand():
    figures = balance(np.array([[4.0, 2.0], [3.0, 3.0]]), 4.0)
    assert figures.useful == pytest.approx(12 / 14) and figures.filled == pytest.approx(0.75)
    assert figures.imbalance == pytest.approx(1 / 6) and figures.worst == pytest.approx(1 / 3)


def test_a_sample_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match=r"a sample of 4296 tokens costs .* raise the budget"):
        pack([100, 4296], budget(0.9), 2)
    with pytest.raises(ConfigError, match="at least 1 rank"):
        pack([100], budget(1), 0)
    assert pack([], budget(1), 2) == Packs((), ())
