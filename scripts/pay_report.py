"""What came of the trainings of `does_it_pay.py`: two figures of score against steps, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pay_training import ARMS, TASKS

from lens_core.evaluation.statistics import ClusteredScores, Difference, Estimate, mean_of_tasks, paired_difference
from lens_core.io.atomic_files import read_json, write_atomic
from lens_core.types import LensError

HEADLINE = tuple(task for task in TASKS if task != "single")  # single things cannot be held out
KINDS = {"brief": "asked briefly", "dense": "asked at length"}
Results = dict[str, list[dict[str, Any]]]  # by arm, ordered by seed


def read_results(folder: Path) -> Results:
    """The runs in a folder. Raises LensError where there is none."""
    results: Results = {}
    for path in sorted(folder.glob("*-*.json")):
        result = read_json(path)
        results.setdefault(result["arm"], []).append(result)
    if not results:
        raise LensError(f"{folder}: holds no result; run `does_it_pay.py BUNDLE --train --output {folder}` first")
    return {arm: sorted(results[arm], key=lambda r: r["seed"]) for arm in ARMS if arm in results}


# ---- tables ---------------------------------------------------------------------------------------------------------


def clustered(rows: Sequence[tuple[str, str, float]], names: Sequence[str]) -> dict[str, ClusteredScores]:
    """Rows of (task, question, value), by task. The pictures of one question, one from each seed, are one draw."""
    return {
        name: ClusteredScores([v for task, _, v in rows if task == name], [q for task, q, _ in rows if task == name])
        for name in names
    }


def difference(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], kind: str) -> Difference | None:
    """How far the runs are above those of `base`, on the same prompts by the same seed; None without a common seed."""
    others = {run["seed"]: run["verdicts"][kind] for run in base}
    rows = [
        (task, question, value - before)
        for run in runs
        if run["seed"] in others
        for (task, question, value), (_, same, before) in zip(run["verdicts"][kind], others[run["seed"]], strict=True)
        if question == same
    ]
    return paired_difference(clustered(rows, HEADLINE), HEADLINE) if rows else None


def overall(run: dict[str, Any], kind: str) -> float:
    return float(run["test"][kind]["overall"])


def spread(values: Sequence[float]) -> str:
    """The standard deviation over seeds."""
    return f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def shown(value: Difference | Estimate | None, sign: str = "") -> str:
    return "" if value is None else f"{value.value:{sign}.3f} ({value.low:{sign}.3f} to {value.high:{sign}.3f})"


def scores_table(results: Results, kind: str) -> list[str]:
    """Test scores by arm: means over seeds with the interval over questions, each seed, and how far they spread."""
    lines = [
        f"| {KINDS[kind]} | seeds | {' | '.join(TASKS)} | overall (95 % interval) | each seed | deviation of seeds |",
        "|---" * (len(TASKS) + 5) + "|",
    ]
    for arm, runs in results.items():
        runs = [run for run in runs if kind in run["verdicts"]]
        if not runs:
            continue
        rows = [row for run in runs for row in run["verdicts"][kind]]
        tasks, seeds = clustered(rows, TASKS), [overall(run, kind) for run in runs]
        means = " | ".join(f"{tasks[task].mean:.3f}" for task in TASKS)
        each = ", ".join(f"{value:.3f}" for value in seeds)
        lines.append(
            f"| {arm} | {len(runs)} | {means} | {shown(mean_of_tasks(tasks, HEADLINE))} | {each} | {spread(seeds)} |"
        )
    return lines


def differences_table(results: Results, kind: str, bases: Sequence[str]) -> list[str]:
    """Paired differences of overall against some arms: of all seeds, and of each."""
    lines = [f"| {KINDS[kind]} | less | difference (95 % interval) | each seed | pairs |", "|---|---|---|---|---|"]
    for base in bases:
        for arm, runs in results.items():
            runs = [run for run in runs if kind in run["verdicts"]]
            before = [run for run in results.get(base, []) if kind in run["verdicts"]]
            value = difference(runs, before, kind)
            if arm == base or value is None:
                continue
            known = {run["seed"]: overall(run, kind) for run in before}
            each = [overall(run, kind) - known[run["seed"]] for run in runs if run["seed"] in known]
            seeds = ", ".join(f"{one:+.3f}" for one in each)
            lines.append(f"| {arm} | {base} | {shown(value, '+')} | {seeds} | {value.pairs} |")
    return lines


def tables(results: Results) -> str:
    """All tables as Markdown."""
    one = next(iter(results.values()))[0]
    seconds = [run["training_seconds"] for runs in results.values() for run in runs]
    lines = [
        f"{len(seconds)} runs of {one['steps']} steps of {one['batch']} pictures on {one['device']}, torch "
        f"{one['torch']}, {min(seconds):.0f} to {max(seconds):.0f} s each; "
        f"{len(one['verdicts']['brief'])} prompts of `test`. Intervals are over distinct questions.",
        "",
        *scores_table(results, "brief"),
        "",
        *scores_table(results, "dense"),
        "",
        *differences_table(results, "brief", ("dirty", "random", "curated")),
        "",
        *differences_table(results, "dense", ("curated",)),
    ]
    return "\n".join(lines) + "\n"


# ---- figures --------------------------------------------------------------------------------------------------------

COLOURS = {"dirty": "#c8553d", "random": "#8a8a8a", "curated": "#2f6db0", "dense": "#3a8f5c", "mixed": "#8a5fb0"}


def plot(axes: Any, results: Results, arms: Sequence[str], kind: str) -> None:
    """Overall score against steps: each seed thin, their mean thick."""
    for arm in arms:
        curves = [
            [(point["step"], point[kind]["overall"]) for point in run["curve"]]
            for run in results.get(arm, [])
            if kind in run["curve"][-1]
        ]
        if not curves:
            continue
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=COLOURS[arm], linewidth=0.8, alpha=0.45)
        steps = [step for step, _ in curves[0]]
        mean = np.mean([[value for _, value in curve] for curve in curves], axis=0)
        label = f"{arm} ({len(curves)} seeds)" if len(curves) > 1 else f"{arm} (1 seed)"
        axes.plot(steps, mean, color=COLOURS[arm], linewidth=2.4, marker="o", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="overall, prompts of select", ylim=(-0.02, 1.0))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")


def figures(results: Results, folder: Path) -> None:
    """`curated.png` and `captions.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    captions = [(kind, ("curated", "dense", "mixed")) for kind in KINDS]
    for name, panels in (("curated", [("brief", ("dirty", "random", "curated"))]), ("captions", captions)):
        figure, all_axes = plt.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 4.2), squeeze=False)
        for axes, (kind, arms) in zip(all_axes[0], panels, strict=True):
            plot(axes, results, arms, kind)
            axes.set_title(KINDS[kind])
        figure.tight_layout()
        write_atomic(folder / f"{name}.png", lambda path, figure=figure: figure.savefig(path, dpi=110))
        plt.close(figure)


def report(folder: Path) -> None:
    """Write `report/` in a folder of results: tables and figures; print the tables."""
    results = read_results(folder)
    text = tables(results)
    write_atomic(folder / "report" / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(text)
    figures(results, folder / "report")
