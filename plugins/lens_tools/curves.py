"""What runs have logged, and what was seen of them, as curves over their steps: one panel a value, one colour a run, or
one for the runs of one recipe, whose mean is drawn thick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lens_core.io import atomic_files
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Points = list[tuple[float, float]]  # (step, value), by step
Series = dict[str, Points]  # by the value's name

COLOURS = ("#1f6fb4", "#d95f0e", "#2a9d3a", "#8e44ad", "#b8860b", "#c2185b", "#17838f", "#555555")
FINE = 3  # the picture is drawn so many times larger, and then reduced: smooth lines
WIDE, HIGH = 460, 270  # px, of a panel
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 26  # px around its plot
LARGEST = 1e300  # of a value; sums and differences of a few must stay finite
PACE = {"step", "seconds", "steps_per_second", "samples_per_second", "data_wait", "memory_gb", "score"}


def read(run: Path) -> Series:
    """Every number of a run's log.jsonl and evaluations.jsonl. Raises ConfigError for a folder that has neither."""
    paths = [run / "log.jsonl", run / "evaluations.jsonl"]
    if not any(path.is_file() for path in paths):
        raise ConfigError(f"{run}: holds neither log.jsonl nor evaluations.jsonl; give the folder of a run")
    found: Series = {}
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
                    found.setdefault(name, []).append((float(line["step"]), float(value)))
    return {name: sorted(points) for name, points in found.items()}


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


def draw(runs: Mapping[str, Sequence[Series]], show: Sequence[str] = ()) -> Image:
    """The curves of runs by name, those of a name in one colour. Raises ConfigError where there is nothing to draw."""
    from PIL import Image as pil
    from PIL import ImageDraw

    known = list(dict.fromkeys(name for several in runs.values() for series in several for name in series))
    names = chosen(known, show)
    if not names:
        raise ConfigError(f"no value is called {' or '.join(show) or 'a loss or a score'}; there is {', '.join(known)}")
    columns = min(2, len(names))
    legend = 22 * len(runs) + 8
    size = columns * WIDE, math.ceil(len(names) / columns) * HIGH + legend
    picture = pil.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    pen = _Pen(ImageDraw.Draw(picture))
    for row, name in enumerate(runs):
        pen.line([(12, 22 * row + 16), (40, 22 * row + 16)], COLOURS[row % len(COLOURS)], 2.5)
        pen.text((48, 22 * row + 16), name, "lm", 12)
    shown = {name: [[one[name] for one in several if name in one] for several in runs.values()] for name in names}
    span = ends([step for groups in shown.values() for curves in groups for curve in curves for step, _ in curve])
    for place, name in enumerate(names):
        corner = (place % columns) * WIDE, place // columns * HIGH + legend
        _panel(pen, corner, name, span, shown[name])
    return picture.resize(size, pil.Resampling.LANCZOS)


def table(runs: Mapping[str, Sequence[Series]], show: Sequence[str] = ()) -> str:
    """The same as Markdown, a table a value: by step, the mean of a name's runs and, of several, least and most.

    A step is told where a name has it in all of its runs that know the value.
    """
    found = []
    for name in chosen(dict.fromkeys(name for several in runs.values() for one in several for name in one), show):
        curves = {run: [one[name] for one in several if name in one] for run, several in runs.items()}
        means = {run: dict(mean(mine)) if mine else {} for run, mine in curves.items()}
        lines = [f"| step | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
        for step in sorted({step for known in means.values() for step in known}):
            cells = []
            for run, known in means.items():
                values = [dict(curve)[step] for curve in curves[run]] if step in known else []
                spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{known[step]:.3f}{spread}" if values else "")
            lines.append(f"| {step:.0f} | {' | '.join(cells)} |")
        found.append(f"{name}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(found)


class _Pen:
    """Draws in px of the reduced picture."""

    def __init__(self, pen: object) -> None:
        self.pen: object = pen

    def line(self, points: Points, colour: str, width: float = 1.0) -> None:
        scaled = [(x * FINE, y * FINE) for x, y in points]
        self.pen.line(scaled, colour, round(width * FINE), "curve")  # type: ignore[attr-defined]  # Pillow is lazy

    def dot(self, x: float, y: float, colour: str) -> None:
        self.pen.circle((x * FINE, y * FINE), 2.2 * FINE, colour)  # type: ignore[attr-defined]  # likewise

    def text(self, at: tuple[float, float], text: str, anchor: str, size: int = 11, colour: str = "#222222") -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size * FINE)
        self.pen.text((at[0] * FINE, at[1] * FINE), text, colour, font, anchor)  # type: ignore[attr-defined]  # likewise


def _panel(
    pen: _Pen, corner: tuple[float, float], name: str, span: tuple[float, float], groups: Sequence[Sequence[Points]]
) -> None:
    (left, right), (low, high) = span, ends([v for curves in groups for curve in curves for _, v in curve], 0.05)
    x0, x1 = corner[0] + LEFT, corner[0] + WIDE - RIGHT
    y0, y1 = corner[1] + HIGH - BOTTOM, corner[1] + TOP

    def across(step: float) -> float:
        return x0 + (step - left) / (right - left) * (x1 - x0)

    def up(value: float) -> float:
        return y0 + (value - low) / (high - low) * (y1 - y0)

    pen.text((x0, corner[1] + 12), name, "lm", 12)
    for value in ticks(low, high):
        pen.line([(x0, up(value)), (x1, up(value))], "#e4e4e4")
        pen.text((x0 - 5, up(value)), f"{value:.6g}", "rm", colour="#666666")
    for step in ticks(left, right):
        pen.line([(across(step), y0), (across(step), y0 + 4)], "#999999")
        pen.text((across(step), y0 + 14), f"{step:.7g}", "mm", colour="#666666")
    pen.line([(x0, y1), (x0, y0), (x1, y0)], "#999999")
    for number, curves in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        for curve in curves if len(curves) > 1 else ():
            pen.line([(across(step), up(value)) for step, value in curve], colour, 0.6)
        places = [(across(step), up(value)) for step, value in (mean(curves) if curves else ())]
        if len(places) > 1:
            pen.line(places, colour, 1.6 if len(curves) == 1 else 2.4)
        for x, y in places if len(places) <= 40 else ():  # so few are looks, each worth a mark
            pen.dot(x, y, colour)


def ends(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """The range that an axis shows: the values', and `margin` of it on each side; never empty."""
    low, high = min(values), max(values)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):  # closer, and ticks could not be told apart
        gap = abs(low) / 2 or 0.5
        return low - gap, high + gap
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, `most` at most: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
