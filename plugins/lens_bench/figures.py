"""Figures from results alone: `lens figure speed-quality`, score against seconds a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from attrs import frozen
from cyclopts import App

from lens_core.types import ConfigError

ENDINGS = (".png", ".svg", ".pdf")


@frozen
class Point:
    """One result: its label, seconds a picture, and the score with its interval of 95 % (None where unknown)."""

    label: str
    seconds: float
    score: float
    low: float | None
    high: float | None


def points(folders: Sequence[Path]) -> tuple[list[Point], str]:
    """(a point for each result, the name of their benchmark and metric). Raises ConfigError for results of two
    benchmarks or of other prompts, or one without a score or without seconds."""
    from lens_core.evaluation.comparison import check_comparable, read

    results = [(folder, read(folder / "result.json")) for folder in folders]
    if not results:
        raise ConfigError("give the folders that lens bench wrote")
    check_comparable([result for _, result in results])
    first = results[0][1]
    several = len({result.get("device") for _, result in results}) > 1
    result_points = []
    for folder, result in results:
        overall, seconds = result.get("overall"), result.get("seconds_per_picture")
        if not isinstance(overall, dict) or not _positive(seconds) or not isinstance(overall.get("value"), int | float):
            raise ConfigError(f"{folder}: has no score or no seconds a picture; run lens bench again with this version")
        result_points.append(
            Point(_label(result, several), float(seconds), overall["value"], overall["low"], overall["high"])
        )
    name = str(first["benchmark"])
    short = name if len(name) < 40 else f"{name[:39]}…"
    return result_points, f"{short}, {first.get('metric', 'overall')}"


def _positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _label(result: Mapping[str, Any], several: bool) -> str:
    from lens_core.evaluation.comparison import steps_label

    refined = ", refined prompts" if result.get("prompts") == "refined" else ""
    where = f" ({result.get('device')})" if several else ""
    return f"{result['model']}{steps_label(result)}{refined}{where}"


def draw(result_points: Sequence[Point], title: str, output: Path) -> None:
    """Write the figure. Points of one model and its steps are joined. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'lens-t2i[plots]'") from error
    from lens_core.io import atomic_files

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    families: dict[str, list[Point]] = {}
    for point in result_points:
        families.setdefault(point.label.partition(",")[0], []).append(point)
    for name, family in families.items():
        family = sorted(family, key=lambda p: p.seconds)
        bars = [[p.score - (p.score if p.low is None else p.low) for p in family]]
        bars.append([(p.score if p.high is None else p.high) - p.score for p in family])
        axes.errorbar(
            [p.seconds for p in family], [p.score for p in family], yerr=[[max(0.0, b) for b in row] for row in bars],
            marker="o", capsize=3, linewidth=1, label=name,
        )  # fmt: skip
        for point in family:
            place = (point.seconds, point.score)
            axes.annotate(point.label, place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("seconds a picture (log scale)")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    fastest, slowest = min(p.seconds for p in result_points), max(p.seconds for p in result_points)
    room = max(1.5, (slowest / fastest) ** 0.25)  # a logarithmic axis of one point has no width of its own
    axes.set_xlim(fastest / room, slowest * room)
    axes.margins(y=0.15)
    axes.grid(True, which="both", alpha=0.25)
    kind = output.suffix.removeprefix(".")
    atomic_files.write_atomic(output, lambda p: figure.savefig(p, format=kind, dpi=150))


def speed_quality(*results: Path, output: Path = Path("speed-quality.png")) -> int:
    """Draw score against seconds a picture, with intervals, a point for each result of one benchmark.

    Parameters
    ----------
    results
        Folders that `lens bench` wrote.
    output
        The figure: .png, .svg or .pdf.
    """
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{output}: figures are written as .png, .svg or .pdf; name one of these")
    result_points, title = points(results)
    draw(result_points, title, output)
    print(f"{output}: {len(result_points)} results")
    return 0


app = App(name="figure", help="Figures from the results of lens bench.")
app.command(speed_quality, name="speed-quality")
