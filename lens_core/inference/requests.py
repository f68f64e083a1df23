"""What a caller asks for, as two frozen objects: the model (`ModelRequest`) and the images (`GenerateRequest`)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from lens_core.arguments import whole
from lens_core.inference import refinement
from lens_core.inference.call_arguments import MAX_COUNT
from lens_core.inference.offload_plans import Workload, describe_plan
from lens_core.inference.pipeline import LensPipeline

if TYPE_CHECKING:
    from PIL.Image import Image

    from lens_core.catalog import Catalog
    from lens_core.recipe import ComponentSpec

MAX_IMAGES = 1_000_000
"""Of one call that writes files, or of one benchmark."""


def _log(line: str) -> None:
    print(line, file=sys.stderr)


@frozen
class ModelRequest:
    """A model and how to load it. `backbone`, `text_encoder`, `vae` are single files that replace the model's parts."""

    model: str = "tiny:"  # a folder, a Hub id org/name[@revision], a .safetensors file or a plugin's name
    backbone: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()  # file or folder, weight
    sampler: ComponentSpec | None = None  # the checkpoint's if None
    device: str = "auto"
    dtype: str = "auto"
    offload: str | None = "auto"  # None: every part on the device, always
    prompt_cache: Path | None = None  # a folder of text features
    reasoner: ComponentSpec | None = None  # rewrites prompts before they are drawn
    lossy_vae_tile: int | None = None  # px: decode in tiles of this side, which changes pictures a little

    @property
    def name(self) -> str:
        """The model and its LoRAs in one line, and its reasoner: scores with and without one are of two systems."""
        reasoner = [] if self.reasoner is None else [f"reasoner {self.reasoner.use}"]
        return " + ".join([self.model, *(f"{path}:{weight:g}" for path, weight in self.loras), *reasoner])

    def load(
        self,
        workload: Callable[[LensPipeline], Workload] | None = None,
        *,
        catalog: Catalog | None = None,
        log: Callable[[str], None] = _log,
    ) -> LensPipeline:
        """The pipeline, ready to draw. `workload` says what will be drawn, for the choice of an offload plan; `log`
        gets a line about that plan where it is not `none`."""
        pipeline = LensPipeline.from_pretrained(
            self.model,
            catalog=catalog,
            device=self.device,
            dtype=self.dtype,
            offload=self.offload,
            workload=workload,
            prompt_cache=self.prompt_cache,
            backbone=self.backbone,
            text_encoder=self.text_encoder,
            vae=self.vae,
            reasoner=self.reasoner,
        )
        manager = pipeline.offload_manager
        if manager is not None and manager.estimate.plan != "none":
            log(describe_plan(manager.estimate, str(pipeline.device), manager.free))
        for path, weight in self.loras:
            pipeline.load_lora_weights(path, weight)
        if self.sampler is not None:
            pipeline.use_sampler(self.sampler.use, **self.sampler.options)
        if self.lossy_vae_tile is not None:
            pipeline.use_lossy_vae_tiles(self.lossy_vae_tile)
        return pipeline


def _check_steps(_: object, attribute: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None:
        whole(attribute.name, value, 1, MAX_COUNT)


@frozen
class GenerateRequest:
    """Everything that decides an image beside the model, its prompt and its seed. None: the checkpoint's preset."""

    negative_prompt: str | None = None
    height: int | None = None  # px
    width: int | None = None
    aspect_ratio: str | None = None
    base_resolution: int | None = None
    steps: int | None = field(default=None, validator=_check_steps)
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    image: Image | None = None  # the init image
    mask: Image | None = None  # white is drawn anew
    strength: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LensPipeline.__call__`."""
        renamed = {"steps": "num_inference_steps", "mask": "mask_image"}
        return {renamed.get(a.name, a.name): getattr(self, a.name) for a in attrs.fields(GenerateRequest)}

    def workload(self, pipeline: LensPipeline, batch_size: int) -> Workload:
        """What generating `batch_size` images at once asks of the memory."""
        if pipeline.vae is None:
            return Workload()  # nothing can be drawn without it, which the call itself reports
        size = pipeline.size(self.height, self.width, self.aspect_ratio, self.base_resolution)
        steps = self.steps or int(pipeline.presets["steps"])
        scale = pipeline.presets["guidance_scale"] if self.guidance_scale is None else self.guidance_scale
        guided = scale != 1 and not self.negative_prompt
        return Workload(size, pipeline.vae.downscale, batch_size, steps=steps, guided=guided)

    def fingerprint(self, pipeline: LensPipeline, prompt: str, seed: int) -> str:
        """A short hash of everything that decides one image: two requests with the same hash draw the same."""
        sampler = pipeline.specs.get("sampler")
        fields = {a.name: getattr(self, a.name) for a in attrs.fields(GenerateRequest)}
        fields |= {name: _digest(fields[name]) for name in ("image", "mask")}
        decisive = [pipeline.version, pipeline.loras, sampler and [sampler.use, dict(sampler.options)], fields]
        if pipeline.lossy_vae_tile is not None:
            decisive.append(f"tiles of {pipeline.lossy_vae_tile} px")
        if pipeline.reasoner is not None:
            decisive.append(refinement.provenance(pipeline.reasoner))
        if pipeline.loras:
            decisive.append(pipeline.lora_hashes)
        if pipeline.dtype != "float32":
            decisive.append(pipeline.dtype)
        return hashlib.sha256(json.dumps([*decisive, prompt, seed], default=str).encode()).hexdigest()[:16]


def _digest(image: Image | None) -> str:
    if image is None:
        return ""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
