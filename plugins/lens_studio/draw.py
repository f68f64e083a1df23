"""The tab Draw: a form, a live preview, a gallery with each picture's facts, and the same again from a picture."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from lens_core.inference import png_metadata
from lens_core.io.readers import one_line
from lens_core.types import LensError
from lens_studio.forms import PRESET, Form, read_again

RATIOS = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")
WINDOWS = 64  # requests of the page that are followed at once; the engine draws them one after the other
PREVIEW_PX = 384  # side of the live preview, to which the small pictures of the map are enlarged
BUTTONS: list[Any] = ["download", "fullscreen"]  # of a picture; gradio's third shares it with another site
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: programs have the HTTP API, which is validated and documented."""


class Drawer:
    """Follows the jobs of the page's windows, one a window, by the session that gradio gives each."""

    def __init__(self, drawing: Any, scratch: Path) -> None:
        self.drawing, self.scratch = drawing, scratch
        self._jobs: dict[str, Any] = {}
        self._lock = threading.Lock()

    def draw(self, form: Form, session: str) -> Iterator[dict[str, Any]]:
        """Updates as {"status", "preview", "pictures"}, each where it changes. Raises LensError, in one line."""
        fields = form.fields(self.drawing.grid)
        self.stop(session)  # a window draws one request at a time
        job = self.drawing.start(previews=self.drawing.max_previews, **fields)
        with self._lock:
            self._jobs[session] = job
        try:
            for event in job.events():
                yield from self._updates(job, event)
        finally:
            job.cancel()  # a window that was closed; a finished job stays as it is
            with self._lock:
                if self._jobs.get(session) is job:
                    del self._jobs[session]

    def stop(self, session: str) -> bool:
        """Cancel what a window draws; whether it drew anything."""
        with self._lock:
            job = self._jobs.pop(session, None)
        if job is not None:
            job.cancel()
        return job is not None

    def _updates(self, job: Any, event: Any) -> Iterator[dict[str, Any]]:
        kind = type(event).__name__  # the names of the engine's events are its interface; see `lens_pages`
        if kind == "Queued":
            yield {"status": f"waits for {event.ahead} requests" if event.ahead else "begins"}
        elif kind == "Step":
            preview = {"preview": beside(event.images)} if event.images else {}
            yield {"status": f"step {event.step} of {event.steps}", **preview}
        elif kind == "Done":
            drawn = [self._keep(job.id, index, one) for index, one in enumerate(event.images)]
            yield {"status": f"{len(drawn)} drawn" if len(drawn) > 1 else "drawn", "pictures": drawn}
        elif kind == "Cancelled":
            yield {"status": "stopped"}
        elif kind == "Failed":
            raise LensError(event.message)

    def _keep(self, job: str, index: int, drawn: Any) -> dict[str, Any]:
        """A finished picture as a PNG with its facts, in the outputs folder and where the page serves it from."""
        facts = dict(drawn.facts)
        self.drawing.keep(drawn.image, job, index, facts)
        path = self.scratch / f"{job[:12]}-{index}.png"
        png_metadata.save(drawn.image, path, facts)
        return {"path": str(path), "facts": facts}


def beside(pictures: Any) -> Any:
    """Pictures in a row, enlarged to the height of the live preview."""
    from PIL import Image as pil

    height = max(PREVIEW_PX, pictures[0].height)
    sizes = [(max(1, round(one.width * height / one.height)), height) for one in pictures]
    row = pil.new("RGB", (sum(width for width, _ in sizes), height))
    left = 0
    for one, size in zip(pictures, sizes, strict=True):
        row.paste(one.resize(size), (left, 0))
        left += size[0]
    return row


def caption(facts: Mapping[str, Any]) -> str:
    return f"seed {facts.get('seed')}"


def answer(error: LensError) -> gr.Error:
    """An error as one clear line in a window."""
    return gr.Error(one_line(error), duration=10, title="Not drawn", print_exception=False)


def sizes(drawing: Any) -> list[str]:
    """What the size's list offers: the model's own, its buckets, and usual ratios."""
    buckets = drawing.presets.get("sizes", {})
    known = dict.fromkeys(ratio for ratios in buckets.values() for ratio in ratios)
    return [PRESET, *(known or RATIOS)]


