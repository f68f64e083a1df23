"""Rewards that fail, in every way: whatever fails is replaced or absent, in this order, and never a zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from lens_nft.objective import advantages
from lens_nft.rewards import WeightedReward, score_pictures, total_spend
from lens_nft.rollout import Picture
from torch import Tensor

from lens_core.types import ConfigError, LensError, Prompt, Score, TextFeatures

GROUPS = (1, 1, 1, 1, 2, 2, 2, 2)


def pictures(groups: Sequence[int] = GROUPS) -> list[Picture]:
    text = TextFeatures(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    return [
        Picture(Prompt(f"p{g}", g), i, torch.zeros(1, 1, 1), torch.full((3, 4, 4), i, dtype=torch.uint8), text)
        for i, g in enumerate(groups)
    ]


class Told:
    """Gives picture i (its grey) the score that a table says: a number, "fail", "abstain" or "raise"."""

    def __init__(self, *table: Any, spend: dict[str, float] | None = None) -> None:
        self.table, self.scored = table, list[int]()
        if spend is not None:
            self.spend = spend

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        numbers = [int(image[0, 0, 0]) for image in images]
        self.scored += numbers
        said = [self.table[n] for n in numbers]
        if "raise" in said:
            raise LensError("the endpoint is away")
        if "config" in said:
            raise ConfigError("no such model")
        kinds = {"fail": Score("failed", evidence="lost"), "abstain": Score("abstain")}
        return [kinds[s] if isinstance(s, str) else Score("ok", float(s), {"half": s / 2}) for s in said]


def gains(rewards: Sequence[WeightedReward], **how: Any) -> tuple[Tensor, Tensor]:
    scored = score_pictures(rewards, pictures())
    got = advantages(scored.values(), scored.failed(), list(GROUPS), scored.weights, 1e-4, **how)
    return got.value, got.valid


def test_a_fallback_judges_the_whole_group_and_no_other():
    first, second = Told(0, 1, "fail", 1, 0, 0, 1, 1), Told(*[0.5, 0.1, 0.9, 0.3] * 2)
    scored = score_pictures([WeightedReward("vlm", first, 1.0, second)], pictures())
    assert second.scored == [0, 1, 2, 3]
    assert [s is None for s in scored.scores["vlm"]] == [True] * 4 + [False] * 4
    assert [s and s.value for s in scored.scores["vlm.fallback"]] == [0.5, 0.1, 0.9, 0.3, None, None, None, None]
    assert scored.replaced == 4 and not scored.failed().any()
    value, valid = gains([WeightedReward("vlm", first, 1.0, second)])
    by_hand = torch.tensor([0.5, 0.1, 0.9, 0.3]).double()
    assert valid.all()
    torch.testing.assert_close(value[:4], (by_hand - by_hand.mean()) / by_hand.std(correction=0))
    torch.testing.assert_close(value[4:], torch.tensor([-1.0, -1.0, 1.0, 1.0]).double())


def test_without_a_fallback_only_the_picture_is_absent():
    value, valid = gains([WeightedReward("vlm", Told(0, 1, "fail", 1, 0, 0, 1, 1))])
    assert valid.tolist() == [True, True, False, True] + [True] * 4
    kept = torch.tensor([0.0, 1.0, 1.0]).double()
    torch.testing.assert_close(value[[0, 1, 3]], (kept - kept.mean()) / kept.std(correction=0))
    assert value[2] == 0


def test_more_than_half_a_group_away_and_the_group_is_absent():
    value, valid = gains([WeightedReward("vlm", Told("fail", "fail", "fail", 1, 0, 0, 1, 1))])
    assert valid.tolist() == [False] * 4 + [True] * 4
    assert not value[:4].any()


def test_a_fallback_that_knows_less_does_not_decide():
    worse = Told("fail", "fail", "fail", 0, *[0] * 4)
    scored = score_pictures([WeightedReward("vlm", Told(0, 1, "fail", 1, 0, 0, 1, 1), 1.0, worse)], pictures())
    assert scored.replaced == 0 and [s.value for s in scored.scores["vlm"]] == [0, 1, None, 1, 0, 0, 1, 1]
    assert all(s is None for s in scored.scores["vlm.fallback"])
    assert scored.failed().tolist() == [False, False, True] + [False] * 5


def test_a_fallback_may_abstain_where_the_judge_was_silent_anyway():
    scored = score_pictures(
        [WeightedReward("vlm", Told(*["fail"] * 8), 1.0, Told(*["abstain"] * 4, 0, 1, 0, 1))], pictures()
    )
    assert scored.failed().tolist() == [True] * 4 + [False] * 4
    assert scored.replaced == 4


def test_what_a_reward_raises_is_a_failure_of_all_it_was_asked_and_the_fallback_answers():
    rescued = score_pictures([WeightedReward("vlm", Told(*["raise"] * 8), 1.0, Told(*range(8)))], pictures())
    assert rescued.replaced == 8 and not rescued.failed().any()
    alone = score_pictures([WeightedReward("vlm", Told(*["raise"] * 8))], pictures())
    assert alone.failed().all() and alone.scores["vlm"][0].evidence == "the endpoint is away"
    assert torch.isnan(alone.values()).all()


def test_a_mistake_in_the_recipe_is_not_passed_off_as_a_failing_judge():
    with pytest.raises(ConfigError, match="no such model"):
        score_pictures([WeightedReward("vlm", Told(*["config"] * 8), 1.0, Told(*range(8)))], pictures())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure_and_goes_to_the_fallback(bad):
    scored = score_pictures([WeightedReward("a", Told(bad, 1, 1, 0, 0, 1, 0, 1), 1.0, Told(*[0.25] * 8))], pictures())
    assert scored.replaced == 4 and bool(torch.isfinite(scored.values()[1, :4]).all())


def test_the_scales_of_judge_and_fallback_never_meet_in_one_statistic():
    # The judge counts to 100, its fallback to 1: had they met, the second group would decide the first's spread.
    first, second = Told("fail", *[100, 0, 100], 0, 100, 0, 100), Told(*[0, 1, 0, 1] * 2)
    value, _ = gains([WeightedReward("a", first, 1.0, second)], over_rollout=True)
    torch.testing.assert_close(value, torch.tensor([-1.0, 1.0] * 4).double())


def test_summed_first_a_reward_counts_by_its_scale_and_normalised_first_it_does_not():
    rewards = [WeightedReward("big", Told(*[0, 10, 20, 30] * 2)), WeightedReward("small", Told(*[3, 2, 1, 0] * 2))]
    value, _ = gains(rewards)
    assert value.abs().max() < 1e-12  # they say the contrary, equally loud
    value, _ = gains(rewards, sum_first=True)
    by_hand = torch.tensor([1.5, 6.0, 10.5, 15.0]).double()
    torch.testing.assert_close(value[:4], (by_hand - by_hand.mean()) / by_hand.std(correction=0))


def test_what_happened_is_counted():
    scored = score_pictures(
        [
            WeightedReward("vlm", Told("fail", 1, 1, 0, "abstain", 0, 1, 1), 1.0, Told(*[0.5, 0.5, 1, 1] * 2)),
            WeightedReward("exact", Told(*[1] * 8, spend={"usd": 0.5}), 2.0),
        ],
        pictures(),
    )
    facts = scored.metrics()
    assert facts["reward/vlm"] == pytest.approx(2 / 3) and facts["reward/vlm/half"] == pytest.approx(1 / 3)
    assert facts["reward/vlm.fallback"] == 0.75 and facts["reward/exact"] == 1
    assert (facts["abstained/vlm"], facts["abstained/exact"], facts["fallback"]) == (0.25, 0, 0.5)
    assert scored.weights == [1.0, 1.0, 2.0]
    rewards = [
        WeightedReward("a", Told(spend={"usd": 0.5, "calls": 3})),
        WeightedReward("b", Told(spend={"usd": 1.0})),
        WeightedReward("c", Told()),
    ]
    assert total_spend(rewards) == {"spend/usd": 1.5, "spend/calls": 3.0}


class Odd:
    """Gives what `make` makes of a picture's number."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        return [self.make(int(image[0, 0, 0])) for image in images]


