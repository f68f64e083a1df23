"""What a search leaves in its folder: best.txt, candidates.json, report.md and progress.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lens_core.evaluation.run import by_task
from lens_core.evaluation.statistics import (
    ClusteredScores,
    Difference,
    Estimate,
    cluster_of,
    mean_of_tasks,
    paired_difference,
)
from lens_core.inference.reasoner_files import prompt_file
from lens_core.io import markdown
from lens_core.io.atomic_files import write_atomic, write_json, write_text
from lens_core.types import LensError, Score
from lens_reason.judging import Part
from lens_reason.recipe import Search
from lens_reason.results import SearchResult
from lens_reason.state import SearchFiles, name_of_prompt


def scores_of(files: SearchFiles, system: str, part: Part) -> list[Score]:
    """A candidate's scores over a part; failed where nothing was drawn."""
    judgements = [files.judged(name_of_prompt(system), part.name, i) for i in range(len(part.prompts))]
    return [Score("failed", evidence="not drawn") if one is None else one.score for one in judgements]


def estimate(files: SearchFiles, system: str, part: Part) -> Estimate:
    """A candidate's score over a part: the mean of the benchmark's headline tasks, with its 95 % interval."""
    tasks = by_task(part.prompts, scores_of(files, system, part))
    return mean_of_tasks(tasks, _headline(part, tasks))


def difference(files: SearchFiles, one: str, other: str, part: Part) -> Difference:
    """How far `other` is above `one` over the prompts for which both have a score."""
    pairs: dict[str, tuple[list[float], list[Any]]] = {}
    for prompt, a, b in zip(part.prompts, scores_of(files, one, part), scores_of(files, other, part), strict=True):
        if a.value is not None and b.value is not None:
            values, clusters = pairs.setdefault(prompt.task, ([], []))
            values.append(b.value - a.value)
            clusters.append(cluster_of(prompt))
    tasks = {task: ClusteredScores(*scores) for task, scores in pairs.items()}
    return paired_difference(tasks, _headline(part, tasks))


def _headline(part: Part, tasks: Any) -> tuple[str, ...]:
    named = tuple(task for task in getattr(part.benchmark, "headline", ()) if task in {p.task for p in part.prompts})
    return named or tuple(tasks)


def write(result: SearchResult, search: Search, folder: Path) -> None:
    """Each file whole or not at all; best.txt comes first: it has been paid for."""
    text = prompt_file(search.reasoner, result.best.system)
    write_text(folder / "best.txt", text)
    rows = candidate_rows(result)
    write_json(folder / "candidates.json", {"best": result.best.name, "ended": result.ended, "candidates": rows})
    words = report(result, search, rows)
    write_text(folder / "report.md", words)
    plot(rows, folder / "progress.png")


def candidate_rows(result: SearchResult) -> list[dict[str, Any]]:
    """Every candidate with its parent, the reason for the change, its dev score, how many dev pictures it has, and how
    many pictures the search had drawn when it was judged."""
    order = {(j.candidate, j.part, j.prompt): n for n, j in enumerate(result.files.all_judged(), 1)}
    rows = []
    for candidate in result.candidates:
        scores = [s for s in scores_of(result.files, candidate.system, result.dev) if s.status != "failed" or _drawn(s)]
        values = [s.value for s in scores if s.value is not None]
        last = max((n for key, n in order.items() if key[:2] == (candidate.name, "dev")), default=None)
        rows.append({
            "name": candidate.name, "parent": candidate.parent, "reason": candidate.reason,
            "dev_score": round(sum(values) / len(values), 4) if values else None, "dev_pictures": len(scores),
            "missing": len(scores) - len(values), "whole": len(scores) == len(result.dev.prompts), "pictures": last,
            "system": candidate.system,
        })  # fmt: skip
    return rows


def _drawn(score: Score) -> bool:
    return score.evidence != "not drawn"


def report(result: SearchResult, search: Search, rows: list[dict[str, Any]]) -> str:
    """The report as Markdown: start and best on held-out prompts, and what was tried."""
    start, best = result.start.system, result.best.system
    spent = result.files.spent
    lines = [
        "# Search for a system prompt", "",
        f"{result.files.pictures} pictures, {spent['calls']:.0f} calls, ${spent['usd']:.2f}; it ended because: "
        f"{result.ended}." + (f" Control: {search.control}." if search.control != "none" else ""), "",
        "| | dev | held out | 95 % interval | without a score |", "|---|---|---|---|---|",
        _row("start", result, start), _row("best", result, best), "", verdict(result), "",
        "| candidate | parent | dev score | dev pictures | why |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        score = "–" if row["dev_score"] is None else f"{row['dev_score']:.3f}"
        mark = " (best)" if row["name"] == result.best.name else ""
        lines.append(markdown.row([f"{row['name']}{mark}", row["parent"], score, row["dev_pictures"], row["reason"]]))
    return "\n".join([*lines, "", "The best system prompt:", "", *(f"> {line}" for line in best.splitlines()), ""])


def _row(label: str, result: SearchResult, system: str) -> str:
    dev, held = estimate(result.files, system, result.dev), estimate(result.files, system, result.heldout)
    return f"| {label} | {dev.value:.3f} | {held.value:.3f} | {held.low:.3f} to {held.high:.3f} | {held.missing} |"


def verdict(result: SearchResult) -> str:
    """The gain on held-out prompts in one sentence, and whether it exceeds the noise."""
    if result.best.system == result.start.system:
        return "Nothing that was tried is better than the start on the dev prompts."
    try:
        gain = difference(result.files, result.start.system, result.best.system, result.heldout)
    except LensError as error:
        return f"The gain cannot be told: {error}."
    words = f"On held-out prompts the best is {gain.value:+.3f} from the start"
    if math.isnan(gain.low):
        return f"{words}, on too few prompts for an interval: **within noise**."
    words += f" ({gain.low:+.3f} to {gain.high:+.3f})"
    if not gain.low > 0:
        return f"{words}: **within noise**." if gain.high >= 0 else f"{words}: worse."
    return f"{words}."


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Dev score against pictures drawn: every candidate that was judged whole, and the best so far. Nothing without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    whole = sorted((row for row in rows if row["whole"] and row["dev_score"] is not None), key=lambda r: r["pictures"])
    if not whole:
        return
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    x, y = [row["pictures"] for row in whole], [row["dev_score"] for row in whole]
    best = [max(y[: n + 1]) for n in range(len(y))]
    axes.step([*x, max(row["pictures"] or 0 for row in rows)], [*best, best[-1]], where="post", label="best so far")
    axes.plot(x, y, "o", alpha=0.6, label="candidate")
    axes.set_xlabel("pictures drawn")
    axes.set_ylabel("score on dev prompts")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.tight_layout()
    write_atomic(path, lambda p: figure.savefig(p, dpi=110))
    pyplot.close(figure)


def summary(result: SearchResult) -> str:
    """What a person wants to read first."""
    return f"{verdict(result)}\nbest.txt holds the best of {len(result.candidates)} system prompts"
