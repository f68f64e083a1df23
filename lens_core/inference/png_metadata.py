"""Pictures that Lens drew, as PNG files: written with the facts that drew them, and read back with suspicion."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lens_core import __version__
from lens_core.io import images
from lens_core.io.atomic_files import write_atomic
from lens_core.io.readers import parse_json
from lens_core.types import ConfigError, Refinement

if TYPE_CHECKING:
    from PIL.Image import Image


LARGEST = 1 << 20
"""Bytes of facts that are read from a picture."""
OPTIONAL = (
    "guidance_interval", "strength", "lossy_vae_tile", "sampler", "loras", "lora_hashes", "dtype", "requested_prompt",
    "reasoner",
)  # fmt: skip
"""Facts that a picture may lack: it was drawn without, or by an older Lens."""
WRITERS = 4
"""Threads that compress pictures; zlib runs without Python's lock."""


def versions() -> dict[str, str]:
    """The versions of what draws: Lens, torch, diffusers."""
    return {"lens": __version__, "torch": version("torch"), "diffusers": version("diffusers")}


def facts_of(prompt: Refinement, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A picture's record. `prompt` is what was drawn; where a reasoner was asked, `requested_prompt` is the request,
    and `reasoner` names it and says why its answer was not used, if it was not."""
    facts = {"prompt": prompt.text, "seed": seed, **settings, "versions": versions()}
    if "reasoner" in settings:
        unused = {"unused": prompt.reason} if prompt.reason else {}
        facts |= {"requested_prompt": prompt.request, "reasoner": {**settings["reasoner"], **unused}}
    return facts


def save(image: Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a PIL picture whose text chunk `lens` holds the facts that drew it, as JSON."""
    write_atomic(path, lambda p: save_to(image, p, facts))


def save_to(image: Image, target: Path | BinaryIO, facts: dict[str, Any]) -> None:
    """`save` without the care for a half-written file; also into a stream."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("lens", json.dumps(facts, ensure_ascii=False))
    image.save(target, format="PNG", pnginfo=info)


def encoded(image: Image, facts: dict[str, Any]) -> bytes:
    """The bytes that `save` writes."""
    data = io.BytesIO()
    save_to(image, data, facts)
    return data.getvalue()


def facts(path: Path) -> tuple[Image, dict[str, Any]]:
    """A picture and what Lens wrote into it, of which nothing is believed: kinds and ranges are checked."""
    image = images.read_raw(path)
    text = image.info.get("lens")
    if not isinstance(text, str):
        raise ConfigError(f"{path}: carries no facts of Lens; it was drawn by something else, or saved again since")
    try:
        if len(text) > LARGEST:
            raise ValueError(f"{len(text)} characters")
        facts = parse_json(text, finite=False, allow_duplicate_keys=True)
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(f"{path}: its facts cannot be read ({' '.join(str(error).split())})") from error
    rules: dict[str, Callable[[Any], bool]] = {
        "prompt": lambda v: isinstance(v, str),
        "negative_prompt": lambda v: isinstance(v, str),
        "model": lambda v: isinstance(v, str),
        "model_hash": lambda v: isinstance(v, str),
        "seed": lambda v: _whole(v, 0, 2**63),
        "height": lambda v: _whole(v, 1, 2**14 + 1),
        "width": lambda v: _whole(v, 1, 2**14 + 1),
        "steps": lambda v: _whole(v, 1, 2**16 + 1),
        "guidance_scale": _finite,
        "guidance_interval": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_finite, v)),
        "strength": _finite,
        "lossy_vae_tile": lambda v: _whole(v, 1, 2**14 + 1),
        "sampler": lambda v: isinstance(v, dict) and isinstance(v.get("use"), str),
        "loras": _are_texts,
        "lora_hashes": _are_texts,
        "dtype": lambda v: isinstance(v, str),
        "requested_prompt": lambda v: isinstance(v, str),
        "reasoner": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    }
    for name, holds in rules.items():
        if name not in facts and name in OPTIONAL:
            continue
        if name not in facts or not holds(facts[name]):
            raise ConfigError(f"{path}: its facts have no sound {name!r}; the picture cannot be drawn from them")
    return image, facts


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
