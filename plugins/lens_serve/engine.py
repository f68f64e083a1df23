"""The engine: one model in memory, one queue of requests, and one thread that draws.

    engine = Engine.load(ModelRequest("tiny:"))
    job = engine.submit(ImageRequest(prompt="a red circle", seed=7, previews=3))
    for event in job.events():
        ...
    engine.close()

Requests that wait and agree in everything but prompt, negative prompt and seed are drawn together in one call of the
pipeline. Each picture has its own noise, so a seed draws the same picture alone and in a batch; kernels round other
sizes of a batch otherwise, which shows as at most 1 of 255 in some pixels in float32. `Limits(max_batch=1)` never does.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
from attrs import define, field, frozen

from lens_core.arguments import whole
from lens_core.checkpoints import adapters
from lens_core.inference import lora, png_metadata
from lens_core.inference.call_arguments import MAX_SEED, CallArguments, GenerationSettings
from lens_core.inference.image_to_image import read_init_image
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.io import readers
from lens_core.recipe import unstructure
from lens_core.types import ConfigError, LensError, did_you_mean
from lens_serve.jobs import Busy, Cancelled, Done, DrawnImage, Failed, ImageRequest, Job, Limits, Queued, Stopping
from lens_serve.live import AllCancelled, LiveBatch, Unit

FIRST_GUESS = 1.0  # seconds a picture takes, until one has been drawn


@frozen
class ModelState:
    """The sampler and the LoRAs of a batch, by their names in full."""

    sampler: str | None
    loras: tuple[tuple[str, float], ...]


@frozen
class BatchKey:
    """What pictures of one batch have in common. `alone` is the job's own where it has an init image."""

    state: ModelState
    settings: Hashable
    alone: Hashable


@define
class Counters:
    """What the engine has done since it began, for `/metrics`."""

    done: int = 0  # jobs
    failed: int = 0
    cancelled: int = 0
    refused: int = 0  # for a full queue, or while it stops
    images: int = 0
    batches: int = 0
    steps: int = 0  # of batches
    drawing_seconds: float = 0.0
    seconds_per_image: float = field(default=FIRST_GUESS)  # a moving average