@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyError("choices"), TypeError("no"), RecursionError()])
def test_whatever_a_reward_raises_goes_down_the_ladder_with_its_kind_quoted(error):
    def fail(number: int) -> Score:
        raise error

    rescued = score_pictures([WeightedReward("vlm", Odd(fail), 1.0, Told(*range(8)))], pictures())
    assert rescued.replaced == 8 and not rescued.failed().any()
    alone = score_pictures([WeightedReward("vlm", Odd(fail))], pictures())
    assert alone.failed().all() and type(error).__name__ in alone.scores["vlm"][0].evidence


@pytest.mark.parametrize("made", [1.0, None, "ok", (1.0,)])
def test_what_is_no_score_is_reported_with_the_name_of_the_reward(made):
    with pytest.raises(LensError, match=r"Odd\.score returned .*(one Score an image|its status is ok)"):
        score_pictures([WeightedReward("vlm", Odd(lambda number: made))], pictures())


@pytest.mark.parametrize("value", ["high", [1.0], torch.ones(2), 1j])
def test_a_score_that_cannot_be_made_is_a_failure_of_what_was_asked_with_it(value):
    odd = Odd(lambda number: Score("ok", value if number == 0 else 1.0))
    assert score_pictures([WeightedReward("vlm", odd)], pictures()).failed().all()
    rescued = score_pictures([WeightedReward("vlm", odd, 1.0, Told(*range(8)))], pictures())
    assert rescued.values()[1].tolist() == [float(n) for n in range(8)]


