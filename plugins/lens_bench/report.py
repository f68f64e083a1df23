"""From lines of perceptions to verdicts, and from verdicts to each benchmark's published headline.

Two rules side by side. Official: pictures that are refused, failed or missing vanish from every mean, as they do in the
authors' code. Strict: nothing of them is right. The coverage is the share of pictures that have a verdict.
Pictures of one prompt succeed and fail together, so the intervals count prompts (`lens_core`'s statistics).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, fields_dict, frozen

from lens_bench import cvtg, geneval, lines, longtext, oneig
from lens_bench.lines import FieldError
from lens_core.evaluation.statistics import ClusteredScores, Estimate, mean_of_tasks, middle
from lens_core.io import atomic_files, readers
from lens_core.types import ConfigError, LensError, did_you_mean

MOST_PROBLEMS = 20  # lines of errors that are shown

Line = Mapping[str, Any]
Metrics = dict[str, Estimate]


@frozen
class Row:
    """One picture: its verdict, its prompt (`cluster`), and its tag or category ("" without)."""

    verdict: Mapping[str, Any]
    cluster: str
    group: str = ""


@frozen
class Benchmark:
    """How the lines of one benchmark are decided and summed up."""

    title: str
    decide: Callable[[Line], dict[str, Any]]  # the fields of a verdict, from a line with perceptions
    nothing: Callable[[Line], dict[str, Any]]  # the verdict on a picture of which nothing is right
    prompt: Callable[[Line], str]  # what pictures of one prompt share
    group: Callable[[Line], str]
    metrics: Callable[[Sequence[Row]], Metrics]


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


# ---- GenEval ------------------------------------------------------------------------------------------------------


def _clauses(metadata: Mapping[str, Any], kind: str) -> None:
    for i, value in enumerate(lines.items(metadata.get(kind, []), f"metadata.{kind}")):
        name = f"metadata.{kind}[{i}]"
        clause = lines.mapping(value, name)
        lines.choice(lines.field(clause, "class", f"{name}."), f"{name}.class", geneval.CLASSES)
        lines.whole(lines.field(clause, "count", f"{name}."), f"{name}.count", low=1)
        if "color" in clause:
            lines.choice(clause["color"], f"{name}.color", geneval.COLORS)
        if "position" in clause:
            pair = lines.items(clause["position"], f"{name}.position")
            if len(pair) != 2:
                raise FieldError(f"{name}.position", f"must be [relation, clause], not {readers.shown(pair)}")
            lines.choice(pair[0], f"{name}.position[0]", geneval.RELATIONS)
            lines.whole(pair[1], f"{name}.position[1]")


def _metadata(line: Line) -> dict[str, Any]:
    metadata = lines.mapping(lines.field(line, "metadata"), "metadata")
    lines.text(lines.field(metadata, "tag", "metadata."), "metadata.tag")
    _clauses(metadata, "include")
    _clauses(metadata, "exclude")
    return metadata


def _options(line: Line) -> geneval.Options:
    given = lines.mapping(line.get("options") or {}, "options")
    for name in given:
        lines.choice(name, f"options.{name[:40]}", list(fields_dict(geneval.Options)))
        lines.number(given[name], f"options.{name}")
    if "max_objects" in given:
        lines.whole(given["max_objects"], "options.max_objects", low=0)
    return geneval.Options(**given)


def _detections(line: Line) -> dict[str, list[list[float]]]:
    detections = lines.mapping(lines.field(line, "detections"), "detections")
    for name, rows in detections.items():
        lines.choice(name, f"detections.{name[:40]}", geneval.CLASSES)
        if len(lines.items(rows, f"detections.{name}")) > lines.MOST_ROWS:
            raise FieldError(f"detections.{name}", f"has {len(rows)} rows; at most {lines.MOST_ROWS} are read")
        for i, row in enumerate(rows):
            place = f"detections.{name}[{i}]"
            if len(lines.items(row, place)) != 5:
                raise FieldError(place, f"must be [x1, y1, x2, y2, score], not {readers.shown(row)}")
            for value in row:
                lines.number(value, place, lines.LARGEST_COORDINATE)
    return detections


def _decide_geneval(line: Line) -> dict[str, Any]:
    colors = lines.mapping(line.get("colors") or {}, "colors")
    for name, answers in colors.items():
        lines.items(answers, f"colors.{name[:40]}")
    return asdict(geneval.decide(_metadata(line), _detections(line), colors, _options(line)))


def _geneval_nothing(line: Line) -> dict[str, Any]:
    _metadata(line)
    return {"correct": False}


def _geneval_metrics(rows: Sequence[Row]) -> Metrics:
    """ "overall", the mean of the six tags, where all six have pictures; each tag; the share of pictures."""
    tasks = {
        tag: _scores([(float(row.verdict["correct"]), row.cluster) for row in rows if row.group == tag])
        for tag in sorted({row.group for row in rows}, key=lambda tag: (*geneval.TAGS, tag).index(tag))
    }
    whole = set(tasks) == set(geneval.TAGS)
    overall = {"overall": mean_of_tasks(tasks, geneval.TAGS)} if whole else {}
    pictures = _scores([(float(row.verdict["correct"]), row.cluster) for row in rows])
    return overall | {tag: scores.estimate() for tag, scores in tasks.items()} | {"pictures": pictures.estimate()}


# ---- text ---------------------------------------------------------------------------------------------------------


def _scores(pairs: Sequence[tuple[float, str]], shares: bool = True) -> ClusteredScores:
    """Scores with their prompts; without `shares` they are amounts, even where all happen to be 0 or 1."""
    scores = ClusteredScores([value for value, _ in pairs], [cluster for _, cluster in pairs])
    scores.binary = scores.binary and shares
    return scores


def _pooled_words(rows: Sequence[Row], right: str, total: str) -> Estimate:
    """The share of all pictures' reference words that are right; each word is a yes or no of its prompt."""
    counts = [(row.verdict[right], row.verdict[total], row.cluster) for row in rows]
    return _scores([(float(i < n), cluster) for n, of, cluster in counts for i in range(of)]).estimate()


