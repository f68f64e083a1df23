"""From a run's perceptions to the Decision that reports and comparisons read: every `bench` in the file, joined."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_bench import report
from lens_bench.benchmarks import BENCHMARKS
from lens_core.evaluation.decision import Decision, PictureScore
from lens_core.evaluation.statistics import Estimate
from lens_core.io import json_fields, readers
from lens_core.io.json_fields import FieldError
from lens_core.types import ConfigError, LensError

HEADLINES = {"GenEval": "overall", "CVTG": "word accuracy", "LongText": "text score"}
DIMENSIONS = ("alignment", "text", "diversity", "style", "reasoning")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def decide(benchmark: str, path: Path) -> Decision:
    """The decision about a file of perceptions. Of OneIG each dimension is a metric of its own; there is no overall
    score, which its authors do not publish; one whose pictures are all refused or failed is absent, and 0 by the strict
    rule. Raises LensError where nothing was perceived."""
    benches, statuses, tags = _benches(path)
    if not benches:
        raise ConfigError(f"{path}: holds no line; run the stages generate and perceive")
    reports = [report.score(bench, path, partial=benchmark == "OneIG") for bench in benches]
    scores = [score for one in reports for score in _scores(one, tags)]
    notes = [note for one in reports for note in one.notes if "other benchmarks" not in note]
    verdicts = [verdict for one in reports for verdict in one.verdicts]
    if benchmark == "OneIG":
        official, strict = (_dimensions(reports, name) for name in ("official", "strict"))
        absent = [name for name in DIMENSIONS if name not in official]
        notes += [f"absent, and in no mean: {', '.join(absent)}"] if absent else []
        categories: dict[str, Any] = {
            f"{_dimension(one.benchmark)}, {name}": metrics
            for one in reports
            for name, metrics in one.categories.items()
        }
        if not official:
            raise LensError(f"{path}: no picture of any dimension has perceptions; there is nothing to score")
        headline = next(iter(official))
    else:
        (one,) = reports
        official, strict, categories = dict(one.official), dict(one.strict), dict(one.categories)
        wanted = HEADLINES[benchmark]
        headline = wanted if wanted in official else next(iter(official))
    tasks = tuple(dict.fromkeys(score.task for score in scores))
    return Decision(headline, official, strict, scores, tasks, statuses, categories, notes, verdicts)


def _benches(path: Path) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """(the benchmarks that have lines, status -> pictures, prompt id -> GenEval's tag)."""
    benches: dict[str, None] = {}
    pictures: dict[str, str] = {}
    tags: dict[str, str] = {}
    for number, line in json_fields.numbered(path):
        if isinstance(line, FieldError):
            raise ConfigError(f"{path}, line {number}: {line}")
        try:
            bench = json_fields.choice(json_fields.field(line, "bench"), "bench", list(BENCHMARKS))
            status = json_fields.choice(line.get("status", "ok"), "status", report.STATUSES)
        except FieldError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        benches[bench] = None
        pictures[json.dumps(line.get("id", number))] = status
        if isinstance(line.get("metadata"), dict):
            tags[str(line.get("prompt_id"))] = str(line["metadata"].get("tag"))
    return list(benches), dict(Counter(pictures.values())), tags


def _dimension(bench: str) -> str:
    """ "alignment", of "oneig_alignment_en"."""
    return bench.split("_")[1]


def _dimensions(reports: list[report.Report], rule: str) -> dict[str, Estimate]:
    estimates = {}
    for one in reports:
        metrics = getattr(one, rule)
        name = _dimension(one.benchmark)
        estimate = metrics.get("text score" if name == "text" else "score")
        if estimate is not None:
            estimates[name] = estimate
    return {name: estimates[name] for name in DIMENSIONS if name in estimates}


def _scores(one: report.Report, tags: Mapping[str, str]) -> list[PictureScore]:
    scores = []
    for verdict in one.verdicts:
        try:
            name, index = str(verdict["prompt_id"]), int(str(verdict["id"]).rpartition("_")[2])
        except (KeyError, ValueError) as error:
            raise LensError(f"a verdict names no picture ({readers.one_line(error)})") from error
        score = picture_score(one.benchmark, verdict, name, index, tags.get(name, ""))
        if score is not None:
            scores.append(score)
    return scores


def picture_score(bench: str, verdict: Mapping[str, Any], name: str, index: int, tag: str) -> PictureScore | None:
    """What a verdict says about one picture, weighed as the official mean weighs it; None where it is about several."""
    if bench == "geneval":
        value = verdict.get("correct")
        return PictureScore(name, index, tag, None if value is None else float(value))
    if bench == "cvtg2k":
        return _weighed(verdict, "word_accuracy", "total_words", name, index, "words")
    if bench.startswith("longtext"):
        return _weighed(verdict, "text_accuracy", "gt_word_count", name, index, "text")
    if bench.startswith("oneig_text"):
        return _weighed(verdict, "wac", "gt_word_count", name, index, "text: words")
    if bench.startswith("oneig") and "diversity" not in bench:
        value = verdict.get("score")
        return PictureScore(name, index, _dimension(bench), None if value is None else float(value))
    return None


def _weighed(verdict: Mapping[str, Any], value: str, weight: str, name: str, index: int, task: str) -> PictureScore:
    number = verdict.get(value)
    return PictureScore(name, index, task, number, float(verdict[weight]) if number is not None else 1.0)