@pytest.mark.parametrize("value", [10**400, math.nan, np.float32("inf")])
def test_a_value_that_no_mean_can_take_is_a_failure_of_its_picture_alone(value):
    scored = score_pictures(
        [WeightedReward("vlm", Odd(lambda number: Score("ok", value if number == 0 else 1.0)))], pictures()
    )
    assert scored.failed().tolist() == [True] + [False] * 7 and "not finite" in scored.scores["vlm"][0].evidence


def test_components_that_are_no_numbers_are_left_out_of_the_means():
    parts = [{"a": 1.0, "b": None}, {"a": math.nan, "b": "x"}, {"a": 0.0}, {}, *[{"a": 1.0}] * 4]
    facts = score_pictures(
        [WeightedReward("vlm", Odd(lambda number: Score("ok", 1.0, parts[number])))], pictures()
    ).metrics()
    assert facts["reward/vlm/a"] == pytest.approx(5 / 6) and "reward/vlm/b" not in facts


@pytest.mark.parametrize("kind", [int, np.float32, np.float64, Fraction], ids=lambda k: k.__name__)
def test_a_number_of_any_kind_counts_as_what_it_is(kind):
    scored = score_pictures(
        [WeightedReward("vlm", Odd(lambda number: Score("ok", kind(number), {"a": kind(number)})))], pictures()
    )
    assert scored.values().tolist() == [[float(n) for n in range(8)]] and not scored.failed().any()
    assert scored.metrics()["reward/vlm"] == scored.metrics()["reward/vlm/a"] == 3.5


def test_a_spend_that_is_no_number_is_left_out():
    rewards = [
        WeightedReward("a", Told(spend={"usd": math.nan, "calls": None, "cached": 2})),
        WeightedReward("b", Told()),
    ]
    rewards[1].reward.spend = 5
    assert total_spend(rewards) == {"spend/cached": 2.0}
