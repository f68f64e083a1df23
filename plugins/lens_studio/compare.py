"""The tab Compare: one prompt and seed over several checkpoints, samplers or step counts, as a grid."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from attrs import evolve

from lens_core.io.readers import one_line, shown
from lens_core.types import ConfigError, LensError
from lens_studio.draw import BUTTONS, PRIVATE, WINDOWS, answer, sizes
from lens_studio.forms import PRESET, Form

AXES = ("steps", "samplers", "checkpoints")
MOST = 16  # cells of a grid


class Comparer:
    """Draws the cells of a grid: by the engine, or with another checkpoint that is loaded for it and let go again."""

    def __init__(self, drawing: Any, models: Sequence[str]) -> None:
        self.drawing, self.models = drawing, tuple(models)
        self._loading = threading.Lock()  # one further checkpoint in memory at a time

    def values(self, axis: str, steps: str, samplers: Sequence[str], models: Sequence[str]) -> list[Any]:
        """The values of the axis, checked. Raises ConfigError."""
        if axis == "steps":
            words = steps.replace(",", " ").split()
            if not words or not all(word.isdecimal() and len(word) <= 5 and int(word) for word in words):
                raise ConfigError(f"step counts {shown(steps, 60)} must be whole numbers, such as 4, 8, 20")
            chosen: list[Any] = [int(word) for word in words]
        elif axis == "samplers":
            chosen = list(samplers or ())
        elif axis == "checkpoints":
            chosen = list(models or ())
            unknown = [model for model in chosen if model not in (self.drawing.name, *self.models)]
            if unknown:
                raise ConfigError(f"{shown(unknown[0], 60)} is no checkpoint that this page may load; see --compare")
        else:
            raise ConfigError(f"{shown(axis, 40)} is none of {', '.join(AXES)}")
        if not 1 <= len(chosen) <= MOST:
            raise ConfigError(f"choose 1 to {MOST} {axis} to compare, not {len(chosen)}")
        return chosen

    def cells(self, form: Form, axis: str, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """(caption, PIL picture) of each value. Raises LensError. All cells share the first one's seed; of checkpoints
        the served one comes first, and where its reasoner rewrites the prompt, all of them draw what it wrote."""
        seed, prompt = form.seed, form.prompt
        if axis == "checkpoints":
            values = sorted(values, key=lambda model: bool(model != self.drawing.name))
        for value in values:
            if axis == "steps":
                changed = evolve(form, steps=value, seed=seed)
            elif axis == "samplers":
                changed = evolve(form, sampler=value, seed=seed)
            else:
                changed = evolve(form, seed=seed, prompt=prompt)
            drawn, facts = self._cell(changed, value if axis == "checkpoints" else self.drawing.name)
            seed, prompt = str(facts["seed"]), facts["prompt"]
            yield f"{value} step{'s' * (value != 1)}" if axis == "steps" else str(value), drawn

    def _cell(self, form: Form, model: str) -> tuple[Any, dict[str, Any]]:
        fields = form.fields(self.drawing.grid)
        if model == self.drawing.name:
            (drawn,) = self.drawing.start(**fields).result()
        else:
            with self._loading:
                drawn = self.drawing.draw_with(model, **fields)
        return drawn.image, dict(drawn.facts)


def grid(cells: Sequence[tuple[str, Any]]) -> Any:
    """The cells side by side, of one height, each below its caption, as one picture."""
    from PIL import Image as pil
    from PIL import ImageDraw

    bar, height = 22, max(256, *(picture.height for _, picture in cells))
    sizes_px = [(max(1, round(one.width * height / one.height)), height) for _, one in cells]
    whole = pil.new("RGB", (sum(width + 4 for width, _ in sizes_px) - 4, height + bar), "white")
    pen, left = ImageDraw.Draw(whole), 0
    for (label, picture), size in zip(cells, sizes_px, strict=True):
        whole.paste(picture.resize(size), (left, bar))
        pen.text((left + 4, 5), label[:40], fill="black", font_size=12)
        left += size[0] + 4
    return whole


def tab(drawing: Any, comparer: Comparer) -> None:
    """Build the tab inside a `gr.Tab`."""
    with gr.Row():
        with gr.Column(scale=1):
            prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
            with gr.Row():
                seed = gr.Textbox("0", label="Seed", min_width=80, elem_id="compare-seed", max_lines=1)
                size = gr.Dropdown(sizes(drawing), value=PRESET, label="Size or ratio", allow_custom_value=True)
            axis = gr.Radio(list(AXES), value="steps", label="Compare", elem_id="compare-axis")
            steps = gr.Textbox("2, 4, 8", label="Step counts", elem_id="compare-steps", max_lines=1)
            samplers = gr.CheckboxGroup(drawing.samplers, label="Samplers", visible=False)
            models = gr.CheckboxGroup([drawing.name, *comparer.models], label="Checkpoints", visible=False)
            start = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Column(scale=3):
            status = gr.Textbox("", label="Status", interactive=False, elem_id="compare-status", max_lines=1)
            picture = gr.Image(label="Grid", format="png", interactive=False, buttons=BUTTONS, elem_id="compare-grid")

    def show(chosen: str) -> list[Any]:
        return [gr.update(visible=chosen == name) for name in AXES]

    def run(text: str, seed: str, size: str, axis: str, *chosen: Any) -> Iterator[Any]:
        cells: list[tuple[str, Any]] = []
        try:
            values = comparer.values(axis, *chosen)
            yield f"0 of {len(values)}", None
            for cell in comparer.cells(Form(prompt=text, seed=seed, size=size), axis, values):
                cells.append(cell)
                yield f"{len(cells)} of {len(values)}", grid(cells)
        except LensError as error:
            yield one_line(error), gr.skip()
            raise answer(error) from error

    axis.change(show, axis, [steps, samplers, models], **PRIVATE)
    inputs = [prompt, seed, size, axis, steps, samplers, models]
    start.click(run, inputs, [status, picture], concurrency_limit=WINDOWS, **PRIVATE)
