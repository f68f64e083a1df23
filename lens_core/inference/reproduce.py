"""Draw an image again from the facts in its PNG file, and measure how far the two are apart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from attrs import frozen

from lens_core.inference import png_metadata
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.io.images import to_rgb
from lens_core.io.readers import shown
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


@frozen
class Reproduction:
    """The image drawn again, and its differences from the stored one, in steps of 255 a channel."""

    image: Image
    facts: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]  # fact -> as stored, as it is now
    max_difference: int
    mean_difference: float


def reproduce(path: Path, model: ModelRequest, image: Image | None = None, mask: Image | None = None) -> Reproduction:
    """Draw the image of `path` again with `model`; `image` and `mask` are those it was drawn from, if any.

    The sampler is the stored one, whatever `model` says, and the dtype unless `model` names one. Raises ConfigError
    where the facts are unsound, where the model or a LoRA is another, or where an init image or a mask is missing or
    too many.
    """
    stored_image, stored = png_metadata.facts(path)
    for name, value in (("image", image), ("mask", mask)):
        if (f"{name}_hash" in stored) != (value is not None):
            need = "was drawn from one: give it" if value is None else "was drawn without: leave out"
            raise ConfigError(f"{path}: {need}, --{name}")
    options = dict(stored.get("sampler", {}))
    use = options.pop("use", None)
    sampler, tile = ComponentSpec(use, options) if use else None, stored.get("lossy_vae_tile")
    dtype = stored.get("dtype", "auto") if model.dtype == "auto" else model.dtype
    pipeline = attrs.evolve(model, sampler=sampler, reasoner=None, lossy_vae_tile=tile, dtype=dtype).load()
    if (pipeline.version, pipeline.loras) != (stored["model_hash"], stored.get("loras", [])):
        raise ConfigError(
            f"{path}: was drawn by {stored['model']} of hash {stored['model_hash']} with the LoRAs "
            f"{stored.get('loras', [])}; this is hash {pipeline.version} with {pipeline.loras}: give --model and --lora"
        )
    hashes = stored.get("lora_hashes", pipeline.lora_hashes)  # older pictures have none
    for name, was, now in itertools.zip_longest(pipeline.loras, hashes, pipeline.lora_hashes):
        if was != now:
            raise ConfigError(
                f"{path}: was drawn with another LoRA {name}, of hash {shown(was, 40)}, not {now}: give that file, "
                "--lora"
            )
    low, high = stored.get("guidance_interval", (0.0, 1.0))
    request = GenerateRequest(
        negative_prompt=stored["negative_prompt"] or None,
        height=stored["height"],
        width=stored["width"],
        steps=stored["steps"],
        guidance_scale=stored["guidance_scale"],
        guidance_interval=(low, high),
        image=image,
        mask=mask,
        strength=stored.get("strength"),
    )
    result = pipeline(stored["prompt"], seed=stored["seed"], **request.arguments())
    (again,) = result.images
    facts = png_metadata.facts_of(result.prompts[0], stored["seed"], result.settings)
    # The prompt that was drawn is drawn again; its reasoner is not asked, and what it was stays recorded.
    facts |= {name: stored[name] for name in ("requested_prompt", "reasoner") if name in stored}
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the stored facts
    unrecorded = {"dtype", "lora_hashes"} - stored.keys()  # by an older Lens
    names = sorted((stored.keys() | facts.keys()) - {"request"} - unrecorded)
    changes = {name: (stored.get(name), facts.get(name)) for name in names if stored.get(name) != facts.get(name)}
    if stored_image.size != again.size:
        raise ConfigError(
            f"the picture is {stored_image.height}x{stored_image.width} px, but its facts say "
            f"{again.height}x{again.width}"
        )
    difference = np.abs(np.asarray(to_rgb(stored_image), np.int16) - np.asarray(again, np.int16))
    return Reproduction(again, facts, changes, int(difference.max()), float(difference.mean()))
