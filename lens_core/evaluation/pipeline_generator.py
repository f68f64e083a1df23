"""The generator `pipeline`: a Lens checkpoint as a system under test, with its LoRAs, its reasoner and its settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lens_core.arguments import checked_interval, parse_lora
from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, unstructure
from lens_core.inference import png_metadata, refinement
from lens_core.inference.offload_plans import PLANS
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.types import GenerationEstimate, PictureOutcome, PictureRequest, RefusedError, SystemInfo
from lens_core.validators import GUIDANCE, PIXELS, STEPS, each, integer, one_of, optional, real, text, within

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


class PipelineGenerator:
    """Draw with a Lens checkpoint (`LensPipeline`).

    A picture has the seed of its request, whatever it is batched with.
    """

    @frozen
    class Config:
        model: str = field(default="tiny:", validator=text())  # a folder, a Hub id org/name[@revision], or tiny:
        # Single files that replace parts of the model.
        backbone: str | None = field(default=None, validator=optional(text()))
        text_encoder: str | None = field(default=None, validator=optional(text()))  # or a folder with GPT-OSS
        vae: str | None = field(default=None, validator=optional(text()))
        loras: tuple[str, ...] = field(default=(), validator=each(text()))  # PATH or PATH:WEIGHT
        steps: int | None = field(default=None, validator=optional(STEPS))  # the checkpoint's preset if None
        guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
        # low, high: guidance is at work where low < t <= high alone; t = 1 is noise
        guidance_interval: tuple[float, float] = field(default=(0.0, 1.0), validator=each(within(0, 1)))
        negative_prompt: str | None = None
        sampler: ComponentSpec | None = None  # the checkpoint's if None
        reasoner: ComponentSpec | None = None  # rewrites each prompt; None: prompts are sent as they are
        batch_size: int = field(default=50, validator=integer(at_least=1, at_most=10_000))  # pictures drawn at once
        device: str = field(default="auto", validator=text())
        dtype: str = field(default="auto", validator=one_of("auto", "float32", "bfloat16", "float16"))
        offload: str = field(default="auto", validator=one_of("auto", *PLANS))  # auto: the fastest plan that fits
        prompt_cache: str | None = field(default=None, validator=optional(text()))  # a folder of text features
        # px: decode in tiles of this side, to save memory; pictures differ a little. None: whole pictures.
        lossy_vae_tile: int | None = field(default=None, validator=optional(PIXELS))
        # For dry runs, which draw nothing; `lens bench latency` measures it.
        seconds_per_picture: float | None = field(default=None, validator=optional(real(at_least=0)))

        def __attrs_post_init__(self) -> None:
            checked_interval(self.guidance_interval)

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            for kind in ("sampler", "reasoner"):
                if getattr(self, kind) is not None:
                    yield kind, kind, getattr(self, kind)

    def __init__(self, config: Config, catalog: Catalog | None = None) -> None:
        self.config, self.batch_size = config, config.batch_size
        self._catalog = catalog
        # (height, width) of the pictures to come, for the choice of an offload plan; None: the model's own.
        self.planned_size: tuple[int, int] | None = None
        self._pipeline: LensPipeline | None = None

    @property
    def catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog.installed()
        return self._catalog

    @property
    def pipeline(self) -> LensPipeline:
        """Loaded when it is first needed."""
        if self._pipeline is None:
            c = self.config

            def path(name: str | None) -> Path | None:
                return None if name is None else Path(name)

            request = ModelRequest(
                c.model,
                path(c.backbone),
                path(c.text_encoder),
                path(c.vae),
                loras=tuple(map(parse_lora, c.loras)),
                sampler=c.sampler,
                device=_device(c.device),
                dtype=c.dtype,
                offload=c.offload,
                prompt_cache=path(c.prompt_cache),
                reasoner=c.reasoner,
                lossy_vae_tile=c.lossy_vae_tile,
            )
            height, width = self.planned_size or (None, None)
            images = self._request(height, width)
            self._pipeline = request.load(lambda loaded: images.workload(loaded, c.batch_size), catalog=self.catalog)
        return self._pipeline

    def _request(self, height: int | None, width: int | None) -> GenerateRequest:
        c = self.config
        return GenerateRequest(
            c.negative_prompt, height=height, width=width, steps=c.steps, guidance_scale=c.guidance_scale,
            guidance_interval=c.guidance_interval,
        )  # fmt: skip

    def describe(self) -> SystemInfo:
        """The checkpoint's name and hash; settings have `prompts`: raw, or refined by a reasoner."""
        c, pipeline = self.config, self.pipeline
        presets, reasoner = pipeline.presets, pipeline.reasoner
        sampler = pipeline.specs.get("sampler")
        scale = presets["guidance_scale"] if c.guidance_scale is None else c.guidance_scale
        interval = () if scale == 1 else checked_interval(c.guidance_interval)  # without guidance it has no effect
        settings = {
            "steps": int(presets["steps"]) if c.steps is None else c.steps,
            "guidance_scale": scale,
            **({} if interval in ((), (0, 1)) else {"guidance_interval": list(interval)}),
            "negative_prompt": c.negative_prompt or "",
            "sampler": None if sampler is None else unstructure(sampler),
            "prompts": "raw" if c.reasoner is None else "refined",
            # With the hash of its system prompt, which a file may hold: another text is another system.
            "reasoner": None if c.reasoner is None else {**unstructure(c.reasoner), **refinement.provenance(reasoner)},
            **({} if c.lossy_vae_tile is None else {"lossy_vae_tile": c.lossy_vae_tile}),
            "dtype": pipeline.dtype,
            "device": pipeline.device.type,
        }
        replaced = [path for path in (c.backbone, c.text_encoder, c.vae) if path is not None]
        name = " + ".join([c.model, *replaced, *c.loras])
        # As it comes back from JSON, so that a stored description equals a new one.
        # Two LoRAs of one name differ by their hash.
        loras = [f"{lora}@{digest}" for lora, digest in zip(pipeline.loras, pipeline.lora_hashes, strict=True)]
        return SystemInfo(name, "+".join([pipeline.version, *loras]), json.loads(json.dumps(settings)))

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        """One call of the pipeline for each size among the requests; seconds are shares of the call's. A prompt that a
        reasoner refuses has the status "refused"."""
        reasons = self._refused(list(dict.fromkeys(request.prompt for request in requests)))
        for request in requests:
            if request.prompt in reasons:
                yield PictureOutcome(request, "refused", reason=reasons[request.prompt])
        allowed = [request for request in requests if request.prompt not in reasons]
        for size in dict.fromkeys(request.size for request in allowed):
            yield from self._drawn([request for request in allowed if request.size == size], size)

    def _refused(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that the reasoner refuses, with its reasons; the answers to the others are kept."""
        try:
            # All at once, so that a reasoner is asked about the whole batch; the calls that draw find its answers.
            self.pipeline.refine(prompts)
            return {}
        except RefusedError as error:
            if len(prompts) == 1:
                return {prompts[0]: str(error)}
        return {prompt: reason for one in prompts for prompt, reason in self._refused([one]).items()}

    def _drawn(self, batch: Sequence[PictureRequest], size: tuple[int, int] | None) -> Iterator[PictureOutcome]:
        height, width = size or (None, None)
        images = self._request(height, width)
        start = time.perf_counter()
        seeds = [request.seed for request in batch]
        result = self.pipeline([request.prompt for request in batch], seed=seeds, **images.arguments())
        seconds = (time.perf_counter() - start) / len(batch)
        facts = [
            png_metadata.facts_of(prompt, seed, result.settings)
            for prompt, seed in zip(result.prompts, seeds, strict=True)
        ]
        with ThreadPoolExecutor(png_metadata.WRITERS, "png") as writers:
            encoded = writers.map(png_metadata.encoded, result.images, facts)
            for request, data, prompt in zip(batch, encoded, result.prompts, strict=True):
                unused = {"reasoner_unused": prompt.reason} if prompt.reason else {}
                yield PictureOutcome(request, "ok", data, seconds=seconds, sent_prompt=prompt.text, facts=unused)

    def estimate(self, count: int, size: tuple[int, int] | None = None) -> GenerationEstimate:
        """Calls of the pipeline, and seconds where the config says how many a picture takes."""
        seconds = self.config.seconds_per_picture
        return GenerationEstimate(-(-count // self.batch_size), 0.0, None if seconds is None else seconds * count)


def _device(name: str) -> str:
    """`auto` is this process's own GPU where a launcher has started several processes."""
    local = os.environ.get("LOCAL_RANK", "")
    if name != "auto" or not local.isdecimal():
        return name
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(local) % count}" if count else name
