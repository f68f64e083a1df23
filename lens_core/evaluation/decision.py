"""Stage 3 of a benchmark run: what was decided about each picture, and the scores by two rules side by side.

Official: pictures that are refused, failed or missing vanish from every mean, as they do in most authors' code. Strict:
each of them counts as 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

from lens_core.attribution import calling, name_of, refuse
from lens_core.evaluation.contracts import naming_first
from lens_core.evaluation.perception import read_score
from lens_core.evaluation.statistics import ClusteredScores, Estimate, mean_of_tasks, pooled
from lens_core.io.readers import shown
from lens_core.types import ConfigError, LensError, PluginError, Prompt, Score

Metrics = Mapping[str, Estimate]


@frozen
class PictureScore:
    """The score of one picture, for contact sheets and paired comparisons. Means weigh it by `weight`: a score that is
    the share of right words by the number of words."""

    prompt_id: str
    index: int
    task: str
    value: float | None  # None: it has no score
    weight: float = 1.0


@frozen
class Decision:
    """What a benchmark decided about a run. `headline` is the metric that stands for the benchmark, `tasks` are those
    that comparisons take the mean of."""

    headline: str
    official: Metrics
    strict: Metrics
    scores: Sequence[PictureScore]
    tasks: tuple[str, ...]
    statuses: Mapping[str, int]  # ok, refused, failed, missing -> pictures
    categories: Mapping[str, Metrics] = field(factory=dict)
    notes: Sequence[str] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()

    @property
    def coverage(self) -> float:
        """The share of pictures that have a verdict."""
        return self.statuses.get("ok", 0) / max(1, sum(self.statuses.values()))


def decided_by(benchmark: Any, perceptions: Path, prompts: Mapping[str, Prompt]) -> Decision:
    """What a benchmark's `decide` returned about the pictures of `prompts`, prompt id -> prompt."""
    with calling(benchmark, "decide"):
        decided = benchmark.decide(perceptions)
    if not isinstance(decided, Decision):
        refuse(benchmark, "decide", decided, "it must return a Decision")
    for score in decided.scores:
        if not isinstance(score, PictureScore) or score.prompt_id not in prompts:
            what = score.prompt_id if isinstance(score, PictureScore) else score
            raise PluginError(f"{name_of(benchmark)}.decide scored {shown(what)}, which is no picture of this run")
    return decided


def decide_scores(
    lines: Iterable[Mapping[str, Any]], tasks: Mapping[str, str], clusters: Mapping[str, Any], headline: Sequence[str]
) -> Decision:
    """The decision of a benchmark whose perceptions are scores. `tasks` and `clusters`: prompt id -> its task and what
    its pictures share. Pictures whose score abstains or failed are counted apart by both rules, never as zeros.

    Raises LensError where a headline task has no score; ConfigError for a line that is no score.
    """
    scores: list[PictureScore] = []
    statuses: Counter[str] = Counter()
    seen: set[tuple[str, int]] = set()
    judged: list[tuple[str, Score]] = []  # the task and score of each picture that is there
    unscored: set[tuple[str, int]] = set()  # those that the judge gave no score
    for line in lines:
        name, index, status = line.get("prompt_id"), line.get("index"), line.get("status")
        if not isinstance(name, str) or name not in tasks or type(index) is not int or not isinstance(status, str):
            raise ConfigError("the perceptions are of other prompts; run the stage perceive again")
        if (name, index) in seen:
            raise ConfigError(f"picture {name}_{index} stands twice in the perceptions; run the stage perceive again")
        seen.add((name, index))
        statuses[status] += 1
        score = _score_of(line) if status == "ok" else None
        if score is not None:
            judged.append((tasks[name], score))
            unscored |= {(name, index)} if score.value is None else set()
        scores.append(PictureScore(name, index, tasks[name], None if score is None else score.value))
    names = tuple(headline) or tuple(dict.fromkeys(tasks.values()))
    with naming_first(judged, names):
        official = _metrics(scores, clusters, names)
    zeros = [
        score if score.value is not None or (score.prompt_id, score.index) in unscored else _zero(score)
        for score in scores
    ]
    return Decision("overall", official, _metrics(zeros, clusters, names), scores, names, dict(statuses))


def _score_of(line: Mapping[str, Any]) -> Score:
    try:
        return read_score(line["score"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("the perceptions hold a line without a score; run the stage perceive again") from error


def _zero(score: PictureScore) -> PictureScore:
    return PictureScore(score.prompt_id, score.index, score.task, 0.0, score.weight)


def _metrics(scores: Sequence[PictureScore], clusters: Mapping[str, Any], headline: Sequence[str]) -> Metrics:
    tasks = by_task(scores, clusters)
    if not any(task.count for task in tasks.values()):
        raise LensError("no picture has a score; there is nothing to report")
    estimates = {name: task.estimate() for name, task in tasks.items()}
    return {**estimates, "overall": mean_of_tasks(tasks, headline), "all pictures": pooled(tasks)}


def by_task(scores: Sequence[PictureScore], clusters: Mapping[str, Any]) -> dict[str, ClusteredScores]:
    """Scores by task, in order of first appearance, weighed."""
    groups: dict[str, list[PictureScore]] = {}
    for score in scores:
        groups.setdefault(score.task, []).append(score)
    return {name: _clustered(group, clusters) for name, group in groups.items()}


def _clustered(group: Sequence[PictureScore], clusters: Mapping[str, Any]) -> ClusteredScores:
    known = [(s, s.value) for s in group if s.value is not None and s.weight > 0]
    missing = sum(s.value is None for s in group)
    return ClusteredScores(
        [value for _, value in known], [clusters[s.prompt_id] for s, _ in known], missing,
        weights=[s.weight for s, _ in known],
    )  # fmt: skip


def numbers(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Metrics as JSON; what cannot be known is null."""
    return {
        name: {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(estimate).items()}
        for name, estimate in metrics.items()
    }
