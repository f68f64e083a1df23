"""From a file of perceptions to verdicts and to headlines, by two rules side by side.

Official: pictures that are refused, failed or missing vanish from every mean, as they do in the authors' code. Strict:
nothing of them is right. The coverage is the share of pictures that have a verdict.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from lens_bench import geneval
from lens_bench.benchmarks import BENCHMARKS, Metrics, Row
from lens_core.evaluation.statistics import Estimate
from lens_core.io import atomic_files, json_fields, readers
from lens_core.io.json_fields import FieldError
from lens_core.types import ConfigError, LensError, did_you_mean

STATUSES = ("ok", "refused", "failed", "missing")  # what became of a picture; only "ok" can have perceptions
MOST_PROBLEMS = 20  # lines of errors that are shown


@frozen
class Report:
    """`verdicts` are the fields of the cases' page, a dict a line; `official` and `strict` the headlines by name."""

    benchmark: str
    verdicts: list[dict[str, Any]]
    statuses: dict[str, int]
    official: Metrics
    strict: Metrics
    categories: dict[str, Metrics]
    notes: list[str]

    @property
    def coverage(self) -> float:
        return self.statuses.get("ok", 0) / sum(self.statuses.values())


# ---- a file -------------------------------------------------------------------------------------------------------


def score(name: str, path: Path, *, partial: bool = False) -> Report:
    """Decide every line of `path` that belongs to the benchmark `name`.

    A line may have, beside the fields of its benchmark, `bench` (another known benchmark's lines are left out), `id`,
    `status` (one of STATUSES; "ok" if absent), `prompt_id` (if absent, pictures with the same reference are of one
    prompt), `category`, and `perceiver`, the model and revision that perceived, the same in every line.
    Raises ConfigError with a line for each wrong line, or where there is none of this benchmark; LensError where no
    picture has perceptions, unless it is `partial`, one of several that are reported together; then `official` is {}.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark is called {name!r}.{did_you_mean(name, BENCHMARKS)}")
    tally = _Tally(name)
    for number, line in json_fields.numbered(path):
        try:
            if isinstance(line, FieldError):
                raise line
            tally.add(line, number)
        except FieldError as error:
            tally.problems.append(f"{path}, line {number}: {error}")
    if tally.problems:
        more = len(tally.problems) - MOST_PROBLEMS
        rest = [f"{path}: {more} more lines are wrong"] if more > 0 else []
        raise ConfigError([*tally.problems[:MOST_PROBLEMS], *rest])
    return tally.report(path, partial)


class _Tally:
    """The lines of one benchmark, as they come."""

    def __init__(self, name: str) -> None:
        self.name, self.benchmark = name, BENCHMARKS[name]
        self.problems: list[str] = []
        self.verdicts: list[dict[str, Any]] = []
        self.statuses: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.official: list[Row] = []
        self.strict: list[Row] = []
        self.places: dict[Any, int] = {}
        self.engine_failures = 0
        self.perceiver: tuple[Any, int] | None = None

    def add(self, line: dict[str, Any], number: int) -> None:
        bench = json_fields.choice(line.get("bench", self.name), "bench", list(BENCHMARKS))
        if bench != self.name:
            self.others[bench] += 1
            return
        status = json_fields.choice(line.get("status", "ok"), "status", STATUSES)
        self._check_identity(line, number)
        if status == "ok":
            self._check_perceiver(line, number)
        nothing = self.benchmark.nothing(line)
        verdict = self.benchmark.decide(line) if status == "ok" else {}
        group = self.benchmark.group(line)
        cluster = json.dumps(line["prompt_id"]) if "prompt_id" in line else self.benchmark.prompt(line)
        self.statuses[status] += 1
        self.strict.append(Row(verdict or nothing, cluster, group))
        if verdict:
            self.official.append(Row(verdict, cluster, group))
            self.engine_failures += line.get("ocr_lines") == "RAISE"
        kept: dict[str, Any] = {key: line[key] for key in ("id", "prompt_id", "status") if key in line}
        self.verdicts.append({"bench": self.name, **kept, **verdict})

    def _check_identity(self, line: dict[str, Any], number: int) -> None:
        if "id" in line:
            identity = json.dumps(line["id"])
            if identity in self.places:
                raise FieldError("id", f"{readers.shown(line['id'])} stands in line {self.places[identity]} too")
            self.places[identity] = number

    def _check_perceiver(self, line: dict[str, Any], number: int) -> None:
        """Perceptions of two models or revisions are no measurement of one system."""
        if self.perceiver is None:
            self.perceiver = line.get("perceiver"), number
        first, place = self.perceiver
        if line.get("perceiver") != first:
            problem = f"is not that of line {place}" if "perceiver" in line else f"is missing, and line {place} has one"
            raise FieldError("perceiver", f"{problem}; perceive with one model and revision")

    def report(self, path: Path, partial: bool) -> Report:
        if not self.verdicts:
            raise ConfigError(f"{path}: has no line of {self.name}; give the perceptions of this benchmark")
        if not self.official and not partial:
            counts = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
            raise LensError(f"{path}: no picture has perceptions ({counts}); there is nothing to score")
        groups = sorted({row.group for row in self.strict} - {""}) if self.name != "geneval" else []
        by_group = {g: [r for r in self.official if r.group == g] for g in groups if self.official}
        categories = {g: self.benchmark.metrics(rows) for g, rows in by_group.items()}
        official, strict = (self.benchmark.metrics(rows) if rows else {} for rows in (self.official, self.strict))
        notes = self._notes(official)
        return Report(self.name, self.verdicts, dict(self.statuses), official, strict, categories, notes)

    def _notes(self, official: Metrics) -> list[str]:
        notes = []
        if self.name == "geneval" and "overall" not in official:
            absent = [tag for tag in geneval.TAGS if tag not in official]
            notes.append(
                f"no overall score: it is the mean of six tags, and no picture of {', '.join(absent)} has a verdict"
            )
        if self.engine_failures:
            pictures = "1 picture is" if self.engine_failures == 1 else f"{self.engine_failures} pictures are"
            notes.append(f"{pictures} zeros because the OCR engine failed, which is no verdict")
        if self.others:
            counts = ", ".join(f"{count} of {name}" for name, count in self.others.items())
            notes.append(f"lines of other benchmarks were left out: {counts}")
        return notes


# ---- on disk and on the screen --------------------------------------------------------------------------------------


def write(path: Path, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Write the verdicts, a JSON object a line, whole or not at all."""
    text = "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts)
    for end in "\x85\u2028\u2029":  # many readers of lines take these for line ends
        text = text.replace(end, f"\\u{ord(end):04x}")
    atomic_files.write_text(path, text)


