"""The generator `diffusers`: any text-to-image pipeline of the diffusers library, by the name of its class.

Only safetensors weights are loaded, and no code that comes with them. What decides a picture is recorded: every
argument of the call that is not the library's default, and for pipelines that rewrite prompts whether they did.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.inference.parts import resolve_device, resolve_dtype
from lens_core.io import readers
from lens_core.types import (
    ConfigError,
    GenerationEstimate,
    LensError,
    PictureOutcome,
    PictureRequest,
    SystemInfo,
    did_you_mean,
)
from lens_core.validators import GUIDANCE, STEPS, integer, one_of, optional, real, text

GUIDANCE_NAMES = {"QwenImagePipeline": "true_cfg_scale"}
"""Pipelines in which another argument than `guidance_scale` is classifier-free guidance."""
NEGATIVE = {"QwenImagePipeline": " "}
"""Pipelines that leave guidance out unless they get a negative prompt, and their authors' empty one."""
REWRITE = "enable_prompt_rewrite"
WITHHELD = "nsfw_content_detected: the pipeline's own checker withheld the picture"
OURS = {"prompt", "generator", "num_images_per_prompt", "output_type", "return_dict", "height", "width", REWRITE}
"""Arguments of a call that are not for `call`."""
HEAD = 2**20  # bytes of each file of weights that its fingerprint reads