def tab(drawing: Any, drawer: Drawer) -> None:
    """Build the tab inside a `gr.Tab`."""
    presets = drawing.presets
    shown = gr.State([])
    with gr.Row():
        with gr.Column(scale=2):
            fields = _form(drawing, presets)
            with gr.Row():
                start = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            dropped = gr.File(label="The same again: drop a PNG", file_types=[".png"], elem_id="again", height=130)
            notes = gr.Markdown(elem_id="notes")
        with gr.Column(scale=3):
            status = gr.Textbox("", label="Status", interactive=False, elem_id="status", max_lines=1)
            preview = gr.Image(label="Now", format="png", interactive=False, elem_id="preview", height=260, buttons=[])
            gallery = gr.Gallery(label="Pictures", format="png", columns=4, height=300, object_fit="contain",
                                 elem_id="gallery", interactive=False, buttons=BUTTONS)  # fmt: skip
            with gr.Row():
                requested = gr.Textbox(label="Prompt as requested", interactive=False, lines=2, visible=False)
                rewritten = gr.Textbox(label="Prompt as the reasoner wrote it", interactive=False, lines=2,
                                       visible=False, elem_id="rewritten")  # fmt: skip
            facts = gr.JSON(label="Facts of the picture", elem_id="facts", height=260)
    outputs = [status, preview, gallery, shown, facts, requested, rewritten]
    names = list(fields)

    def run(request: gr.Request, *values: Any) -> Iterator[Any]:
        before = values[-1]
        try:
            for update in drawer.draw(Form(**dict(zip(names, values[:-1], strict=True))), str(request.session_hash)):
                yield _outputs(update, before, outputs)
        except LensError as error:
            yield {status: one_line(error)}
            raise answer(error) from error

    def halt(request: gr.Request) -> None:
        drawer.stop(str(request.session_hash))

    def choose(pictures: list[dict[str, Any]], event: gr.SelectData) -> list[Any]:
        return _facts(pictures[event.index]["facts"])

    def again(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * (len(AGAIN) + 1)
        try:
            facts_again = read_again(
                Path(path), drawing.model_hash, drawing.loras,
                sampler_facts=drawing.sampler_facts, lossy_vae_tile=drawing.lossy_vae_tile,
                dtype=drawing.dtype, lora_hash=drawing.lora_hash,
            )  # fmt: skip
        except LensError as error:
            raise answer(error) from error
        return [*(facts_again.values[name] for name in AGAIN), "\n".join(f"- {line}" for line in facts_again.notes)]

    inputs = [*fields.values(), shown]
    gr.on([start.click, fields["prompt"].submit], run, inputs, outputs, concurrency_limit=WINDOWS, **PRIVATE)
    stop.click(halt, None, None, concurrency_limit=WINDOWS, queue=False, **PRIVATE)
    gallery.select(choose, shown, [facts, requested, rewritten], **PRIVATE)
    dropped.upload(again, dropped, [*(fields[name] for name in AGAIN), notes], **PRIVATE)


AGAIN = ("prompt", "negative_prompt", "size", "steps", "guidance_scale", "sampler", "seed", "loras", "strength")
"""The fields that a dropped picture fills."""


def _form(drawing: Any, presets: Mapping[str, Any]) -> dict[str, Any]:
    """The form's components by the names of `Form`."""
    fields: dict[str, Any] = {
        "prompt": gr.Textbox(label="Prompt", lines=3, elem_id="prompt", max_lines=12),
        "negative_prompt": gr.Textbox(label="Negative prompt", lines=1, elem_id="negative"),
    }
    with gr.Row():
        fields["size"] = gr.Dropdown(sizes(drawing), value=PRESET, label="Size or ratio",
                                     allow_custom_value=True, elem_id="size")  # fmt: skip
        fields["sampler"] = gr.Dropdown([PRESET, *drawing.samplers], value=PRESET, label="Sampler", elem_id="sampler")
    # Texts, for gradio shows an empty number as 0, and a browser's numbers are exact up to 2^53 alone.
    with gr.Row():
        fields["steps"] = _text("Steps", f"{presets['steps']}", "steps")
        fields["guidance_scale"] = _text("Guidance", f"{presets['guidance_scale']:g}", "guidance")
        fields["seed"] = _text("Seed", "random", "seed")
        fields["num_images"] = _text("Number", "1", "number")
    offered = [[name, 0.0] for name in drawing.loras]
    with gr.Accordion("LoRAs", open=False, visible=bool(offered)):
        fields["loras"] = gr.Dataframe(offered, headers=["LoRA", "weight (0: off)"], datatype=["str", "number"],
                                       type="array", interactive=True, elem_id="loras")  # fmt: skip
    with gr.Accordion("Init image and mask", open=False, elem_id="init"):
        gr.Markdown("Upload a picture to start from. Paint over what is to be drawn anew; the rest stays.")
        fields["edit"] = gr.ImageEditor(
            type="pil", label="Init image", format="png", sources=["upload", "clipboard"], transforms=(),
            layers=gr.LayerOptions(allow_additional_layers=False),
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24), buttons=BUTTONS, height=420,
            elem_id="editor",
        )  # fmt: skip
        fields["strength"] = _text("Strength", "0.6; 1 with a mask", "strength")
    return fields


def _text(label: str, placeholder: str, name: str) -> Any:
    """A field for a number, with what is taken where it is empty."""
    return gr.Textbox(label=label, placeholder=placeholder, elem_id=name, min_width=70, max_lines=1)


def _outputs(update: dict[str, Any], before: list[dict[str, Any]], outputs: list[Any]) -> dict[Any, Any]:
    """An update as values of the tab's components: status, preview, gallery, pictures, facts, and the two prompts."""
    status, preview, gallery, shown, facts, requested, rewritten = outputs
    values: dict[Any, Any] = {status: update["status"]}
    if "preview" in update:
        values[preview] = update["preview"]
    if "pictures" in update:
        pictures = [*update["pictures"], *before][:200]
        values[shown] = pictures
        values[gallery] = [(one["path"], caption(one["facts"])) for one in pictures]
        values[preview] = None
        values |= dict(zip((facts, requested, rewritten), _facts(pictures[0]["facts"]), strict=True))
    return values


def _facts(facts: dict[str, Any]) -> list[Any]:
    """The facts of a picture, and its two prompts where a reasoner wrote the one that was drawn."""
    two = "requested_prompt" in facts
    plain = json.loads(json.dumps(facts, default=str))
    return [
        plain,
        gr.update(value=facts.get("requested_prompt", ""), visible=two),
        gr.update(value=facts.get("prompt", ""), visible=two),
    ]