def as_json(report: Report) -> dict[str, Any]:
    """The summary as JSON; an interval or a score that cannot be known is null."""

    def plain(metrics: Metrics) -> dict[str, dict[str, Any]]:
        return {
            name: {key: None if value != value else value for key, value in asdict(estimate).items()}
            for name, estimate in metrics.items()
        }

    return {
        "benchmark": report.benchmark,
        "statuses": report.statuses,
        "coverage": report.coverage,
        "official": plain(report.official),
        "strict": plain(report.strict),
        "categories": {name: plain(metrics) for name, metrics in report.categories.items()},
        "notes": report.notes,
    }


def table(report: Report) -> str:
    """The summary as text: a line for each score, with its interval of 95 %, by both rules."""
    counts = ", ".join(f"{count} {status}" for status, count in report.statuses.items())
    out = [f"{BENCHMARKS[report.benchmark].title}: {counts}; coverage {report.coverage:.1%}"]
    out.append(f"{'':24} {'official':26} {'strict':26} prompts")
    for name in dict.fromkeys([*report.official, *report.strict]):
        out.append(_line(name, report.official.get(name), report.strict.get(name)))
    for category, metrics in report.categories.items():
        out += [_line(f"{category}: {name}", estimate, None) for name, estimate in metrics.items()]
    return "\n".join([*out, *(f"note: {note}" for note in report.notes)])


def _line(name: str, official: Estimate | None, strict: Estimate | None) -> str:
    distinct = next((e.distinct for e in (strict, official) if e is not None), 0)
    return f"{name:24} {_shown(official):26} {_shown(strict):26} {distinct}".rstrip()


def _shown(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "-"
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{interval}"
