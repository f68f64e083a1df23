"""What came of the trainings of `does_it_pay.py`: tables, two figures of score against steps, and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from pay_training import ARMS, TASKS

from lens_core.evaluation.statistics import ClusteredScores, Difference, mean_of_tasks, paired_difference
from lens_core.io.atomic_files import read_json, write_atomic, write_text
from lens_core.types import LensError

HEADLINE = tuple(task for task in TASKS if task != "single")  # single things cannot be held out
SINGLE = ("single",)
KINDS = {"brief": "brief prompts", "dense": "dense prompts"}
DATA, CAPTIONS = ("dirty", "random", "curated", "shuffled"), ("curated", "dense", "mixed")  # the two questions' arms
PAIRS = {  # (kind of prompt, arms) -> which are compared, the second the base
    ("brief", DATA): (("curated", "dirty"), ("curated", "random"), ("random", "dirty")),
    ("brief", CAPTIONS): (("dense", "curated"), ("mixed", "curated")),
    ("dense", CAPTIONS): (("dense", "curated"), ("mixed", "curated"), ("mixed", "dense")),
}
Row = tuple[str, str, float]  # task, question, score
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


@frozen
class Gain:
    """How far one arm is above another: over questions with its interval, and of each seed that both have."""

    over_questions: Difference
    seeds: list[float]

    @property
    def deviation(self) -> float:
        return float(np.std(self.seeds, ddof=1))

    def over_seeds(self) -> tuple[float, float]:
        """The 95 % t-interval of the mean over seeds. It takes seeds for the only chance there is."""
        from scipy import stats

        half = float(stats.t.ppf(0.975, len(self.seeds) - 1)) * self.deviation / math.sqrt(len(self.seeds))
        return float(np.mean(self.seeds)) - half, float(np.mean(self.seeds)) + half


def clustered(rows: Sequence[Row], names: Sequence[str]) -> dict[str, ClusteredScores]:
    """Rows of (task, question, value), by task. The pictures of one question, one from each seed, are one draw."""
    return {
        name: ClusteredScores([v for task, _, v in rows if task == name], [q for task, q, _ in rows if task == name])
        for name in names
    }


def with_kind(results: Results, arm: str, kind: str) -> list[dict[str, Any]]:
    """The runs of an arm that were evaluated with this kind of prompt."""
    return [run for run in results.get(arm, []) if kind in run["verdicts"]]


def difference(
    runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], kind: str, names: Sequence[str] = HEADLINE
) -> Gain | None:
    """How far the runs are above those of `base` in the mean of the named tasks, on the same prompts by the same seed;
    None without a common seed."""
    others = {run["seed"]: run["verdicts"][kind] for run in base}
    rows: list[Row] = []
    seeds: list[float] = []
    for run in runs:
        if run["seed"] not in others:
            continue
        pairs = zip(run["verdicts"][kind], others[run["seed"]], strict=True)
        paired = [(task, question, value - before) for (task, question, value), (_, same, before) in pairs
                    if question == same]  # fmt: skip
        seeds.append(float(np.mean([part.mean for part in clustered(paired, names).values()])))
        rows += paired
    return Gain(paired_difference(clustered(rows, names), names), seeds) if rows else None


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def scores_table(results: Results, kind: str, arms: Sequence[str]) -> list[str]:
    """Test scores by arm: means over seeds with the interval over questions, each seed, and how far they spread."""
    lines = [
        f"| {KINDS[kind]} | {' | '.join(TASKS)} | overall (95 % over prompts) | by seed | standard deviation |",
        "|---" * (len(TASKS) + 4) + "|",
    ]
    for arm in arms:
        runs = with_kind(results, arm, kind)
        if not runs:
            continue
        rows = [row for run in runs for row in run["verdicts"][kind]]
        tasks, seeds = clustered(rows, TASKS), [float(run["test"][kind]["overall"]) for run in runs]
        means = " | ".join(f"{tasks[task].mean:.3f}" for task in TASKS)
        estimate = mean_of_tasks(tasks, HEADLINE)
        spread = f"{np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else ""
        lines.append(
            f"| {arm} | {means} | {interval(estimate.value, estimate.low, estimate.high)} | "
            f"{', '.join(f'{value:.3f}' for value in seeds)} | {spread} |"
        )
    return lines


def differences_table(results: Results, kind: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Paired differences of some arms, of the mean of the held-out tasks and of single things."""
    lines = [
        f"| {KINDS[kind]} | score | difference (95 % over prompts) | by seed | standard deviation | 95 % over seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, base in pairs:
        for label, names in (("overall", HEADLINE), ("single", SINGLE)):
            gain = difference(with_kind(results, arm, kind), with_kind(results, base, kind), kind, names)
            if gain is None:
                continue
            value, spread, seeds = gain.over_questions, "", ""
            if len(gain.seeds) > 1:
                low, high = gain.over_seeds()
                spread, seeds = f"{gain.deviation:.3f}", f"{low:+.3f} to {high:+.3f}"
            lines.append(
                f"| {arm} minus {base} | {label} | {interval(value.value, value.low, value.high, '+')} | "
                f"{', '.join(f'{one:+.3f}' for one in gain.seeds)} | {spread} | {seeds} |"
            )
    return lines


def tables(results: Results) -> str:
    """All tables as Markdown."""
    one = next(iter(results.values()))[0]
    runs = sum(len(held) for held in results.values())
    lines = [
        f"{runs} runs of {one['steps']} steps of {one['batch']} pictures on {one['device']}, torch {one['torch']}; "
        f"{len(one['verdicts']['brief'])} prompts of `test`."
    ]
    for (kind, arms), pairs in PAIRS.items():
        lines += ["", *scores_table(results, kind, arms), "", *differences_table(results, kind, pairs)]
    return "\n".join(lines) + "\n"


# ---- figures --------------------------------------------------------------------------------------------------------

COLOURS = {"dirty": "#c8553d", "random": "#8a8a8a", "curated": "#2f6db0", "dense": "#3a8f5c", "mixed": "#8a5fb0"}
CAPTION_LABELS = {"curated": "brief captions (curated)", "dense": "dense captions", "mixed": "mixed, half and half"}
SHOWN = 12  # prompts of the figure of pictures
SHEET_COLUMNS, SHEET_SIDE = 8, 64  # of the sheets that a training writes


def plot(axes: Any, results: Results, labels: Mapping[str, str], kind: str) -> None:
    """Overall score against steps: each seed thin, their mean thick."""
    for arm, label in labels.items():
        curves = [
            [(point["step"], point[kind]["overall"]) for point in run["curve"]]
            for run in results.get(arm, [])
            if kind in run["curve"][-1]
        ]
        if not curves:
            continue
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=COLOURS[arm], linewidth=1.0, alpha=0.4)
        steps = [step for step, _ in curves[0]]
        mean = np.mean([[value for _, value in curve] for curve in curves], axis=0)
        axes.plot(steps, mean, color=COLOURS[arm], linewidth=3.2, marker="o", markersize=5, label=label)
        axes.set_xticks(steps)
    axes.set(xlabel="training step", ylabel="score: share of pictures that are right", ylim=(-0.02, 0.9))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", title="mean of seeds (thin: each seed)", alignment="left")


