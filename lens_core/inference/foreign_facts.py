"""What pictures of ComfyUI and of A1111's web UI say of how they were drawn, as far as Lens can draw from it.

A1111 writes the text chunk `parameters`; ComfyUI writes the JSON chunks `prompt` and `workflow`. What was taken and
what was not are both listed, since another model cannot draw the same picture. Chunks are bounded and refused in one
line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from lens_core.inference import comfy_graph
from lens_core.inference.call_arguments import MAX_COUNT, MAX_SEED, MAX_SIDE
from lens_core.inference.png_metadata import LARGEST
from lens_core.inference.requests import GenerateRequest
from lens_core.io import images
from lens_core.io.readers import one_line, parse_json, shown
from lens_core.types import ConfigError

SAMPLERS = {
    "euler": "euler", "euler a": "euler_ancestral", "euler_ancestral": "euler_ancestral", "heun": "heun",
    "dpm++ 2m": "dpmpp", "dpmpp_2m": "dpmpp",
}  # fmt: skip
"""A sampler's name there, in lower case -> the name of the sampler here that does the same steps."""
SCHEDULES = re.compile(r" (karras|exponential|polyexponential|sgm uniform|uniform|simple|normal|beta)$")
A1111_NAMES = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size"}
PARAMETER = re.compile(r'\s*([\w ]{1,64}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")


@frozen
class ForeignFacts:
    """`taken` are facts by Lens's names, sound ones alone; `left` are lines for what could not be taken, and why."""

    tool: str
    taken: dict[str, Any]
    left: tuple[str, ...]

    def without(self, names: Collection[str]) -> ForeignFacts:
        """The same without the facts of these `names`, which options replace."""
        replaced = [
            f"{name} {shown(value, 60)}: another is given" for name, value in self.taken.items() if name in names
        ]
        rest = {name: value for name, value in self.taken.items() if name not in names}
        return ForeignFacts(self.tool, rest, (*replaced, *self.left))

    def complete(self, request: GenerateRequest) -> GenerateRequest:
        """`request` with what they ask for beside prompt, seed and sampler."""
        names = ("negative_prompt", "height", "width", "steps", "guidance_scale")
        return evolve(request, **{name: self.taken[name] for name in names if name in self.taken})


def read(path: Path) -> ForeignFacts | None:
    """The facts of a PNG that ComfyUI or A1111 wrote; None for a picture without any, or with Lens's own.

    Raises ConfigError, in one line, for a chunk that is too large or cannot be read, and where no prompt is named."""
    info = images.read_raw(path).info
    chunks = {name: info[name] for name in ("parameters", "prompt", "workflow") if isinstance(info.get(name), str)}
    if isinstance(info.get("lens"), str) or not chunks:
        return None
    for name, text in chunks.items():
        if len(text) > LARGEST:
            raise ConfigError(f"{path}: its {name} has {len(text)} characters; at most {LARGEST} are read")
    tool = "A1111" if "parameters" in chunks else "ComfyUI"
    try:
        raw, left = _a1111(chunks["parameters"]) if tool == "A1111" else _comfy(chunks)
    except ValueError as error:
        raise ConfigError(f"{path}: what {tool} wrote into it cannot be read ({one_line(error)})") from error
    taken, refused = _sound(raw)
    if "prompt" not in taken:
        raise ConfigError(f"{path}: what {tool} wrote into it names no prompt; give the prompt itself")
    return ForeignFacts(tool, taken, (*refused, *left))


def _comfy(chunks: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    # ComfyUI writes NaN where a node always runs again.
    def parsed(name: str) -> Any:
        return parse_json(chunks[name], finite=False, allow_duplicate_keys=True)

    if "prompt" in chunks:
        return comfy_graph.facts(comfy_graph.read_prompt(parsed("prompt")))
    return comfy_graph.facts(comfy_graph.read_workflow(parsed("workflow")))


def _a1111(text: str) -> tuple[dict[str, Any], list[str]]:
    """The prompt, then "Negative prompt: …", then a line of "Steps: 20, Sampler: Euler a, …"."""
    lines = text.strip().split("\n")
    settings = lines.pop() if len(PARAMETER.findall(lines[-1][: LARGEST // 4])) >= 3 else ""
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    raw: dict[str, Any] = {"prompt": "\n".join(lines[:at]).strip()}
    if at < len(lines):
        raw["negative_prompt"] = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    left = []
    for name, value in PARAMETER.findall(settings):
        name, value = name.strip(), value.strip()
        if name not in A1111_NAMES:
            left.append(f"{name}: {one_line(value, 80)}")
        elif name == "Size" and re.fullmatch(r"\d{1,5}x\d{1,5}", value):
            raw["width"], raw["height"] = map(int, value.split("x"))
        else:
            raw[A1111_NAMES[name]] = _number(value)
    return raw, left


def _number(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str) if len(text) <= 40 and text[:1] in "-0123456789" and text else text
    except ValueError:
        return text


def _sound(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What Lens can draw with, and a line for each other value."""
    taken: dict[str, Any] = {}
    left: list[str] = []
    limits = {"seed": (0, MAX_SEED), "steps": (1, MAX_COUNT), "height": (1, MAX_SIDE), "width": (1, MAX_SIDE)}
    for name, value in raw.items():
        if name in ("prompt", "negative_prompt") and isinstance(value, str):
            left += [f"{tag}: give the file with --lora" for tag in dict.fromkeys(LORA.findall(value))]
            text = LORA.sub("", value).strip(" ,\n")
            if text or name == "negative_prompt":
                taken[name] = text
        elif name == "sampler" and isinstance(value, str):
            plain = SCHEDULES.sub("", value.lower())
            if plain in SAMPLERS:
                taken[name] = SAMPLERS[plain]
            if plain not in SAMPLERS or plain != value.lower():
                what = "its schedule is the model's here" if plain in SAMPLERS else "Lens has no such sampler"
                left.append(f"sampler {shown(value, 60)}: {what}")
        elif name in limits and type(value) is int and limits[name][0] <= value <= limits[name][1]:
            taken[name] = value
        elif name == "guidance_scale" and type(value) in (int, float) and abs(value) <= 2**16:
            taken[name] = float(value)
        else:
            left.append(f"{name} {shown(value, 60)}: is out of the range that Lens draws with")
    if ("height" in taken) != ("width" in taken):
        left += [f"{side} {taken.pop(side)}: without the other side" for side in ("height", "width") if side in taken]
    return taken, left
