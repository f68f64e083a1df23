"""The tab Results: tables and sheets of `lens bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from lens_core.io import images
from lens_core.types import LensError
from lens_studio.draw import BUTTONS, PRIVATE, answer
from lens_studio.folders import Shown

MARKS = ("result.json", "table.md")


def read(folder: Shown, name: str) -> tuple[str, Any]:
    """The table of a result as Markdown, and its sheet as a PIL picture or None. Raises LensError."""
    place = folder.entry(name)
    sheet = folder.inside(place / "sheet.png")
    return folder.text(place / "table.md"), images.read_rgb(sheet) if sheet is not None else None


def tab(root: Path) -> None:
    """Build the tab inside a `gr.Tab`."""
    folder = Shown(root, MARKS)
    with gr.Row():
        result = gr.Dropdown(folder.names(), value=None, label="Result", elem_id="result")
        refresh = gr.Button("Read the folder again")
    with gr.Row():
        table = gr.Markdown(elem_id="table")
        sheet = gr.Image(label="Sheet", format="png", interactive=False, buttons=BUTTONS, elem_id="sheet")

    def choose(name: str | None) -> tuple[str, Any]:
        try:
            return read(folder, name) if name else ("", None)
        except LensError as error:
            raise answer(error) from error

    result.change(choose, result, [table, sheet], **PRIVATE)
    refresh.click(lambda: gr.update(choices=folder.names()), None, result, **PRIVATE)
