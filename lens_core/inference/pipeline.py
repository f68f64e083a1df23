"""Prompt to picture: text encoder, sampler, guided velocity over the backbone, VAE."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from attrs import field, frozen
from torch import Tensor

from lens_core.attribution import building, check_fit, latents_of, text_of, times_of, trajectory_of
from lens_core.catalog import Catalog
from lens_core.flow import Velocity
from lens_core.inference import refinement, saving
from lens_core.inference.call_arguments import (
    CallArguments,
    GenerationSettings,
    make_generators,
    repeated_embeds,
    replace_latents,
    texts_of_embeds,
)
from lens_core.inference.guidance import DataEstimate, check_finite, guided_velocity
from lens_core.inference.image_to_image import InitImage, read_init_image
from lens_core.inference.loading import LoadOptions, read_checkpoint
from lens_core.inference.offload_plans import find_plan
from lens_core.inference.parts import (
    MODEL_PARTS,
    PIPELINE_PARTS,
    resolve_device,
    resolve_dtype,
)
from lens_core.inference.pipeline_parts import PipelineParts
from lens_core.inference.pixels import to_images, to_pil, to_pixels
from lens_core.inference.prompt_cache import CacheEntry, EncoderKey, PromptCache, weights_state
from lens_core.inference.sizes import resolve_sizes
from lens_core.io.progress import progress_bar
from lens_core.protocols import dtype_of
from lens_core.recipe import ComponentSpec, PipelineSpec, build, unstructure
from lens_core.types import ConfigError, Refinement, TextFeatures, move

if TYPE_CHECKING:
    from PIL.Image import Image


@frozen
class Result:
    """What a pipeline returns: `.images` (PIL pictures, or what `output_type` asked for), seeds, settings, and the
    prompts as they were asked and as they were drawn."""

    images: Any
    seeds: tuple[int | None, ...]
    settings: Mapping[str, Any] = field(factory=dict)
    prompts: tuple[Refinement, ...] = ()


class LensPipeline(PipelineParts):
    """A text-to-image model that draws: load it, save it, encode prompts, sample latents, decode them."""

    # ---- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        uri: str | Path,
        *,
        catalog: Catalog | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        offload: str | None = None,
        reasoner: Any = None,
        **options: Any,
    ) -> Self:
        """Read a checkpoint: a folder, a Hub id `org/name[@revision]`, a plugin's name such as `tiny:`, or one file.

        `dtype` defaults to float32 on CPUs and bfloat16 elsewhere. `offload` is a plan of `LensPipeline.offload`.
        `reasoner`: a component, a ComponentSpec or a name, which rewrites prompts before they are drawn.
        `options` are the fields of `lens_core.inference.loading.LoadOptions`: `parts`, `backbone`, `text_encoder`,
        `vae`, `torch_dtype`, `prompt_cache`, `verify`, `deferred`, `workload`. Raises CheckpointError or ConfigError.
        """
        chosen = LoadOptions.of(options)
        if offload not in (None, "auto"):
            find_plan(str(offload))
        catalog = catalog or Catalog.installed()
        where = resolve_device(device)
        cache = PromptCache(Path(chosen.prompt_cache).expanduser() if chosen.prompt_cache is not None else None)
        reasoner = refinement.make_reasoner(reasoner, catalog)  # before gigabytes are read
        read = read_checkpoint(uri, catalog, resolve_dtype(dtype or chosen.torch_dtype, where), chosen)
        pipeline = cls(presets=read.presets, specs=read.specs, info=read.info, catalog=catalog)
        pipeline.store, pipeline.prompt_cache = read.parts, cache
        pipeline._encoder_origin = read.encoder_origin
        pipeline._encoder_state = weights_state(read.parts.loaded["text_encoder"])
        pipeline.use_reasoner(reasoner)
        if chosen.sampler is not None:
            spec = ComponentSpec(chosen.sampler) if isinstance(chosen.sampler, str) else chosen.sampler
            pipeline.use_sampler(spec.use, **spec.options)
        if offload is None:
            return pipeline.to(where)
        pipeline.offload(offload, where, workload=chosen.workload(pipeline) if chosen.workload is not None else None)
        return pipeline

    @classmethod
    def from_parts(cls, parts: PipelineSpec, catalog: Catalog, deferred: Collection[str] = ()) -> Self:
        """Build what a recipe's `pipeline` describes: parts of a checkpoint, new parts by name, or both, in float32.

        Parts of a checkpoint that are `deferred`, or that a new part replaces, are not read.
        """
        parts = resolve_sizes(parts, catalog)
        deferred = {*deferred, *(kind for kind in MODEL_PARTS if getattr(parts, kind) is not None)}
        pipeline = (
            cls.from_pretrained(parts.start, catalog=catalog, dtype=torch.float32, device="cpu", deferred=deferred)
            if parts.start
            else cls(catalog=catalog)
        )
        for kind in PIPELINE_PARTS:
            spec = getattr(parts, kind)
            if spec is not None:
                spec = pipeline._with_kept_options(spec, catalog) if kind == "sampler" else spec
                name, component, config = build(catalog, kind, spec, f"$.pipeline.{kind}")
                with building(name):
                    setattr(pipeline, kind, component(config))
                pipeline.specs[kind] = ComponentSpec(name, unstructure(config))
        pipeline.use_reasoner(parts.reasoner)
        check_fit(pipeline.store.loaded["vae"], pipeline.store.loaded["text_encoder"], pipeline.backbone)
        wanted = {k: getattr(parts, k) for k in ("steps", "guidance_scale", "base_resolution")}
        pipeline.presets |= {k: v for k, v in wanted.items() if v is not None}
        names = sorted({spec.use.partition(":")[0] for spec in pipeline.specs.values()})
        pipeline.plugins = {n: v for n in names if (v := catalog.version(n))}
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers folder layout, a model card and `lens.json`. That comes last: without it nothing is read.
        A README.md that a person wrote or changed stays as it is."""
        saving.save_pretrained(self._content(), folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Put the checkpoint into the Hub's repository `repo_id`, made if need be, in one commit; returns its address.

        `token`: by default what `hf auth login` or HF_TOKEN gave. A card that a person wrote there stays. Raises
        CheckpointError, if `private` and the repository is public for one.
        """
        return saving.push_to_hub(self._content(), repo_id, private=private, token=token, message=commit_message)

    def _content(self) -> saving.CheckpointContent:
        parts = {kind: getattr(self, kind) for kind in PIPELINE_PARTS}
        provenance = self.provenance | self._loras.provenance(self.provenance)
        about = self.specs, self.presets, self.plugins, provenance, self.catalog, self.latent_preview
        return saving.CheckpointContent(parts, *about)

    # ---- prompts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> TextFeatures in the backbone's dtype, on the pipeline's device."""
        encoder = self.text_encoder
        with self._at_work("text_encoder"):
            text = text_of(encoder, prompts)
        return text.to(self.device, dtype_of(self.backbone))

    def refine(self, prompts: Sequence[str]) -> list[Refinement]:
        """What the pipeline's reasoner makes of prompts; without one, each stays as it is. Warns of answers that are
        not used."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._refined]
        if new:
            # An encoder that has not been read, because features are cached, is not read to check a length alone.
            answers = refinement.refine(self.reasoner, new, self.store.loaded["text_encoder"])
            kept = list(self._refined.items())[-refinement.MAX_IN_MEMORY :]
            self._refined = dict(kept) | {one.request: one for one in answers}
        return [self._refined[prompt] for prompt in prompts]

    def encode_once(self, prompts: Sequence[str]) -> tuple[TextFeatures, dict[str, Any]]:
        """Encode each prompt by itself, unless the cache holds it: (TextFeatures, what a picture must record).

        The features of a prompt are bit for bit those of `encode([prompt])`, whatever it stands beside.
        """
        entries = self.prompt_cache.find(prompts, reversed(self._encoder_keys()))
        if "text_encoder" in self.store.deferred and len(entries) < len(set(prompts)):
            self._read_deferred("text_encoder")  # which may change the plan, and with it the keys
            entries |= self.prompt_cache.find(prompts, reversed(self._encoder_keys()))
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in entries]
        if missing:
            encoder = self.text_encoder
            provenance = dict(encoder.provenance()) if hasattr(encoder, "provenance") else {}
            (key,) = self._encoder_keys()
            with self._at_work("text_encoder"):
                for prompt in missing:
                    entries[prompt] = CacheEntry(self.encode([prompt]).to("cpu"), provenance)
                    self.prompt_cache.put(prompt, key, entries[prompt])
        chosen = [entries[prompt] for prompt in prompts]
        return TextFeatures.cat([entry.text for entry in chosen]).to(self.device), dict(chosen[0].provenance)

    def _encoder_keys(self) -> list[EncoderKey]:
        """The keys under which features may be cached: where they are made is part of each. As long as the encoder
        has not been read there may be two, because `auto` may yet choose the CPU for it."""
        encoder, manager = self.store.loaded["text_encoder"], self.offload_manager
        state = weights_state(encoder) if encoder is not None else self._encoder_state
        persistent = bool(self._encoder_origin) and state == self._encoder_state
        kinds = ["cpu" if manager is not None and manager.on_host("text_encoder") else self.device.type]
        if encoder is None and manager is not None and manager.requested == "auto":
            kinds += ["cpu"]
        rest = "" if persistent else str(state)
        dtype = dtype_of(self.backbone)
        origins = [f"{self._encoder_origin} {dtype} {kind} {rest}" for kind in dict.fromkeys(kinds)]
        return [EncoderKey(origin, persistent) for origin in origins]

    def _encode_negative(self, prompts: Sequence[str] | None) -> TextFeatures | None:
        """Encode negative prompts; "" has no tokens."""
        if prompts is None:
            return None
        text, _ = self.encode_once(prompts)
        mask = move(host := text.known & torch.tensor([bool(p) for p in prompts])[:, None], text.mask.device)
        return TextFeatures(text.features * mask[:, None, :, None], mask, host)

    # ---- generation ---------------------------------------------------------------------------------------------

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        """Initial noise [B,C,h,w] float32, one generator a row, drawn packed as [h*w, C]: the reference's order."""
        shape = size[0] * size[1], self.vae.channels
        rows = [
            torch.randn(shape, generator=g, device=g.device, dtype=torch.float32).to(self.device) for g in generators
        ]
        return torch.stack(rows).transpose(1, 2).reshape(len(rows), self.vae.channels, *size)

    def velocity(
        self,
        text: TextFeatures,
        negative: TextFeatures | None,
        guidance_scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """(x, t) -> v, guided where low < t <= high: see `guided_velocity`."""
        return guided_velocity(self.backbone, text, negative, guidance_scale, interval)

    @torch.no_grad()
    def sample(
        self,
        text: TextFeatures,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        negative: TextFeatures | None = None,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        init: InitImage | None = None,
        draw: Callable[[], Tensor] | None = None,
    ) -> Generator[tuple[float, Tensor], None, None]:
        """(t, x) after each step, ending at t = 0. Raises NumericalError rather than go on with non-finite latents, on
        a GPU at the last step, which is the only one that waits for it."""
        velocity = self.velocity(text, negative, guidance_scale, interval)
        begin, start = noise, 0
        if init is not None:
            begin, start, velocity = init.start(self.sampler, noise, steps, velocity)
        velocity = velocity if self._estimate is None else self._estimate.following(velocity)
        if start == steps:  # strength 0: the picture as it is
            yield 0.0, begin
            return
        more: dict[str, Any] = {"start": start} if start else {}  # samplers that only begin at noise are samplers too
        more |= {"draw": draw} if getattr(self.sampler, "stochastic", False) else {}
        times = times_of(self.sampler, (noise.shape[-2], noise.shape[-1]), steps)[start:-1]
        finite: list[Tensor] = []
        with self._at_work("backbone"), self._precomputed_modulation(times):
            for step, (t, x) in enumerate(trajectory_of(self.sampler, velocity, begin, steps, **more), start + 1):
                finite.append(torch.isfinite(x).all())
                if x.device.type == "cpu" or step == steps:  # elsewhere the answer would have to be waited for
                    check_finite(finite, step, steps, dtype_of(self.backbone))
                yield t, init.restore_latents(x) if init is not None and step == steps else x

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> pixels [B,3,H,W], in the VAE's dtype."""
        with self._at_work("vae"):
            return self._pixels(z.to(dtype_of(self.vae)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: TextFeatures | None = None,
        negative_prompt_embeds: TextFeatures | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        base_resolution: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        image: Image | Any = None,
        mask_image: Image | Any = None,
        strength: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Any] | None = None,
    ) -> Result:
        """Draw. Image i of a call with `seed=s` has the seed s + i, and is the picture that `seed=s + i` alone draws.

        `seeds` of the result says which seed alone draws image i; None where none does: from `latents`, or where a
        generator had been drawn from before, as for all but the first picture of a single one.

        `prompt_embeds`, `negative_prompt_embeds`: what `encode_prompt` returned, instead of the texts.
        `image`: a picture (PIL, path, array or tensor) to start from, in the size of the result unless `height` and
        `width` ask for another;
        `strength` in [0, 1]: how much of it goes (0.6 by default, 1 with a mask); `mask_image`: white is repainted,
        all else stays as it is. `guidance_interval` (low, high): guidance is at work where low < t <= high alone.
        `callback_on_step_end(pipeline, step, t, {"latents": x, "denoised": z})`: if it returns {"latents": …}, sampling
        goes on there. `z` are the finished latents as they look now; `pipeline.preview` makes small pictures of them.
        `output_type`: "pil", "pt" (uint8 [B,3,H,W]), "np" (uint8 [B,H,W,3]) or "latent" ([B,C,h,w]).
        Raises ConfigError for sizes, counts and types; NumericalError for non-finite latents; warns of what has no
        effect.
        """
        self.store.require_all()
        arguments = CallArguments(
            prompt=prompt if prompt_embeds is None else texts_of_embeds(prompt, prompt_embeds),
            negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds, image=image,
            mask_image=mask_image, height=height, width=width, aspect_ratio=aspect_ratio, callback=callback_on_step_end,
            base_resolution=base_resolution, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt, guidance_interval=guidance_interval, output_type=output_type,
        )  # fmt: skip
        settings = arguments.settings(self.presets, self.vae.downscale)
        init = self._init_image(arguments.image, arguments.mask_image, strength, settings.size)
        arguments.warn_of_no_effect(settings.guidance_scale)
        generators, seeds = make_generators(generator, seed, len(settings.prompts))
        where = self.device, dtype_of(self.backbone)
        if prompt_embeds is None:
            prompts = self.refine(settings.prompts)
            text, provenance = self.encode_once([prompt.text for prompt in prompts])
        else:
            prompts, provenance = [Refinement("", "")] * len(settings.prompts), {}
            text = repeated_embeds("prompt_embeds", prompt_embeds, settings, num_images_per_prompt).to(*where)
        negative = self._encode_negative(settings.negative_prompts)
        if negative_prompt_embeds is not None and settings.guidance_scale != 1:
            name, each = "negative_prompt_embeds", num_images_per_prompt
            negative = repeated_embeds(name, negative_prompt_embeds, settings, each).to(*where)
        x = self._initial_noise(latents, generators, settings.latent_size)
        self._estimate = estimate = None if callback_on_step_end is None else DataEstimate()
        steps = self.sample(
            text, x, settings.steps, settings.guidance_scale, negative,
            interval=settings.guidance_interval, init=init,
            draw=lambda: self.noise(generators, settings.latent_size),
        )  # fmt: skip
        # Closed at once after an error: its traceback would keep the generator, and weights on the device, alive.
        with contextlib.closing(steps), progress_bar(settings.steps, "step", **self.progress_bar_config) as bar:
            for step, (t, x) in enumerate(steps):
                if callback_on_step_end is not None and estimate is not None:
                    values = {"latents": x, "denoised": estimate.data(t, x)}
                    replace_latents(x, callback_on_step_end(self, step, t, values))
                bar.update()
        seeds = seeds if latents is None else (None,) * len(seeds)  # which decide nothing then
        recorded = self._metadata(arguments, settings, init) | provenance
        return Result(self._output(x, init, output_type), seeds, recorded, tuple(prompts))

    def _init_image(
        self, image: Image | None, mask: Image | None, strength: float | None, size: tuple[int, int]
    ) -> InitImage | None:
        """The init image, resized to `size` (height, width) px and encoded, or None."""
        read = read_init_image(image, mask, strength, size)
        if read is None:
            return None
        picture, share, repainted = read
        pixels = to_pixels(picture).to(self.device, dtype_of(self.vae))
        with self._at_work("vae"):
            return InitImage(picture, latents_of(self.vae, pixels).float(), share, repainted)

    def _initial_noise(self, latents: Any, generators: list[torch.Generator], size: tuple[int, int]) -> Tensor:
        """`latents`, checked, or new noise: [B,C,h,w] float32."""
        if latents is None:
            return self.noise(generators, size)
        if not isinstance(latents, Tensor):
            raise ConfigError(f"latents must be a tensor, not {type(latents).__name__}")
        expected = [len(generators), self.vae.channels, *size]
        if list(latents.shape) != expected:
            raise ConfigError(f"latents must be {expected}, not {list(latents.shape)}")
        return latents.to(self.device, torch.float32)

    def _output(self, x: Tensor, init: InitImage | None, output_type: str) -> Any:
        """Finished latents as `output_type`."""
        if output_type == "latent":
            return x
        images = to_images(self.decode(x))
        images = init.restore_pixels(images) if init is not None else images
        if output_type == "np":
            return images.permute(0, 2, 3, 1).cpu().numpy()
        return images if output_type == "pt" else to_pil(images)

    def _metadata(
        self, arguments: CallArguments, settings: GenerationSettings, init: InitImage | None
    ) -> dict[str, Any]:
        """What a result records, so that it can be drawn again."""
        interval = settings.guidance_interval
        return {
            "height": settings.size[0], "width": settings.size[1], "steps": settings.steps,
            "guidance_scale": settings.guidance_scale, "negative_prompt": arguments.negative_prompt or "",
            "model": self.source, "model_hash": self.version, "dtype": self.dtype,
            **({"sampler": unstructure(self.specs["sampler"])} if "sampler" in self.specs else {}),
            **({"guidance_interval": list(interval)} if interval != (0, 1) else {}),
            **({"lossy_vae_tile": self.lossy_vae_tile} if self.lossy_vae_tile is not None else {}),
            **(init.metadata() if init is not None else {}),
            **self._loras.facts(),
            **({"reasoner": refinement.provenance(self.reasoner)} if self.reasoner is not None else {}),
        }  # fmt: skip