def curves_figure(path: Path, results: Results, panels: Mapping[str, Mapping[str, str]]) -> None:
    """A panel for each kind of prompt, with the arms and their labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 12}):
        figure, all_axes = plt.subplots(1, len(panels), figsize=(1.2 + 5.6 * len(panels), 4.8), squeeze=False)
        for axes, (kind, labels) in zip(all_axes[0], panels.items(), strict=True):
            plot(axes, results, labels, kind)
            axes.set_title(KINDS[kind])
        figure.tight_layout()
        write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=100))
        plt.close(figure)


def pictures_figure(path: Path, results: Results, folder: Path, arms: Sequence[str]) -> None:
    """What the runs of some arms drew for the first prompts of `test`, framed in green where it is right; from the
    sheets beside the results. Not drawn where none of them is there."""
    runs = [run for arm in arms for run in results.get(arm, []) if (folder / f"{arm}-{run['seed']}.png").is_file()]
    if not runs:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, grid = plt.subplots(len(runs), SHOWN, figsize=(SHOWN, 0.5 + len(runs)), squeeze=False)
    for line, (row, run) in enumerate(zip(grid, runs, strict=True)):
        sheet = Image.open(folder / f"{run['arm']}-{run['seed']}.png").convert("RGB")
        for n, (axes, (_, question, value)) in enumerate(zip(row, run["verdicts"]["brief"], strict=False)):
            x, y = n % SHEET_COLUMNS * SHEET_SIDE, n // SHEET_COLUMNS * SHEET_SIDE
            axes.imshow(sheet.crop((x, y, x + SHEET_SIDE, y + SHEET_SIDE)), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#2e9d57" if value else "#d0342c", linewidth=3)
            if line == 0:
                words = question.partition(": ")[2].replace(" 1", "").replace(" + ", " +\n")
                axes.set_title(words, fontsize=9)
        row[0].set_ylabel(f"{run['arm']}\nseed {run['seed']}", fontsize=9)
    figure.tight_layout(pad=0.4, h_pad=0.2, w_pad=0.2)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=80))
    plt.close(figure)


def figures(results: Results, folder: Path) -> None:
    """`curated.png`, `captions.png` and `pictures.png` in the folder's `report`."""
    out = folder / "report"
    curves_figure(out / "curated.png", results, {"brief": {arm: arm for arm in DATA if arm in COLOURS}})
    curves_figure(out / "captions.png", results, dict.fromkeys(KINDS, CAPTION_LABELS))
    pictures_figure(out / "pictures.png", results, folder, ("dirty", "curated"))


def report(folder: Path) -> None:
    """Write `report/` in a folder of results: tables and figures; print the tables."""
    results = read_results(folder)
    text = tables(results)
    write_text(folder / "report" / "tables.md", text)
    print(text)
    figures(results, folder)