def _prompt(line: Line) -> str:
    return lines.text(lines.field(line, "prompt"), "prompt")


def _decide_cvtg(line: Line) -> dict[str, Any]:
    given = lines.field(line, "ocr_lines")
    failed = given == "RAISE"
    return asdict(
        cvtg.decide(_prompt(line), None if failed or given is None else lines.texts(given, "ocr_lines"), failed)
    )


def _cvtg_metrics(rows: Sequence[Row]) -> Metrics:
    words = [(value, row.cluster) for row in rows for value in row.verdict["word_ned"]]
    accuracy = _pooled_words(rows, "correct_words", "total_words")
    return {"word accuracy": accuracy, "NED": _scores(words, shares=False).estimate()}


def _references(line: Line) -> list[str]:
    return lines.texts(lines.field(line, "text"), "text")


def _longtext(chinese: bool) -> Benchmark:
    def decide(line: Line) -> dict[str, Any]:
        ocr = lines.text(lines.field(line, "ocr_raw"), "ocr_raw")
        return asdict(longtext.decide(_references(line), ocr, chinese))

    return Benchmark(
        title=f"LongText-Bench ({'ZH' if chinese else 'EN'})",
        decide=decide,
        nothing=lambda line: asdict(longtext.decide(_references(line), "", chinese)),
        prompt=lambda line: "\n".join(_references(line)),
        group=_category,
        metrics=lambda rows: {"text score": _pooled_words(rows, "match_word_count", "gt_word_count")},
    )


def _content(line: Line) -> str:
    return lines.text(lines.field(line, "text_content"), "text_content")


def _oneig(language: str) -> Benchmark:
    worst = oneig.WORST_DISTANCE[language]

    def decide(line: Line) -> dict[str, Any]:
        return asdict(oneig.decide(_content(line), lines.text(lines.field(line, "ocr_raw"), "ocr_raw")))

    def nothing(line: Line) -> dict[str, Any]:
        return asdict(oneig.decide(_content(line), "")) | {"edit_distance": worst, "completed": 0}

    return Benchmark(
        title=f"OneIG ({language.upper()}), text",
        decide=decide,
        nothing=nothing,
        prompt=_content,
        group=_category,
        metrics=lambda rows: _oneig_metrics(rows, worst),
    )


