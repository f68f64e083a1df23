"""The form's values as a request, and a dropped picture's facts as the form's values. Knows nothing of gradio."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from lens_core.inference import foreign_facts, png_metadata
from lens_core.inference.requests import GenerateRequest
from lens_core.io import images
from lens_core.io.readers import one_line, shown
from lens_core.types import ConfigError, LensError

if TYPE_CHECKING:
    from PIL.Image import Image

PRESET = "preset"
"""What stands in a field for which the checkpoint's preset is taken."""
MAX_LORAS = 16
MAX_NAMED = 8  # options of a sampler in one note


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


def read_again(
    path: Path,
    model_hash: str,
    loras: Mapping[str, Path],
    *,
    sampler_facts: Callable[[str], Mapping[str, Any]] | None = None,
    lossy_vae_tile: int | None = None,
    dtype: str = "",
    lora_hash: Callable[[str], str] | None = None,
) -> Again:
    """The form's values from a PNG of Lens, ComfyUI or A1111. `model_hash`: of the model that is served; `loras`: those
    that it offers; `sampler_facts`: a sampler's name -> how pictures record it, with the options that it has here;
    `lossy_vae_tile`: in what tiles it decodes, px; `dtype`: in which it draws; `lora_hash`: a name of `loras` -> the
    hash of its content. Raises ConfigError, in one line."""
    foreign = foreign_facts.read(path)
    if foreign is not None:
        taken = dict(foreign.taken)
        notes = [f"from {foreign.tool}; another model draws another picture"]
        notes += [f"not taken: {line}" for line in foreign.left]
    else:
        _, taken = png_metadata.facts(path)
        notes = [] if not model_hash or taken["model_hash"] == model_hash else [
            f"was drawn by {shown(taken['model'], 60)} of hash {shown(taken['model_hash'], 40)}, not by this model"
        ]  # fmt: skip
        notes += _differences(taken, sampler_facts, lossy_vae_tile)
        if dtype and taken.get("dtype", dtype) != dtype:  # older pictures have none
            notes.append(f"was drawn in {shown(taken['dtype'], 40)}; this server draws in {dtype}")
        taken["sampler"] = _sampler_name(taken)
    chosen, lora_notes = _loras_again(path, taken, loras, lora_hash)
    values = {
        "prompt": taken.get("requested_prompt", taken["prompt"]),
        "negative_prompt": taken.get("negative_prompt", ""),
        "size": f"{taken['height']}x{taken['width']}" if "height" in taken else PRESET,
        "steps": str(taken.get("steps", "")),
        "guidance_scale": _digits(taken["guidance_scale"]) if "guidance_scale" in taken else "",
        "sampler": taken.get("sampler", PRESET),
        "seed": str(taken["seed"]) if "seed" in taken else "",
        "loras": [[name, weight] for name, weight in chosen.items()],
        "strength": _digits(taken["strength"]) if "strength" in taken else "",
    }
    return Again(values, (*notes, *lora_notes))


def _digits(number: float) -> str:
    """A number in the fewest digits that are read as the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _sampler_name(facts: Mapping[str, Any]) -> str:
    """The form's name of the sampler that drew a picture."""
    return facts.get("sampler", {}).get("use", PRESET).partition(":")[2] or PRESET


def _differences(
    facts: Mapping[str, Any], sampler_facts: Callable[[str], Mapping[str, Any]] | None, tile: int | None
) -> list[str]:
    """A line for each fact of a picture of Lens that the form cannot set, and that differs from what is served."""
    notes = []
    if "image_hash" in facts:
        mask = " and its mask" if "mask_hash" in facts else ""
        notes.append(f"was drawn from an init image: give it{mask} too")
    if "guidance_interval" in facts and facts["guidance_scale"] != 1:
        low, high = (_digits(time) for time in facts["guidance_interval"])
        notes.append(f"was guided at times from {low} to {high} alone; this page guides at all times")
    if facts.get("lossy_vae_tile") != tile:
        was, now = (f"in tiles of {n} px" if n else "whole" for n in (facts.get("lossy_vae_tile"), tile))
        notes.append(f"was decoded {was}; this server decodes {now}")
    if sampler_facts is not None and (name := _sampler_name(facts)) != PRESET:
        notes += _sampler_differences(facts["sampler"], name, sampler_facts)
    return notes


def _sampler_differences(
    stored: Mapping[str, Any], name: str, sampler_facts: Callable[[str], Mapping[str, Any]]
) -> list[str]:
    """A line where a sampler of this name is another here, or has other options."""
    try:
        here = sampler_facts(name)
    except LensError:
        return [f"its sampler {shown(stored['use'], 60)} is not offered here; choose another"]
    if here["use"] != stored["use"]:
        return [f"its sampler was {shown(stored['use'], 60)}; {name} is {here['use']} here"]
    changed = [key for key, value in stored.items() if here.get(key) != value][:MAX_NAMED]
    if not changed:
        return []
    was, now = (
        ", ".join(f"{one_line(key, 40)} {shown(options.get(key), 40)}" for key in changed) for options in (stored, here)
    )
    return [f"its sampler {name} had {was}; here it has {now}"]


def _loras_again(
    path: Path, facts: Mapping[str, Any], loras: Mapping[str, Path], lora_hash: Callable[[str], str] | None
) -> tuple[dict[str, float], list[str]]:
    """The weight of each offered LoRA in a picture, whose facts name them as FILE:WEIGHT, and notes. Raises
    ConfigError for an entry of another form."""
    weights, notes = dict.fromkeys(loras, 0.0), []
    hashes = facts.get("lora_hashes", ()) if lora_hash is not None else ()
    for entry, digest in zip_longest(facts.get("loras", ()), hashes):
        if entry is None:
            break  # more hashes than LoRAs
        file, _, text = entry.rpartition(":")
        weight = _weight(text)
        if not file or weight is None:
            raise ConfigError(f"{path}: its LoRA {shown(entry, 60)} is not FILE:WEIGHT; give the form's values by hand")
        stem = PurePosixPath(file).stem
        fitting = [name for name, place in loras.items() if place.name == file]
        fitting = fitting or [name for name, place in loras.items() if stem in (name, place.stem)]
        if not fitting:
            notes.append(f"its LoRA {shown(entry, 60)} is not offered here")
            continue
        if digest is not None and lora_hash is not None:
            digests, unread = _digests(fitting, lora_hash)
            notes += unread
            same = [name for name in digests if digests[name] == digest]
            if digests and not same:
                notes.append(f"its LoRA {shown(file, 60)} had other content, of hash {shown(digest, 40)}")
            fitting = same or list(digests)
        if not fitting:
            continue  # none can be read, and with its weight nothing could be drawn
        taken = next((name for name in fitting if not weights[name]), fitting[0])
        weights[taken] = weight
        if len(fitting) > 1:
            names = ", ".join(fitting)
            notes.append(f"its LoRA {shown(file, 60)} may be any of {names}, whose files have one name; {taken} is set")
    return weights, notes


def _digests(names: Sequence[str], lora_hash: Callable[[str], str]) -> tuple[dict[str, str], list[str]]:
    """The hash of each of the LoRAs that can be read, and a line for each file that is gone or broken."""
    digests, notes = {}, []
    for name in names:
        try:
            digests[name] = lora_hash(name)
        except LensError as error:
            notes.append(f"the LoRA {shown(name, 60)} cannot be read: {one_line(str(error), 200)}")
    return digests, notes


def _weight(text: str) -> float | None:
    """A finite number, or None."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if math.isfinite(weight) else None
