"""Rates, their intervals, and what a missing verdict is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import toy

from lens_core.evaluation import by_task, contact_sheet, evaluate, overall, table, wilson
from lens_core.pipeline import LensPipeline
from lens_core.types import LensError, Prompt, Score


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # from the closed form, by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (90, 100, 0.825634, 0.944771),
    ],
)
def test_the_interval_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    rate = wilson([1.0] * hits + [0.0] * (count - hits))
    assert rate.value == hits / count
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=2e-6)
    assert rate.count == count


def test_without_a_verdict_nothing_is_known() -> None:
    rate = wilson([], missing=3)
    assert math.isnan(rate.value)
    assert (rate.low, rate.high, rate.count, rate.missing) == (0.0, 1.0, 0, 3)


def test_a_missing_verdict_is_counted_apart_and_never_as_a_zero() -> None:
    prompts = [Prompt("a", task="x"), Prompt("b", task="x"), Prompt("c", task="x"), Prompt("d", task="y")]
    scores = [Score("ok", 1.0), Score("abstain"), Score("failed"), Score("ok", 0.0)]
    rates = by_task(prompts, scores)
    assert list(rates) == ["x", "y"]
    assert (rates["x"].value, rates["x"].count, rates["x"].missing) == (1.0, 1, 2)


def test_the_overall_score_is_the_mean_of_the_headline_tasks() -> None:
    rates = {"a": wilson([1.0] * 10), "b": wilson([1.0, 0.0] * 5), "words": wilson([0.0] * 10)}
    total = overall(rates, ("a", "b"))
    assert total.value == 0.75
    assert total.count == 20
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
    rate = wilson([1.0] * hits + [0.0] * (10 - hits), missing=2)
    total = overall({"a": rate}, ("a",))
    assert (total.value, total.low, total.high) == pytest.approx((rate.value, rate.low, rate.high), abs=1e-12)
    assert (total.count, total.missing) == (10, 2)


@pytest.mark.parametrize("hits", [0, 1, 35, 70])
def test_tasks_that_are_alike_are_one_task_of_all_their_pictures(hits: int) -> None:
    task = wilson([1.0] * hits + [0.0] * (70 - hits))
    total, pooled = overall(dict.fromkeys("abcdef", task), "abcdef"), wilson([1.0] * 6 * hits + [0.0] * 6 * (70 - hits))
    assert (total.value, total.low, total.high) == pytest.approx((pooled.value, pooled.low, pooled.high), abs=1e-12)
    assert total.high - total.low > 0.009, "not even verdicts that all agree leave no doubt"


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
    rates = [wilson([1.0] * hits + [0.0] * (count - hits)) for hits in range(count + 1)]
    draws = np.random.default_rng(0).binomial(count, truth, (5000, len(truth)))
    names = "abcdef"[: len(truth)]
    totals = [overall({n: rates[h] for n, h in zip(names, hits, strict=True)}, names) for hits in draws.tolist()]
    held = sum(t.low <= sum(truth) / len(truth) <= t.high for t in totals) / len(totals)
    # Counts are whole numbers, so no interval holds the truth in exactly 95 %.
    assert 0.945 <= held <= 0.975
    assert all(t.low < t.high for t in totals)


def test_a_headline_task_without_a_verdict_is_an_error() -> None:
    with pytest.raises(LensError, match="no verdict"):
        overall({"a": wilson([1.0]), "b": wilson([], 2)}, ("a", "b"))


def test_a_failure_cannot_have_a_value_nor_a_success_lack_one() -> None:
    for status, value in (("failed", 0.0), ("abstain", 1.0), ("ok", None)):
        with pytest.raises(ValueError, match="cannot have the value"):
            Score(status, value)  # type: ignore[arg-type]  # what the test is about


def test_a_benchmark_does_not_depend_on_the_batch(pipeline: LensPipeline) -> None:
    outcomes = [
        evaluate(pipeline, toy.Reds(toy.Reds.Config(5)), seed=3, batch=b, height=16, width=32) for b in (1, 2, 5)
    ]
    assert outcomes[0].images.shape == (5, 3, 16, 32)
    for other in outcomes[1:]:
        assert (outcomes[0].images.int() - other.images.int()).abs().max() <= 1
    assert outcomes[0].rates["other"].missing == 2
    assert outcomes[0].overall.count == 3
    assert "| red |" in table(outcomes[0]) and "**overall**" in table(outcomes[0])


def test_a_contact_sheet_frames_each_picture() -> None:
    images = torch.zeros(3, 3, 16, 32, dtype=torch.uint8)
    sheet = contact_sheet(images, ["one", "two", "three"], [True, False, None], columns=2)
    assert sheet.size == (2 * 40, 2 * (16 + 8 + 34))
    assert [sheet.getpixel(p) for p in ((1, 1), (41, 1), (1, 59))] == [(26, 150, 65), (215, 25, 28), (153, 153, 153)]