class Diffusers:
    """Draw with a pipeline of diffusers, such as FLUX or SDXL.

    One call for each batch of prompts of one size.
    """

    @frozen
    class Config:
        model: str = field(validator=text())  # a folder or a Hub id
        pipeline: str | None = field(default=None, validator=optional(text()))  # a class; None: the checkpoint's own
        revision: str | None = field(default=None, validator=optional(text()))  # of a Hub id: a commit, tag or branch
        steps: int | None = field(default=None, validator=optional(STEPS))  # the pipeline's default if None
        guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
        negative_prompt: str | None = None
        # Of pipelines that can rewrite prompts (LongCat-Image): on or off, never the library's default.
        prompt_rewrite: bool = False
        call: dict[str, Any] = field(factory=dict)  # more arguments of the pipeline's call
        batch_size: int = field(default=1, validator=integer(at_least=1, at_most=1000))
        device: str = field(default="auto", validator=text())
        dtype: str = field(default="auto", validator=one_of("auto", "float32", "bfloat16", "float16"))
        offload: bool = False  # parts wait on the CPU for their turn
        # For dry runs, which draw nothing.
        seconds_per_picture: float | None = field(default=None, validator=optional(real(at_least=0)))

        def __attrs_post_init__(self) -> None:
            for name in self.call:
                if name in OURS:
                    raise ConfigError(f"call.{name}: is set by the benchmark or by an option of its own; leave it out")
            try:
                json.dumps(self.call, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"call: must be what JSON can hold ({readers.one_line(error)})") from error

    def __init__(self, config: Config, pipeline: Any = None) -> None:
        """`pipeline` is one already built, for tests and scripts; None: the one that the config names, loaded when it
        is first needed."""
        self.config, self.batch_size = config, config.batch_size
        self._built = pipeline
        self._revision = "" if pipeline is None else "built"

    @property
    def pipeline(self) -> Any:
        if self._built is None:
            self._built, self._revision = self._load()
        return self._built

    def describe(self) -> SystemInfo:
        """The checkpoint, its commit or the fingerprint of its files, and every argument of the call."""
        c, pipeline = self.config, self.pipeline
        arguments = self._arguments()
        settings: dict[str, Any] = {
            "pipeline": type(pipeline).__name__,
            "diffusers": version("diffusers"),
            "steps": arguments["num_inference_steps"],
            "guidance_scale": arguments.get(self._guidance_name()),
            "call": arguments,
            "prompts": "refined" if self._rewrites() else "raw",
            "dtype": str(getattr(pipeline, "dtype", "")).removeprefix("torch."),
            "device": self._device().type,
        }
        if REWRITE in self._parameters():
            settings[REWRITE] = c.prompt_rewrite
        return SystemInfo(c.model, self._revision, json.loads(json.dumps(settings)))

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        """Each picture has a CPU generator of its own, seeded by its request; seconds are shares of the call's."""
        for size in dict.fromkeys(request.size for request in requests):
            yield from self._drawn([r for r in requests if r.size == size], size)

    def estimate(self, count: int, size: tuple[int, int] | None = None) -> GenerationEstimate:
        """Calls of the pipeline, and seconds where the config says how many a picture takes."""
        seconds = self.config.seconds_per_picture
        return GenerationEstimate(-(-count // self.batch_size), 0.0, None if seconds is None else seconds * count)

    # ---- one call -------------------------------------------------------------------------------------------------

    def _drawn(self, batch: Sequence[PictureRequest], size: tuple[int, int] | None) -> Iterator[PictureOutcome]:
        import torch

        start = time.perf_counter()
        sent = self._sent([request.prompt for request in batch])
        arguments = dict(self._arguments())
        if size is not None:
            arguments |= {"height": size[0], "width": size[1]}
        if REWRITE in self._parameters():
            arguments[REWRITE] = False  # it is done already, so that the rewritten prompt can be recorded
        if arguments.get("negative_prompt") is not None:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        try:
            # A list of its own: some pipelines write their templates into the prompts that they get.
            output = self.pipeline(prompt=list(sent), generator=generators, output_type="pil", **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            words = f"{type(self.pipeline).__name__} cannot draw: {readers.one_line(error)}"
            raise LensError(f"{words}; check its options and the size") from error
        images = output.images
        if len(images) != len(batch):
            raise LensError(f"{type(self.pipeline).__name__} drew {len(images)} pictures for {len(batch)} prompts")
        seconds = (time.perf_counter() - start) / len(batch)
        withheld = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
        for request, words, image, is_withheld in zip(batch, sent, images, withheld, strict=True):
            if is_withheld:  # the picture is black
                yield PictureOutcome(request, "refused", reason=WITHHELD, seconds=seconds, sent_prompt=words)
                continue
            data = io.BytesIO()
            image.save(data, format="PNG")
            yield PictureOutcome(request, "ok", data.getvalue(), seconds=seconds, sent_prompt=words)

    def _sent(self, prompts: list[str]) -> list[str]:
        """The prompts as the model gets them."""
        if not self._rewrites():
            return prompts
        return [str(words) for words in self.pipeline.rewire_prompt(list(prompts), self._device())]

    def _rewrites(self) -> bool:
        if not self.config.prompt_rewrite:
            return False
        if not hasattr(self.pipeline, "rewire_prompt"):
            raise ConfigError(f"prompt_rewrite: {type(self.pipeline).__name__} cannot rewrite prompts; leave it out")
        return True

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the call beside prompt, generator and size: what the config sets, and the defaults of steps
        and guidance. Raises ConfigError for those that the pipeline does not take."""
        c, known = self.config, self._parameters()
        guidance = self._guidance_name()
        default = {name: known[name].default for name in ("num_inference_steps", guidance) if name in known}
        chosen = {
            "num_inference_steps": c.steps,
            guidance: c.guidance_scale,
            "negative_prompt": NEGATIVE.get(type(self.pipeline).__name__) if c.negative_prompt is None
            else c.negative_prompt,
            **c.call,
        }  # fmt: skip
        arguments = {**default, **{name: value for name, value in chosen.items() if value is not None}}
        for name in arguments:
            if name not in known:
                raise ConfigError(f"{type(self.pipeline).__name__} takes no {name!r}.{did_you_mean(name, known)}")
        return arguments

    def _guidance_name(self) -> str:
        return GUIDANCE_NAMES.get(type(self.pipeline).__name__, "guidance_scale")

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.pipeline).__call__).parameters

    def _device(self) -> Any:
        return resolve_device(self.config.device)

    # ---- loading --------------------------------------------------------------------------------------------------

    def _load(self) -> tuple[Any, str]:
        """(the pipeline on its device, its commit or the fingerprint of its files)."""
        c, device = self.config, self._device()
        cls = self._class()
        folder = Path(c.model).expanduser()
        try:
            if not folder.is_dir():
                folder = Path(cls.download(c.model, revision=c.revision, use_safetensors=True))
            pipeline = cls.from_pretrained(
                str(folder), dtype=resolve_dtype(c.dtype, device), use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, AttributeError, TypeError, ImportError, KeyError) as error:
            raise LensError(
                f"{c.model}: cannot be read as {c.pipeline or 'a diffusers pipeline'} ({readers.one_line(error)}); "
                "check the name and the revision"
            ) from error
        if c.offload and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        commit = folder.name if folder.parent.name == "snapshots" else ""
        return pipeline, commit or fingerprint(folder)

    def _class(self) -> Any:
        import diffusers

        name = self.config.pipeline
        if name is None:
            return diffusers.DiffusionPipeline
        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            known = [n for n in dir(diffusers) if n.endswith("Pipeline")]
            close = did_you_mean(name, known)
            close = close if close.startswith(" Did") else ""
            raise ConfigError(f"pipeline: diffusers {version('diffusers')} has no pipeline called {name!r}.{close}")
        return cls


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint's files: paths, sizes, and the first MiB of each, where safetensors keep their
    headers."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")):
        with path.open("rb") as file:
            head = file.read(HEAD)
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + hashlib.sha256(head).digest())
    return digest.hexdigest()[:16]
