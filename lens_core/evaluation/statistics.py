"""Means of scores with 95 % confidence intervals that count prompts, not pictures.

Pictures of one prompt are not independent: they succeed or fail together. So every interval here treats the pictures
of a prompt (a cluster) as one draw. Twenty pictures of one prompt say less than one picture of each of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_core.io.readers import shown
from lens_core.types import LensError, Prompt

Z = 1.959963984540054  # standard deviations of a normal on each side of the middle 95 %
RESAMPLES = 4000  # of a bootstrap


@frozen
class Estimate:
    """A mean score with its 95 % interval: of `count` pictures that have a score, of `distinct` prompts.

    `missing` pictures have no score (abstained or failed); they do not count as zeros. Without any score `value` is
    NaN. Where the interval cannot be known (scores that are not shares, of a single prompt), `low` and `high` are NaN.
    """

    value: float
    low: float
    high: float
    count: int
    distinct: int
    missing: int = 0


def cluster_of(prompt: Prompt) -> Hashable:
    """What makes two pictures one draw: the prompt's `data["question"]` where it has one, else its text."""
    question: Hashable = prompt.data.get("question", prompt.text)
    return question


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `n` independent draws (Wilson 1927)."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


class ClusteredScores:
    """The scores of one task, as sums and numbers by cluster; `missing` pictures have none.

    `weights`: how much each score counts in every mean, 1 by default, at least 0. Where a score is the share of right
    words and its weight the number of words, means are shares of all words.
    """

    def __init__(
        self,
        values: Sequence[float],
        clusters: Sequence[Hashable],
        missing: int = 0,
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        places: dict[Hashable, int] = {}
        index = np.array([places.setdefault(cluster, len(places)) for cluster in clusters], dtype=np.intp)
        scores = np.asarray(values, dtype=np.float64)
        if len(scores) != len(index):
            raise ValueError(f"{len(scores)} scores cannot belong to {len(index)} clusters; pass one cluster a score")
        each = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
        self.sums: NDArray[np.float64] = np.bincount(index, scores * each, len(places)).astype(np.float64)
        self.counts: NDArray[np.float64] = np.bincount(index, each, len(places)).astype(np.float64)
        self.count, self.distinct, self.missing = len(scores), len(places), missing
        total = float(each.sum())
        plain = bool((each == 1).all())  # a mean of shares of unequal weight is no share of pictures
        self.mean = (float(scores.mean()) if plain else float(scores @ each) / total) if total else math.nan
        self.binary = plain and bool(np.isin(scores, (0.0, 1.0)).all())

    def effective_count(self) -> float:
        """How many independent pictures would give a share as certain as these (Kish 1965).

        Binomial variance over the variance between clusters; at most the number of pictures. Where all scores agree,
        no variance can be seen, and every cluster counts as one picture.
        """
        if self.count == self.distinct:
            return float(self.count)
        spread = self.mean * (1 - self.mean)
        if self.distinct == 1 or spread == 0:
            return float(self.distinct)
        residuals = self.sums - self.mean * self.counts
        variance = self.distinct / (self.distinct - 1) * float(residuals @ residuals) / self.count**2
        return max(1.0, min(float(self.count), spread / variance)) if variance else float(self.count)

    def resampled_means(self, drawn: NDArray[np.integer]) -> NDArray[np.float64]:
        """Means over the clusters in each row of `drawn` [resamples, distinct]."""
        means: NDArray[np.float64] = self.sums[drawn].sum(1) / self.counts[drawn].sum(1)
        return means

    def draw_clusters(self, rng: np.random.Generator, resamples: int = RESAMPLES) -> NDArray[np.integer]:
        """Clusters drawn with replacement, [resamples, distinct]."""
        return rng.integers(self.distinct, size=(resamples, self.distinct))

    def estimate(self) -> Estimate:
        """The mean and its interval: Wilson's for the effective number of pictures where scores are yes or no, else
        percentiles of a bootstrap over clusters (Efron 1979)."""
        if not self.count:
            low, high = (0.0, 1.0) if self.binary else (math.nan, math.nan)
        elif self.binary:
            low, high = wilson_interval(self.mean, self.effective_count())
        else:
            low, high = self._bootstrap()
        return Estimate(self.mean, low, high, self.count, self.distinct, self.missing)

    def _bootstrap(self) -> tuple[float, float]:
        if self.distinct == 1:
            return math.nan, math.nan
        return middle(self.resampled_means(self.draw_clusters(np.random.default_rng(0))))


def middle(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of a bootstrap's means."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def pooled(tasks: Mapping[str, ClusteredScores]) -> Estimate:
    """The plain mean over all pictures of all tasks: the share that is right, where scores are yes or no."""
    parts = list(tasks.values())
    together = ClusteredScores([], [], sum(part.missing for part in parts))
    together.sums = np.concatenate([together.sums, *(part.sums for part in parts)])
    together.counts = np.concatenate([together.counts, *(part.counts for part in parts)])
    together.count, together.distinct = sum(part.count for part in parts), sum(part.distinct for part in parts)
    total = float(together.counts.sum())
    together.mean = float(together.sums.sum()) / total if total else math.nan
    together.binary = all(part.binary for part in parts)
    return together.estimate()


def mean_of_tasks(tasks: Mapping[str, ClusteredScores], names: Sequence[str]) -> Estimate:
    """The mean of the named tasks' means, each task weighing the same, with its 95 % interval.

    Where scores are yes or no it is Wilson's, for the number of independent pictures of one task that would give a
    mean as certain as this mean of tasks. Variances are taken at the centres of the tasks' Wilson intervals, so that
    none is 0, even where all scores agree. Else it is a bootstrap over the clusters within each task.
    Raises LensError where a named task has no score.
    """
    parts = [tasks[name] for name in names if name in tasks and tasks[name].count]
    if not names or len(parts) != len(names):
        absent = [name for name in names if name not in tasks or not tasks[name].count]
        raise LensError(
            f"the headline task {', '.join(map(shown, absent))} has no score at all; raise the number of prompts, or "
            f"let the benchmark's headline name others of {', '.join(map(shown, tasks))}"
        )
    value = sum(part.mean for part in parts) / len(parts)
    if all(part.binary for part in parts):
        effective = [part.effective_count() for part in parts]
        centres = [(part.mean * n + Z * Z / 2) / (n + Z * Z) for part, n in zip(parts, effective, strict=True)]
        centre = sum(centres) / len(parts)
        variance = sum(c * (1 - c) / n for c, n in zip(centres, effective, strict=True)) / len(parts) ** 2
        low, high = wilson_interval(value, centre * (1 - centre) / variance)
    elif all(part.distinct == 1 for part in parts):
        low, high = math.nan, math.nan
    else:
        rng = np.random.default_rng(0)
        low, high = middle(np.mean([part.resampled_means(part.draw_clusters(rng)) for part in parts], axis=0))
    return Estimate(
        value, low, high, *(sum(getattr(part, name) for part in parts) for name in ("count", "distinct", "missing"))
    )


FEW = 10
"""Independent pairs below which differences that are all alike give no interval: it would have no width."""


@frozen
class Difference:
    """How far one model's mean of tasks is above another's, on the `pairs` of pictures that both have a score for."""

    value: float
    low: float
    high: float
    pairs: int


def paired_difference(tasks: Mapping[str, ClusteredScores], names: Sequence[str]) -> Difference:
    """From differences of paired scores by task: their mean of tasks, by a bootstrap over clusters within each task."""
    parts = [tasks[name] for name in names if name in tasks and tasks[name].count]
    if not names or len(parts) != len(names):
        raise LensError("a headline task has no picture that both models have a score for; raise the number of prompts")
    value = sum(part.mean for part in parts) / len(parts)
    pairs = sum(part.count for part in parts)
    if all(part.distinct == 1 for part in parts):
        return Difference(value, math.nan, math.nan, pairs)
    rng = np.random.default_rng(0)
    resampled = np.mean([part.resampled_means(part.draw_clusters(rng)) for part in parts], axis=0)
    low, high = middle(resampled)
    # A spread that so few pairs did not show.
    if math.isclose(low, high, abs_tol=1e-12) and sum(part.distinct for part in parts) < FEW:
        return Difference(value, math.nan, math.nan, pairs)
    return Difference(value, low, high, pairs)
