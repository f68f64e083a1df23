"""The tab Runs: curves, sample grids and scores of training runs, read again while one trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gradio as gr

from lens_core.io import atomic_files, images
from lens_core.types import LensError
from lens_studio.draw import BUTTONS, PRIVATE, answer
from lens_studio.folders import Shown

MARKS = ("log.jsonl", "evaluations.jsonl")
SECONDS = 3.0  # between two readings of a run that trains
MOST_POINTS = 2000  # of a curve
USUAL = ("loss", "grad_norm", "score")  # what the names of curves that are shown first end with


def curves(folder: Shown, name: str) -> dict[str, list[tuple[float, float]]]:
    """Every number that a run has logged: name -> (step, value), by step; thinned to MOST_POINTS."""
    run = folder.entry(name)
    series: dict[str, list[tuple[float, float]]] = {}
    for mark in MARKS:
        if (path := folder.inside(run / mark)) is None:
            continue
        for line in atomic_files.read_log(path):
            for key, value in line.items():
                if key != "step" and type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e300:
                    series.setdefault(key, []).append((float(line["step"]), float(value)))
    return {key: sorted(points)[:: -(-len(points) // MOST_POINTS)] for key, points in series.items()}


def samples(folder: Shown, name: str) -> list[tuple[Any, str]]:
    """The newest sample grids of a run, the newest first: (PIL picture, caption)."""
    paths = sorted((folder.entry(name) / "samples").glob("step-*.png"), reverse=True)[:4]
    inside = [path for path in paths if folder.inside(path) is not None]
    return [(images.read_rgb(path), path.stem) for path in inside]


def scores(folder: Shown, name: str) -> list[list[Any]]:
    """Rows of step, value's name and value, of the run's evaluations, the newest first."""
    path = folder.inside(folder.entry(name) / "evaluations.jsonl")
    lines = atomic_files.read_log(path) if path is not None else []
    rows = [[line["step"], key, round(value, 4)] for line in reversed(lines) for key, value in line.items()
            if key not in ("step", "seconds") and type(value) in (int, float)]  # fmt: skip
    return rows[:200]


def tab(root: Path) -> None:
    """Build the tab inside a `gr.Tab`."""
    folder = Shown(root, MARKS)
    with gr.Row():
        run = gr.Dropdown(folder.names(), value=None, label="Run", elem_id="run")
        value = gr.Dropdown([], value=None, label="Curve", elem_id="curve")
        live = gr.Checkbox(True, label=f"Read again every {SECONDS:g} s", elem_id="live")
        refresh = gr.Button("Read the folder again", elem_id="refresh-runs")
    plot = gr.LinePlot(x="step", y="value", label="Curve", height=300, elem_id="plot")
    last = gr.Textbox(label="Last", interactive=False, elem_id="last", max_lines=1)
    with gr.Row():
        grids = gr.Gallery(
            label="Samples", format="png", columns=2, buttons=BUTTONS, elem_id="samples", interactive=False
        )
        table = gr.Dataframe(headers=["step", "value", ""], label="Evaluations", elem_id="scores", interactive=False)
    timer = gr.Timer(SECONDS)

    def choose(name: str | None) -> list[Any]:
        try:
            known = curves(folder, name) if name else {}
        except LensError as error:
            raise answer(error) from error
        usual = [key for key in known if key.endswith(USUAL)]
        chosen = next(iter(usual or known), None)
        return [gr.update(choices=list(known), value=chosen), *read(name, chosen)]

    def read(name: str | None, key: str | None) -> list[Any]:
        import pandas

        if not name:
            return [None, "", None, None]
        try:
            points = curves(folder, name).get(key or "", [])
            frame = pandas.DataFrame(points, columns=["step", "value"])
            text = f"step {points[-1][0]:.0f}: {key} {points[-1][1]:.4g}" if points else ""
            return [frame, text, samples(folder, name), scores(folder, name)]
        except LensError as error:
            raise answer(error) from error

    def tick(name: str | None, key: str | None, on: bool) -> list[Any]:
        return read(name, key) if on and name else [gr.skip()] * 4

    shown = [plot, last, grids, table]
    run.change(choose, run, [value, *shown], **PRIVATE)
    value.input(read, [run, value], shown, **PRIVATE)
    timer.tick(tick, [run, value, live], shown, **PRIVATE)
    refresh.click(lambda: gr.update(choices=folder.names()), None, run, **PRIVATE)
