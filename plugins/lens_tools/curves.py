"""Curves of what runs have logged and how their evaluations went, over steps.

One panel a value, one colour a run, or one for the runs of one recipe, whose mean is drawn thick. matplotlib draws
(the extra `plots`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lens_core.io import atomic_files, markdown
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Points = list[tuple[float, float]]  # (step, value), by step
Series = dict[str, Points]  # by the value's name

COLOURS = ("#1f6fb4", "#d95f0e", "#2a9d3a", "#8e44ad", "#b8860b", "#c2185b", "#17838f", "#555555")
PANEL = (4.6, 2.7)  # inches, width and height
LEGEND_LINE = 0.25  # inches
DPI = 100
FONT = 8  # points
MARKED = 40  # a curve of at most so many points has a mark at each
LARGEST = 1e300  # of a value; sums and differences of a few must stay finite
PACE = {"step", "seconds", "steps_per_second", "samples_per_second", "data_wait", "memory_gb", "score"}


def read(run: Path) -> Series:
    """Every number of a run's log.jsonl and evaluations.jsonl. Raises ConfigError for a folder that has neither."""
    paths = [run / "log.jsonl", run / "evaluations.jsonl"]
    if not any(path.is_file() for path in paths):
        raise ConfigError(f"{run}: holds neither log.jsonl nor evaluations.jsonl; give the folder of a run")
    series: Series = {}
    for path in paths:
        for line in atomic_files.read_log(path):
            for name, value in line.items():
                if type(value) in (int, float) and math.isfinite(value) and name != "step":
                    if max(abs(value), abs(float(line["step"]))) > LARGEST:
                        raise ConfigError(
                            f"{path}: {name} is {value:g} at step {float(line['step']):g}, which no axis can show; "
                            "take the line out"
                        )
                    name = f"evaluation/{name}" if name == "seconds" and path is paths[1] else name
                    series.setdefault(name, []).append((float(line["step"]), float(value)))
    return {name: sorted(points) for name, points in series.items()}


def read_groups(runs: Sequence[str]) -> dict[str, list[Series]]:
    """Run folders -> their series by a name for the legend; folders joined by commas share one name.

    Raises ConfigError as `read`. Names are the folders' own where all differ, else their paths.
    """
    groups = [[Path(run)] if Path(run).is_dir() else [Path(part) for part in run.split(",")] for run in runs]
    names = [run.resolve().name for group in groups for run in group]
    unique = len(set(names)) == len(names)
    return {
        ", ".join(run.resolve().name if unique else str(run) for run in group): [read(run) for run in group]
        for group in groups
    }


def chosen(names: Iterable[str], show: Sequence[str]) -> list[str]:
    """The names that fit one of the patterns; without any, losses, gradients' norms and overall scores."""
    if show:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in show)]
    return [n for n in names if n.endswith(("/loss", "/grad_norm")) or ("/" not in n and n not in PACE)]


def mean(curves: Sequence[Points]) -> Points:
    """The mean of curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in shared]


def table(runs: Mapping[str, Sequence[Series]], show: Sequence[str] = ()) -> str:
    """The same as Markdown, a table a value: by step, the mean of a name's runs and, of several, least and most.

    A step has a row where a name has it in all of its runs that logged the value.
    """
    tables = []
    for name in chosen(dict.fromkeys(name for several in runs.values() for one in several for name in one), show):
        curves = {run: [one[name] for one in several if name in one] for run, several in runs.items()}
        means = {run: dict(mean(mine)) if mine else {} for run, mine in curves.items()}
        lines = markdown.header(["step", *runs])
        for step in sorted({step for known in means.values() for step in known}):
            cells = []
            for run, known in means.items():
                values = [dict(curve)[step] for curve in curves[run]] if step in known else []
                spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{known[step]:.3f}{spread}" if values else "")
            lines.append(markdown.row([f"{step:.0f}", *cells]))
        tables.append(f"{name}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(tables)


def draw(runs: Mapping[str, Sequence[Series]], show: Sequence[str] = ()) -> Figure:
    """A figure with one panel a value, over steps: one colour a name, its runs thin and their mean thick.

    Raises ConfigError where there is nothing to draw, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ConfigError("lens curves needs matplotlib, which is missing: pip install 'lens-t2i[plots]'") from error
    known = list(dict.fromkeys(name for several in runs.values() for series in several for name in series))
    names = chosen(known, show)
    if not names:
        raise ConfigError(f"no value is called {' or '.join(show) or 'a loss or a score'}; there is {', '.join(known)}")
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    legend = LEGEND_LINE * len(runs)
    height = rows * PANEL[1] + legend
    # The legend has a strip of its own above the panels.
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - legend / height))
    figure = Figure(figsize=(columns * PANEL[0], height), dpi=DPI, layout=layout)
    shown = {name: [[one[name] for one in several if name in one] for several in runs.values()] for name in names}
    steps = axis_limits([step for groups in shown.values() for runs in groups for curve in runs for step, _ in curve])
    for place, name in enumerate(names, 1):
        _panel(figure.add_subplot(rows, columns, place), name, steps, shown[name])
    handles = [_line_handle(number) for number in range(len(runs))]
    figure.legend(handles, list(runs), loc="upper left", frameon=False, fontsize=FONT + 1)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    atomic_files.write_atomic(path, lambda partial: figure.savefig(partial, format="png"))


def _line_handle(number: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=2.5)


def _panel(axes: Axes, name: str, steps: tuple[float, float], groups: Sequence[Sequence[Points]]) -> None:
    axes.set_title(name, loc="left", fontsize=FONT + 1)
    axes.set_xlim(*steps)
    axes.set_ylim(*axis_limits([v for curves in groups for curve in curves for _, v in curve], 0.05))
    axes.grid(axis="y", color="#e4e4e4")
    axes.tick_params(labelsize=FONT, colors="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    for number, curves in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6)
        points = mean(curves) if curves else []
        if points:
            marker = "o" if len(points) <= MARKED else ""  # so few are evaluations, each worth a mark
            width = 1.6 if len(curves) == 1 else 2.4
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker=marker, markersize=4)


def axis_limits(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """The range that an axis shows: the values', and `margin` of it on each side; never empty."""
    low, high = min(values), max(values)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):  # closer, and ticks would coincide
        gap = abs(low) / 2 or 0.5
        return low - gap, high + gap
    return low - margin * (high - low), high + margin * (high - low)