def _oneig_metrics(rows: Sequence[Row], worst: float) -> Metrics:
    """The text score, which is no mean: its interval comes from prompts drawn with replacement."""
    clusters = sorted({row.cluster for row in rows})
    sums = np.zeros((len(clusters), 5))  # of pictures, distances, completed, words read, words
    places = {cluster: i for i, cluster in enumerate(clusters)}
    for row in rows:
        v = row.verdict
        counts = (1, v["edit_distance"], v["completed"], v["match_word_count"], v["gt_word_count"])
        sums[places[row.cluster]] += counts
    total = sums.sum(0)
    if not total[4]:
        return {}

    def score(of: Sequence[float]) -> float:
        return oneig.text_score(of[1] / of[0], of[2] / of[0], of[3] / of[4] if of[4] else 0.0, worst)

    low = high = math.nan
    if len(clusters) > 1:
        every = ClusteredScores([0.0] * len(clusters), clusters)
        drawn = sums[every.draw_clusters(np.random.default_rng(0))].sum(1)
        low, high = middle(np.array([score(of) for of in drawn]))
    headline = Estimate(score(total), low, high, int(total[0]), len(clusters))
    return {
        "text score": headline,
        "ED": _scores([(row.verdict["edit_distance"], row.cluster) for row in rows], shares=False).estimate(),
        "CR": _scores([(float(row.verdict["completed"]), row.cluster) for row in rows]).estimate(),
        "WAC": _pooled_words(rows, "match_word_count", "gt_word_count"),
    }


def _category(line: Line) -> str:
    return lines.text(line.get("category", ""), "category")


BENCHMARKS = {
    "geneval": Benchmark(
        title="GenEval",
        decide=_decide_geneval,
        nothing=_geneval_nothing,
        prompt=lambda line: json.dumps(line["metadata"], sort_keys=True),
        group=lambda line: line["metadata"]["tag"],
        metrics=_geneval_metrics,
    ),
    "cvtg2k": Benchmark(
        title="CVTG-2K, words",
        decide=_decide_cvtg,
        nothing=lambda line: asdict(cvtg.decide(_prompt(line), None, failed=True)),
        prompt=_prompt,
        group=_category,
        metrics=_cvtg_metrics,
    ),
    "longtext_en": _longtext(chinese=False),
    "longtext_zh": _longtext(chinese=True),
    "oneig_text_en": _oneig("en"),
    "oneig_text_zh": _oneig("zh"),
}


# ---- a file -------------------------------------------------------------------------------------------------------


def score(name: str, path: Path) -> Report:
    """Decide every line of `path` that belongs to the benchmark `name`.

    A line may have, beside the fields of its benchmark, `bench` (another known benchmark's lines are left out), `id`,
    `status` (one of STATUSES; "ok" if absent), `prompt_id` (if absent, pictures with the same reference are of one
    prompt), `category`, and `perceiver`, the model and revision that perceived, the same in every line.
    Raises ConfigError with a line for each wrong line, or where there is none of this benchmark; LensError where no
    picture has perceptions.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark is called {name!r}.{did_you_mean(name, BENCHMARKS)}")
    tally = _Tally(name)
    for number, line in lines.numbered(path):
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
    return tally.report(path)


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
        bench = lines.choice(line.get("bench", self.name), "bench", list(BENCHMARKS))
        if bench != self.name:
            self.others[bench] += 1
            return
        status = lines.choice(line.get("status", "ok"), "status", lines.STATUSES)
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
            given = f"is not that of line {place}" if "perceiver" in line else f"is missing, and line {place} has one"
            raise FieldError("perceiver", f"{given}; perceive with one model and revision")

    def report(self, path: Path) -> Report:
        if not self.verdicts:
            raise ConfigError(f"{path}: has no line of {self.name}; give the perceptions of this benchmark")
        if not self.official:
            counts = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
            raise LensError(f"{path}: no picture has perceptions ({counts}); there is nothing to score")
        groups = sorted({row.group for row in self.strict} - {""}) if self.name != "geneval" else []
        categories = {g: self.benchmark.metrics([r for r in self.official if r.group == g]) for g in groups}
        official, strict = (self.benchmark.metrics(rows) for rows in (self.official, self.strict))
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
    atomic_files.write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


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