class Engine:
    """Draws what is submitted, in the order of submission. Every method is safe to call from any thread."""

    def __init__(
        self,
        pipeline: LensPipeline,
        *,
        name: str = "",
        limits: Limits | None = None,
        loras: Mapping[str, Path] | None = None,
        base_loras: Sequence[tuple[Path, float]] = (),
    ) -> None:
        """`name`: the model's, for clients. `loras`: the files that requests may name. `base_loras` are folded into the
        pipeline already, and stay under those of requests. Raises LensError for a pipeline that cannot draw."""
        pipeline.store.require_all()
        self.name = name or pipeline.source or "model"
        self.limits = limits or Limits()
        self.loras = dict(loras or {})
        self.counters = Counters()
        self._model = ModelRequest()  # how another is loaded; what `load` was given
        self._pipeline = pipeline
        self._base_loras = tuple(base_loras)
        self._state: ModelState | None = ModelState(None, ())  # None: unknown, after a failure
        self._default_sampler = (pipeline.sampler, pipeline.specs.get("sampler"))
        pipeline.progress_bar_config = {**pipeline.progress_bar_config, "disable": True}
        self._jobs: list[Job] = []  # accepted and unfinished, in order
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="lens-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, model: ModelRequest, *, limits: Limits | None = None, loras: Mapping[str, Path] | None = None
    ) -> Self:
        """Read the model, and start. Raises CheckpointError and ConfigError, and LensError for one that cannot draw."""
        engine = cls(model.load(), name=model.name, limits=limits, loras=loras, base_loras=model.loras)
        engine._model = model
        return engine

    def another(self, model: str) -> Self:
        """An engine of another checkpoint, on the same device, in the same dtype and within the same limits. The caller
        closes it. Raises as `load` does."""
        here = self._model
        request = ModelRequest(model, device=here.device, dtype=here.dtype, offload=here.offload)
        return type(self).load(request, limits=self.limits)

    # ---- what it offers -----------------------------------------------------------------------------------------

    @property
    def presets(self) -> Mapping[str, Any]:
        """The checkpoint's `steps`, `guidance_scale`, `base_resolution` and `sizes`, where a request names none."""
        return dict(self._pipeline.presets)

    @property
    def model_hash(self) -> str:
        """Of the checkpoint, as pictures record it."""
        return str(self._pipeline.version)

    @property
    def grid(self) -> int:
        """Sides of a picture are multiples of this, px."""
        return int(self._pipeline.vae.downscale)

    @property
    def samplers(self) -> list[str]:
        """The names of samplers, for requests."""
        return [entry.short for entry in self._catalog.entries("sampler")]

    @property
    def lossy_vae_tile(self) -> int | None:
        """Side of the tiles in which pictures are decoded, px; None: whole."""
        return self._pipeline.lossy_vae_tile

    @property
    def dtype(self) -> str:
        """The dtype of the backbone's weights, as pictures record it."""
        return self._pipeline.dtype

    def lora_hash(self, name: str) -> str:
        """The hash of the content of one of `loras`, as pictures record it. Raises LensError for a broken file."""
        return adapters.digest(lora.read(self.loras[name].expanduser(), self._pipeline.backbone))

    def sampler_facts(self, name: str | None) -> Mapping[str, Any]:
        """The sampler and its options that a request of this name is drawn with, as pictures record it; {} where the
        model's own has no name. Raises ConfigError."""
        sampler, spec = self._default_sampler
        parts = LensPipeline(sampler=sampler, specs={"sampler": spec} if spec else {}, catalog=self._catalog)
        if name is not None:
            parts.use_sampler(name)
        return unstructure(parts.specs["sampler"]) if "sampler" in parts.specs else {}

    @property
    def waiting(self) -> int:
        """Requests of which nothing has been drawn yet."""
        with self._change:
            return sum(not job.started for job in self._jobs)

    @property
    def running(self) -> int:
        """Unfinished requests of which a picture is being drawn, or has been."""
        with self._change:
            return sum(job.started and not job.finished for job in self._jobs)

    @property
    def closing(self) -> bool:
        """Whether no more requests are accepted."""
        return self._closing

    @property
    def retry_after(self) -> int:
        """Seconds after which there should be room in the queue, at least 1."""
        with self._change:
            ahead = sum(len(job.pending) for job in self._jobs)
        return max(1, min(600, math.ceil(ahead * self.counters.seconds_per_image)))

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: ImageRequest) -> Job:
        """Accept a request. Raises ConfigError for one that cannot be drawn or is beyond `limits`, Busy where the queue
        is full, and Stopping after `close`. Returns at once; read `job.events()` or `job.result()`."""
        settings = self._settings(request)
        state = ModelState(self._sampler_name(request.sampler), self._checked_loras(request.loras))
        seeds = _seeds(request)
        alone = secrets.token_hex(8) if request.settings.image is not None else None
        shared = attrs.evolve(settings, prompts=(), negative_prompts=() if settings.negative_prompts else None)
        job = Job(request, settings, seeds, BatchKey(state, shared, alone), self._on_cancel)
        retry_after = self.retry_after
        with self._change:
            if self._closing:
                self.counters.refused += 1
                raise Stopping("the server is stopping; send the request again in a moment", retry_after)
            waiting = sum(not job.started for job in self._jobs)
            if waiting >= self.limits.max_queue:
                self.counters.refused += 1
                raise Busy(f"{waiting} requests wait already, the most that may; try again later", retry_after)
            job.emit(Queued(len(self._jobs)))
            self._jobs.append(job)
            self._change.notify_all()
        return job

    def refuse(self) -> None:
        """Accept no more requests; go on with the accepted ones. May be called by a signal's handler."""
        self._closing = True

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, finish the accepted ones for up to `timeout` seconds, cancel the rest, and stop. Returns
        whether all were finished."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            finished = self._change.wait_for(lambda: not self._jobs, timeout)
            rest = list(self._jobs)
        for job in rest:
            job.cancel()
        self._thread.join()
        return finished

    # ---- validation ---------------------------------------------------------------------------------------------

    @property
    def _catalog(self) -> Any:
        from lens_core.catalog import Catalog

        if self._pipeline.catalog is None:
            self._pipeline.catalog = Catalog.installed()
        return self._pipeline.catalog

    def _settings(self, request: ImageRequest) -> GenerationSettings:
        """The request completed with the presets, for one picture. Raises ConfigError."""
        limits, wanted = self.limits, request.settings
        arguments = wanted.arguments()
        strength = arguments.pop("strength")
        for name, text in (("prompt", request.prompt), ("negative_prompt", wanted.negative_prompt)):
            _check_text(name, text, limits.max_prompt)
        whole("num_images", request.num_images, 1, limits.max_images)
        whole("previews", request.previews, 0, limits.max_previews)
        call = CallArguments(prompt=request.prompt, **arguments)
        settings = call.settings(self._pipeline.presets, self.grid)
        height, width = settings.size
        if height * width > limits.max_pixels:
            raise ConfigError(
                f"a picture of {width}x{height} px has {height * width} pixels, and this server draws at most "
                f"{limits.max_pixels}; ask for a smaller one"
            )
        if settings.steps > limits.max_steps:
            raise ConfigError(f"steps must be at most {limits.max_steps} on this server, not {settings.steps}")
        read_init_image(call.image, call.mask_image, strength, settings.size)
        if settings.guidance_scale == 1:  # neither has an effect then
            settings = attrs.evolve(settings, negative_prompts=None, guidance_interval=(0.0, 1.0))
        return settings

    def _sampler_name(self, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            return str(self._catalog.find("sampler", name).name)
        except LensError as error:
            raise ConfigError(readers.one_line(error)) from error

    def _checked_loras(self, loras: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
        for name, weight in loras:
            if name not in self.loras:
                known = did_you_mean(name[:80], self.loras) if self.loras else " This server offers none."
                raise ConfigError(f"no LoRA is called {readers.shown(name)}.{known}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"the weight of the LoRA {readers.shown(name)} must be a finite number")
        if len({name for name, _ in loras}) != len(loras):
            raise ConfigError("a LoRA is named twice; name each once, with its weight")
        return tuple((name, float(weight)) for name, weight in loras)

    def _on_cancel(self, job: Job) -> None:
        """Let a job that waits go at once; the thread lets go of one that is drawn, after its step."""
        with self._change:
            if job in self._jobs and not job.started:
                self._jobs.remove(job)
                self._finish(job, Cancelled())
                self._change.notify_all()

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next_batch():
            self._draw(batch)
            with self._change:
                for job in self._jobs:
                    if job.cancelled:  # of which pictures wait for a later batch
                        self._finish(job, Cancelled())
                self._jobs = [job for job in self._jobs if not job.finished]
                self._change.notify_all()

    def _next_batch(self) -> list[Unit]:
        """The pictures to draw next: of the oldest job, and of others that may be drawn with it. Empty: stop."""
        with self._change:
            self._change.wait_for(lambda: self._jobs or self._closing)
            batch: list[Unit] = []
            for job in self._jobs:
                if job.key == self._jobs[0].key:
                    room = self.limits.max_batch - len(batch)
                    batch += [Unit(job, index) for index in job.pending[:room]]
                    job.started |= bool(job.pending[:room])
                    del job.pending[:room]
            return batch

    def _draw(self, batch: list[Unit]) -> None:
        """Draw a batch. Where it fails, each of its jobs is tried by itself: one must not fail another."""
        jobs = list(dict.fromkeys(unit.job for unit in batch))
        begin = time.perf_counter()
        try:
            self._enter_state(jobs[0].key.state)
            self._call(batch)
        except AllCancelled:
            pass
        except BaseException as error:  # a panic of a Rust library is no Exception
            if len(jobs) > 1:
                for job in jobs:
                    self._draw([unit for unit in batch if unit.job is job])
                return
            fault = error if isinstance(error, Exception) else LensError(_line(error))
            self._finish(jobs[0], Failed(_line(error), fault))
        for job in jobs:
            if job.cancelled:
                self._finish(job, Cancelled())
        self.counters.drawing_seconds += time.perf_counter() - begin

    def _call(self, batch: list[Unit]) -> None:
        """One call of the pipeline."""
        begin = time.perf_counter()
        request, settings = batch[0].job.request, batch[0].job.settings
        live = LiveBatch(self._pipeline, batch, lambda job: self._finish(job, Cancelled()), self._count_step)
        negative = [unit.negative for unit in batch]
        try:
            with live.watching():
                result = self._pipeline(
                    [unit.job.request.prompt for unit in batch],
                    negative if any(negative) else None,
                    seed=[unit.seed for unit in batch],
                    callback_on_step_end=live.after_step,
                    **_arguments(settings, request.settings),
                )
        finally:
            self.counters.batches += 1  # counted before the clients hear of it
        share = (time.perf_counter() - begin) / len(batch)
        self.counters.seconds_per_image += 0.2 * (share - self.counters.seconds_per_image)
        for unit, image, prompt in zip(batch, result.images, result.prompts, strict=True):
            if unit.job.cancelled:
                continue
            facts = png_metadata.facts_of(prompt, unit.seed, {**result.settings, "negative_prompt": unit.negative})
            self.counters.images += 1
            if done := unit.job.add_image(unit.index, DrawnImage(image, unit.seed, facts)):
                self._finish(unit.job, done)

    def _count_step(self) -> None:
        self.counters.steps += 1

    def _finish(self, job: Job, event: Done | Failed | Cancelled) -> None:
        with self._change:  # counted before the client hears of it
            if job.finished:
                return
            job.pending.clear()
            self.counters.done += isinstance(event, Done)
            self.counters.failed += isinstance(event, Failed)
            self.counters.cancelled += isinstance(event, Cancelled)
            job.emit(event)

    def _enter_state(self, state: ModelState) -> None:
        """Give the pipeline the sampler and the LoRAs of a batch."""
        if state == self._state:
            return
        before, self._state = self._state, None
        pipeline = self._pipeline
        if before is None or before.sampler != state.sampler:
            version = pipeline.version  # stays: this is the checkpoint's own sampler, or one that the version names
            pipeline.put("sampler", *self._default_sampler)  # whose options the next one takes, not the last one's
            pipeline.version = version
            if state.sampler is not None:
                pipeline.use_sampler(state.sampler)
        if before is None or before.loras != state.loras:
            pipeline.unload_lora_weights()
            for path, weight in (*self._base_loras, *((self.loras[name], weight) for name, weight in state.loras)):
                pipeline.load_lora_weights(path, weight)
        self._state = state


def _check_text(name: str, text: Any, most: int) -> None:
    if text is None and name != "prompt":
        return
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a text, not {readers.shown(text)}")
    if len(text) > most:
        raise ConfigError(f"{name} has {len(text)} characters, and at most {most} are read; shorten it")
    if name == "prompt" and not text.strip():
        raise ConfigError("the prompt is empty; describe what to draw")
    try:
        readers.check_text(text)
    except ValueError as error:
        raise ConfigError(f"{name} {error}") from error


def _seeds(request: ImageRequest) -> tuple[int, ...]:
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    first = whole("seed", seed, 0, MAX_SEED - request.num_images + 1)  # the last picture's is MAX_SEED at most
    return tuple(first + i for i in range(request.num_images))


def _arguments(settings: GenerationSettings, wanted: GenerateRequest) -> dict[str, Any]:
    """The keyword arguments that all pictures of a batch share."""
    return {
        "height": settings.size[0],
        "width": settings.size[1],
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": settings.guidance_interval,
        "image": wanted.image,
        "mask_image": wanted.mask,
        "strength": wanted.strength,
    }


def _line(error: BaseException) -> str:
    """A failure in one line, for whoever sent the request."""
    if isinstance(error, LensError):
        return readers.one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "there is not enough memory; ask for a smaller picture, or for fewer"
    return (
        f"{type(error).__name__}: {readers.one_line(error)}; this is a fault of Lens or of a plugin, please report it"
    )
