"""Means, their intervals by prompt, and what a missing score is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lens_core.evaluation.run import by_task
from lens_core.evaluation.statistics import (
    ClusteredScores,
    Estimate,
    mean_of_tasks,
    paired_difference,
    pooled,
    wilson_interval,
)
from lens_core.types import LensError, Prompt, Score


def distinct(hits: int, count: int, missing: int = 0) -> ClusteredScores:
    """Yes or no from `count` different prompts."""
    return ClusteredScores([1.0] * hits + [0.0] * (count - hits), range(count), missing)


def same(one: Estimate, other: Estimate) -> bool:
    return (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-12)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # from the closed form, by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (90, 100, 0.825634, 0.944771),
    ],
)
def test_the_interval_of_different_prompts_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    estimate = distinct(hits, count).estimate()
    assert estimate.value == hits / count
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=2e-6)
    assert (estimate.count, estimate.distinct) == (count, count)


def test_pictures_of_one_prompt_that_agree_count_once() -> None:
    once = distinct(12, 40).estimate()
    often = ClusteredScores([1.0] * 60 + [0.0] * 140, [i // 5 for i in range(200)])
    # The closed form of the clustered variance here: Σ (5 (y - p))² / 200² · 40/39, so p (1 - p) over it is 39.
    assert often.effective_count() == pytest.approx(39.0)
    assert (often.estimate().count, often.estimate().distinct) == (200, 40)
    assert (often.estimate().low, often.estimate().high) == pytest.approx((once.low, once.high), abs=0.003)


def test_pictures_of_one_prompt_that_are_as_good_as_independent_count_each() -> None:
    rng = np.random.default_rng(5)
    values = (rng.random(3000) < 0.4).astype(float)
    scores = ClusteredScores(list(values), [i // 3 for i in range(3000)])
    assert 2700 <= scores.effective_count() <= 3000


def test_where_all_pictures_agree_each_prompt_counts_as_one() -> None:
    estimate = ClusteredScores([1.0] * 100, [i // 10 for i in range(100)]).estimate()
    assert (estimate.low, estimate.high) == wilson_interval(1.0, 10)


def test_the_clustered_interval_holds_the_truth_in_95_of_100_draws_where_the_plain_one_does_not() -> None:
    rng = np.random.default_rng(0)
    clusters = [i // 6 for i in range(72)]
    held = plain = 0
    for _ in range(2000):
        chances = rng.beta(0.7, 0.7, 12)  # prompts differ much: some are nearly always right, some never
        values = (rng.random(72) < np.repeat(chances, 6)).astype(float)
        estimate = ClusteredScores(list(values), clusters).estimate()
        low, high = wilson_interval(values.mean(), 72)
        held += estimate.low <= 0.5 <= estimate.high
        plain += low <= 0.5 <= high
    assert 0.93 <= held / 2000 <= 0.975
    assert plain / 2000 < 0.75


def test_scores_that_are_no_shares_have_the_interval_of_their_mean_over_prompts() -> None:
    rng = np.random.default_rng(2)
    of_prompt = rng.normal(3.0, 2.0, 400)
    scores = ClusteredScores(list(np.repeat(of_prompt, 4)), [i // 4 for i in range(1600)])
    error = of_prompt.std() / math.sqrt(400)
    estimate = scores.estimate()
    assert (estimate.low, estimate.high) == pytest.approx(
        (of_prompt.mean() - 1.96 * error, of_prompt.mean() + 1.96 * error), abs=0.15 * error
    )
    assert same(mean_of_tasks({"a": scores}, ["a"]), estimate), "one task's overall figure is its own"


def test_of_one_prompt_no_interval_is_known_but_where_scores_are_shares() -> None:
    alone = ClusteredScores([0.3, 0.4], ["p", "p"]).estimate()
    assert alone.value == pytest.approx(0.35) and math.isnan(alone.low) and math.isnan(alone.high)
    share = ClusteredScores([1.0, 1.0], ["p", "p"]).estimate()
    assert (share.low, share.high) == wilson_interval(1.0, 1)


def test_without_a_score_nothing_is_known() -> None:
    estimate = ClusteredScores([], [], 3).estimate()
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high, estimate.count, estimate.missing) == (0.0, 1.0, 0, 3)


def test_a_missing_score_is_counted_apart_and_never_as_a_zero() -> None:
    prompts = [Prompt("a", task="x"), Prompt("b", task="x"), Prompt("c", task="x"), Prompt("d", task="y")]
    scores = [Score("ok", 1.0), Score("abstain"), Score("failed"), Score("ok", 0.0)]
    tasks = by_task(prompts, scores)
    assert list(tasks) == ["x", "y"]
    assert (tasks["x"].mean, tasks["x"].count, tasks["x"].missing) == (1.0, 1, 2)
    assert (pooled(tasks).value, pooled(tasks).count, pooled(tasks).missing) == (0.5, 2, 2)


def test_phrasings_of_one_request_are_one_cluster() -> None:
    prompts = [Prompt("a red star", data={"question": "star"}), Prompt("one star, red", data={"question": "star"})]
    assert by_task(prompts, [Score("ok", 1.0)] * 2)[""].distinct == 1
    assert by_task([Prompt("a"), Prompt("a"), Prompt("b")], [Score("ok", 1.0)] * 3)[""].distinct == 2


def test_the_overall_score_is_the_mean_of_the_headline_tasks_and_the_pooled_one_that_of_all_pictures() -> None:
    tasks = {"a": distinct(10, 10), "b": distinct(5, 10), "words": distinct(0, 20)}
    total = mean_of_tasks(tasks, ("a", "b"))
    assert (total.value, total.count) == (0.75, 20)
    assert pooled(tasks).value == 15 / 40
    assert same(pooled(tasks), distinct(15, 40).estimate())
    # Wilson's closed form at p = 0.75, for the effective number of pictures n, by hand with z² = 3.841459: the centres
    # of the tasks' intervals are 11.920729 / 13.841459 and 0.5, their mean is 0.680617
    n = 0.680617 * 0.319383 / ((0.861234 * 0.138766 + 0.25) / 40)
    z2 = 3.841459
    centre, half = 0.75 + z2 / (2 * n), math.sqrt(z2 * (0.75 * 0.25 / n + z2 / (4 * n * n)))
    assert (total.low, total.high) == pytest.approx(
        ((centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)), abs=1e-5
    )


@pytest.mark.parametrize("hits", [0, 3, 10])
def test_the_overall_interval_of_one_task_is_its_own(hits: int) -> None:
    task = distinct(hits, 10, missing=2)
    total = mean_of_tasks({"a": task}, ("a",))
    assert same(total, task.estimate())
    assert (total.count, total.distinct, total.missing) == (10, 10, 2)


@pytest.mark.parametrize("hits", [0, 1, 35, 70])
def test_tasks_that_are_alike_are_one_task_of_all_their_pictures(hits: int) -> None:
    total = mean_of_tasks(dict.fromkeys("abcdef", distinct(hits, 70)), "abcdef")
    assert same(total, distinct(6 * hits, 6 * 70).estimate())
    assert total.high - total.low > 0.009, "not even scores that all agree leave no doubt"


@pytest.mark.parametrize(
    ("truth", "count"),
    [
        ((0.0, 1.0, 0.5, 0.3, 0.8, 0.95), 71),  # six tasks of 71 pictures, as in the benchmark of shapes
        ((0.02, 0.05, 0.1, 0.02, 0.0, 0.01), 71),
        ((0.01,) * 6, 71),
        ((0.93, 0.97, 0.99, 0.8, 0.6, 0.9), 71),
        ((0.9, 0.98, 1.0), 20),
        ((0.5, 0.5), 10),
    ],
)
def test_the_overall_interval_holds_the_truth_in_95_of_100_draws(truth: tuple[float, ...], count: int) -> None:
    tasks = [distinct(hits, count) for hits in range(count + 1)]
    draws = np.random.default_rng(0).binomial(count, truth, (5000, len(truth)))
    names = "abcdef"[: len(truth)]
    totals = [mean_of_tasks({n: tasks[h] for n, h in zip(names, hits, strict=True)}, names) for hits in draws.tolist()]
    held = sum(t.low <= sum(truth) / len(truth) <= t.high for t in totals) / len(totals)
    # Counts are whole numbers, so no interval holds the truth in exactly 95 %.
    assert 0.945 <= held <= 0.975
    assert all(t.low < t.high for t in totals)


@pytest.mark.parametrize("measure", [mean_of_tasks, paired_difference])
def test_a_headline_task_without_a_score_is_an_error(measure: object) -> None:
    with pytest.raises(LensError, match="raise the number of prompts"):
        measure({"a": distinct(1, 1), "b": distinct(0, 0, 2)}, ("a", "b"))  # type: ignore[operator]
