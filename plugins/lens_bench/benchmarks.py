"""Each benchmark as a row of one table: how lines of perceptions are checked and decided, how verdicts are summed up.

A check raises FieldError, which names the field. The headlines are the published ones: GenEval's mean of six tags over
pictures, pooled words for LongText-Bench and CVTG-2K, OneIG's formula of three quantities. Intervals count prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import asdict, evolve, fields_dict, frozen

from lens_bench import cvtg, geneval, longtext, oneig, oneig_dimensions
from lens_core.attribution import RESERVED_TASKS
from lens_core.evaluation.statistics import ClusteredScores, Estimate, mean_of_tasks, middle
from lens_core.io import json_fields, readers
from lens_core.io.json_fields import FieldError

MOST_ROWS = 2**12  # detections of one class
MEANS = (*RESERVED_TASKS, "pictures")  # which no tag of GenEval can be called
LARGEST_COORDINATE = 1e6  # pixels; squares and products of larger ones leave a float's range in the end

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


# ---- GenEval ------------------------------------------------------------------------------------------------------


def _clauses(metadata: Mapping[str, Any], kind: str) -> None:
    for i, value in enumerate(json_fields.items(metadata.get(kind, []), f"metadata.{kind}")):
        name = f"metadata.{kind}[{i}]"
        clause = json_fields.mapping(value, name)
        json_fields.choice(json_fields.field(clause, "class", f"{name}."), f"{name}.class", geneval.CLASSES)
        json_fields.whole(json_fields.field(clause, "count", f"{name}."), f"{name}.count", low=1)
        if "color" in clause:
            json_fields.choice(clause["color"], f"{name}.color", geneval.COLORS)
        if "position" in clause:
            pair = json_fields.items(clause["position"], f"{name}.position")
            if len(pair) != 2:
                raise FieldError(f"{name}.position", f"must be [relation, clause], not {readers.shown(pair)}")
            json_fields.choice(pair[0], f"{name}.position[0]", geneval.RELATIONS)
            json_fields.whole(pair[1], f"{name}.position[1]")


def _metadata(line: Line) -> dict[str, Any]:
    metadata = json_fields.mapping(json_fields.field(line, "metadata"), "metadata")
    tag = json_fields.line(json_fields.field(metadata, "tag", "metadata."), "metadata.tag")
    if tag in MEANS:
        raise FieldError("metadata.tag", f"{tag!r} is the name of a mean; give the tag another name")
    _clauses(metadata, "include")
    _clauses(metadata, "exclude")
    return metadata


def _options(line: Line) -> geneval.Options:
    options = json_fields.mapping(line.get("options") or {}, "options")
    for name in options:
        json_fields.choice(name, f"options.{name[:40]}", list(fields_dict(geneval.Options)))
        json_fields.number(options[name], f"options.{name}")
    if "max_objects" in options:
        json_fields.whole(options["max_objects"], "options.max_objects", low=0)
    return geneval.Options(**options)


def _detections(line: Line) -> dict[str, list[list[float]]]:
    detections = json_fields.mapping(json_fields.field(line, "detections"), "detections")
    for name, rows in detections.items():
        json_fields.choice(name, f"detections.{name[:40]}", geneval.CLASSES)
        if len(json_fields.items(rows, f"detections.{name}")) > MOST_ROWS:
            raise FieldError(f"detections.{name}", f"has {len(rows)} rows; at most {MOST_ROWS} are read")
        for i, row in enumerate(rows):
            place = f"detections.{name}[{i}]"
            if len(json_fields.items(row, place)) != 5:
                raise FieldError(place, f"must be [x1, y1, x2, y2, score], not {readers.shown(row)}")
            for value in row:
                json_fields.number(value, place, LARGEST_COORDINATE)
    return detections


def _decide_geneval(line: Line) -> dict[str, Any]:
    colors = json_fields.mapping(line.get("colors") or {}, "colors")
    for name, answers in colors.items():
        json_fields.items(answers, f"colors.{name[:40]}")
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
    whole = set(tasks) >= set(geneval.TAGS)
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
    return json_fields.text(json_fields.field(line, "prompt"), "prompt")


def _decide_cvtg(line: Line) -> dict[str, Any]:
    ocr_lines = json_fields.field(line, "ocr_lines")
    failed = ocr_lines == "RAISE"
    lines = None if failed or ocr_lines is None else json_fields.texts(ocr_lines, "ocr_lines")
    verdict = asdict(cvtg.decide(_prompt(line), lines, failed))
    if "clip_cosine" in line:
        verdict["clip_score"] = cvtg.clip_score(_cosine(line, "clip_cosine"))
    return verdict


def _cosine(line: Line, name: str) -> float:
    return json_fields.number(json_fields.field(line, name), name, most=1.01)  # 1 and what rounding adds


def _cvtg_metrics(rows: Sequence[Row]) -> Metrics:
    words = [(value, row.cluster) for row in rows for value in row.verdict["word_ned"]]
    accuracy = _pooled_words(rows, "correct_words", "total_words")
    metrics = {"word accuracy": accuracy, "NED": _scores(words, shares=False).estimate()}
    if all("clip_score" in row.verdict for row in rows):  # else it is absent, and no mean of some pictures
        pictures = [(row.verdict["clip_score"], row.cluster) for row in rows]
        metrics["CLIPScore"] = _scores(pictures, shares=False).estimate()
    return metrics


def _references(line: Line) -> list[str]:
    return json_fields.texts(json_fields.field(line, "text"), "text")


def _longtext(chinese: bool) -> Benchmark:
    def decide(line: Line) -> dict[str, Any]:
        ocr = json_fields.text(json_fields.field(line, "ocr_raw"), "ocr_raw")
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
    return json_fields.text(json_fields.field(line, "text_content"), "text_content")


def _oneig(language: str) -> Benchmark:
    worst = oneig.WORST_DISTANCE[language]

    def decide(line: Line) -> dict[str, Any]:
        return asdict(oneig.decide(_content(line), json_fields.text(json_fields.field(line, "ocr_raw"), "ocr_raw")))

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


# ---- OneIG's other dimensions -------------------------------------------------------------------------------------


def _alignment(line: Line) -> dict[str, Any]:
    questions = list(_questions(line))
    answers = json_fields.mapping(json_fields.field(line, "answers"), "answers")
    for name in questions:
        json_fields.text(json_fields.field(answers, name, "answers."), f"answers.{name[:40]}")
    dependencies = json_fields.mapping(json_fields.field(line, "dependencies"), "dependencies")
    for name, parents in dependencies.items():
        for i, parent in enumerate(json_fields.items(parents, f"dependencies.{name[:40]}")):
            if not isinstance(parent, str):
                json_fields.whole(parent, f"dependencies.{name[:40]}[{i}]", low=0)
    return asdict(oneig_dimensions.alignment(questions, dependencies, answers))


def _questions(line: Line) -> dict[str, Any]:
    questions = json_fields.mapping(json_fields.field(line, "questions"), "questions")
    if not questions:
        raise FieldError("questions", "must hold a question")
    return questions


def _diversity(line: Line) -> dict[str, Any]:
    distances = json_fields.items(json_fields.field(line, "distances"), "distances")
    for i, value in enumerate(distances):
        json_fields.number(value, f"distances[{i}]", most=2.01)  # 1 - a cosine
    return asdict(oneig_dimensions.diversity(distances))


def _style(line: Line) -> dict[str, Any]:
    both = [_cosine(line, name) for name in ("style_csd_similarity", "style_encoder_similarity")]
    return asdict(oneig_dimensions.style(*both))


def _prompt_means(rows: Sequence[Row]) -> Metrics:
    """The mean over prompts of the mean over their pictures."""
    clusters = sorted({row.cluster for row in rows})
    values: dict[str, list[float]] = {cluster: [] for cluster in clusters}
    for row in rows:
        values[row.cluster].append(row.verdict["score"])
    means = [(sum(some) / len(some), cluster) for cluster, some in values.items()]
    return {"score": evolve(_scores(means, shares=False).estimate(), count=len(rows))}


def _mean_distances(rows: Sequence[Row]) -> Metrics:
    """The mean over prompts of the mean distance of all pairs of their pictures; a pair without a distance, which has a
    picture of which nothing is right, counts as 0."""
    sums: dict[str, tuple[int, float]] = {}
    for row in rows:
        pictures, distance = sums.get(row.cluster, (0, 0.0))
        sums[row.cluster] = pictures + 1, distance + row.verdict["distance_sum"]
    means = [(total / (n * (n - 1) / 2), cluster) for cluster, (n, total) in sorted(sums.items()) if n > 1]
    return {"score": evolve(_scores(means, shares=False).estimate(), count=len(rows))} if means else {}


def _dimension(
    name: str,
    language: str,
    decide: Callable[[Line], dict[str, Any]],
    nothing: Mapping[str, Any],
    metrics: Callable[[Sequence[Row]], Metrics] = _prompt_means,
) -> Benchmark:
    return Benchmark(
        title=f"OneIG ({language.upper()}), {name}",
        decide=decide,
        nothing=lambda line: dict(nothing),
        prompt=lambda line: json.dumps([line.get("prompt"), line.get("questions"), line.get("style")], sort_keys=True),
        group=_category,
        metrics=metrics,
    )


def _dimensions(language: str) -> dict[str, Benchmark]:
    def reasoning(line: Line) -> dict[str, Any]:
        return {"score": _cosine(line, "answer_cosine")}

    zero = {"score": 0.0}
    benchmarks = {
        "alignment": _dimension("alignment", language, _alignment, zero),
        "diversity": _dimension("diversity", language, _diversity, {"distance_sum": 0.0, "pairs": 0}, _mean_distances),
        "style": _dimension("style", language, _style, zero),
        "reasoning": _dimension("reasoning", language, reasoning, zero),
    }
    return {f"oneig_{name}_{language}": benchmark for name, benchmark in benchmarks.items()}


def _category(line: Line) -> str:
    return json_fields.line(line.get("category", ""), "category")


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
        title="CVTG-2K",
        decide=_decide_cvtg,
        nothing=lambda line: asdict(cvtg.decide(_prompt(line), None, failed=True)) | {"clip_score": 0.0},
        prompt=_prompt,
        group=_category,
        metrics=_cvtg_metrics,
    ),
    "longtext_en": _longtext(chinese=False),
    "longtext_zh": _longtext(chinese=True),
    "oneig_text_en": _oneig("en"),
    "oneig_text_zh": _oneig("zh"),
    **_dimensions("en"),
    **_dimensions("zh"),
}
