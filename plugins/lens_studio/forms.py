"""The form's values as a request, and a dropped picture's facts as the form's values. Knows nothing of gradio."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from lens_core.inference import foreign_facts, png_metadata
from lens_core.inference.requests import GenerateRequest
from lens_core.io import images
from lens_core.io.readers import shown
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

PRESET = "preset"
"""What stands in a field for which the checkpoint's preset is taken."""
MAX_LORAS = 16


@frozen(kw_only=True)
class Form:
    """The values of the tab Draw as a browser sends them; None and "" stand for the checkpoint's presets."""

    prompt: str = ""
    negative_prompt: str = ""
    size: str = PRESET  # HEIGHTxWIDTH px, or width:height
    steps: str | float | None = None
    guidance_scale: str | float | None = None
    sampler: str = PRESET
    seed: str | float | None = None
    num_images: str | float | None = None
    loras: Sequence[Sequence[Any]] = ()  # rows of name and weight; a weight of 0 leaves it out
    strength: str | float | None = None
    edit: Mapping[str, Any] | None = None  # the editor's background and layers

    def fields(self, grid: int) -> dict[str, Any]:
        """The fields of an image request. `grid`: px that sides are multiples of. Raises ConfigError, in one line."""
        settings = GenerateRequest(
            negative_prompt=self.negative_prompt or None,
            steps=None if _empty(self.steps) else _whole("steps", self.steps),
            guidance_scale=None if _empty(self.guidance_scale) else _real("guidance", self.guidance_scale),
            **parse_size(self.size),
        )
        image, mask = editor_pictures(self.edit)
        strength = None if _empty(self.strength) else _real("strength", self.strength)
        if image is not None:
            settings = evolve(settings, image=image, mask=mask, strength=strength)
            if settings.height is None and settings.aspect_ratio is None:
                height, width = (max(grid, round(side / grid) * grid) for side in (image.height, image.width))
                settings = evolve(settings, height=height, width=width)
        return {
            "prompt": self.prompt,
            "settings": settings,
            "num_images": 1 if _empty(self.num_images) else _whole("number", self.num_images),
            "seed": None if _empty(self.seed) else _whole("seed", self.seed),
            "sampler": None if self.sampler in (None, "", PRESET) else self.sampler,
            "loras": parse_loras(self.loras),
        }


def parse_size(text: str | None) -> dict[str, Any]:
    """HEIGHTxWIDTH in px, or width:height, as the arguments of a request; {} for the model's own size."""
    words = (text or "").strip().lower().replace("×", "x")
    if words in ("", PRESET):
        return {}
    if re.fullmatch(r"\d{1,5} ?x ?\d{1,5}", words):
        height, width = (int(side) for side in words.split("x"))
        return {"height": height, "width": width}
    if re.fullmatch(r"\d{1,4}(\.\d{1,4})?:\d{1,4}(\.\d{1,4})?", words):
        return {"aspect_ratio": words}
    raise ConfigError(f"size {shown(text, 40)} must be HEIGHTxWIDTH in px, as 128x160, or width:height, as 3:2")


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _real(name: str, value: Any) -> float:
    """A finite number as a browser sends it."""
    try:
        number = float(value[:40] if isinstance(value, str) else value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a number, not {shown(value, 40)}") from error
    if not math.isfinite(number) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a finite number, not {shown(value, 40)}")
    return number


def _whole(name: str, value: Any) -> int:
    """A whole number as a browser sends it: 7, 7.0 or "7"."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,19}\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise ConfigError(f"{name} must be a whole number, not {shown(value, 40)}")
    return int(value)


def parse_loras(rows: Any) -> tuple[tuple[str, float], ...]:
    """Rows of name and weight -> (name, weight) of those with a weight. Raises ConfigError."""
    chosen = []
    for row in list(rows or ())[: MAX_LORAS + 1]:
        if not isinstance(row, Sequence) or len(row) != 2:
            raise ConfigError(f"a LoRA is a name and a weight, not {shown(row, 60)}")
        name, weight = row
        try:
            number = float(weight or 0)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the weight of the LoRA {shown(name, 60)} must be a number") from error
        if name and number:
            chosen.append((str(name), number))
    if len(chosen) > MAX_LORAS:
        raise ConfigError(f"at most {MAX_LORAS} LoRAs are taken at once")
    return tuple(chosen)


def editor_pictures(value: Mapping[str, Any] | None) -> tuple[Image | None, Image | None]:
    """What the mask editor holds: (init image, mask); the mask is white where something was painted, or None."""
    from PIL import Image as pil
    from PIL import ImageChops

    if not value or value.get("background") is None:
        return None, None
    background = value["background"]
    if not background.convert("RGBA").getchannel("A").getbbox():
        return None, None  # an empty canvas
    painted = pil.new("L", background.size)
    for layer in value.get("layers") or ():
        if layer is not None and layer.size == background.size:
            alpha = layer.convert("RGBA").getchannel("A").point(lambda a: 255 if a > 32 else 0)
            painted = ImageChops.lighter(painted, alpha)
    image = images.to_rgb(background)
    return image, (painted if painted.getbbox() else None)


# ---- the same again -----------------------------------------------------------------------------------------------


@frozen
class Again:
    """A picture's facts as the form's values, and lines about what they cannot say."""

    values: dict[str, Any]
    notes: tuple[str, ...]


def read_again(path: Path, model_hash: str, loras: Mapping[str, Path]) -> Again:
    """The form's values from a PNG of Lens, ComfyUI or A1111. `model_hash`: of the model that is served; `loras`: those
    that it offers. Raises ConfigError, in one line."""
    foreign = foreign_facts.read(path)
    if foreign is not None:
        taken = dict(foreign.taken)
        notes = [f"from {foreign.tool}; another model draws another picture"]
        notes += [f"not taken: {line}" for line in foreign.left]
    else:
        _, taken = png_metadata.facts(path)
        taken["sampler"] = taken.get("sampler", {}).get("use", PRESET).partition(":")[2] or PRESET
        notes = [] if not model_hash or taken["model_hash"] == model_hash else [
            f"was drawn by {shown(taken['model'], 60)} of hash {shown(taken['model_hash'], 40)}, not by this model"
        ]  # fmt: skip
        if "image_hash" in taken:
            notes.append("was drawn from an init image: give it too")
    rows = dict.fromkeys(loras, 0.0)
    for entry in taken.get("loras", ()):
        name, _, weight = entry.rpartition(":")
        known = next((k for k, p in loras.items() if PurePosixPath(name).stem in (k, p.stem)), None)
        if known is None:
            notes.append(f"its LoRA {shown(entry, 60)} is not offered here")
        else:
            rows[known] = float(weight)
    values = {
        "prompt": taken.get("requested_prompt", taken["prompt"]),
        "negative_prompt": taken.get("negative_prompt", ""),
        "size": f"{taken['height']}x{taken['width']}" if "height" in taken else PRESET,
        "steps": str(taken.get("steps", "")),
        "guidance_scale": f"{taken['guidance_scale']:g}" if "guidance_scale" in taken else "",
        "sampler": taken.get("sampler", PRESET),
        "seed": str(taken["seed"]) if "seed" in taken else "",
        "loras": [[name, weight] for name, weight in rows.items()],
    }
    return Again(values, tuple(notes))
