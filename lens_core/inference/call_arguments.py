"""What a call of the pipeline asks for: its arguments, validated, and the settings that follow from them."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from lens_core.arguments import checked_interval, number, texts, whole
from lens_core.inference.picture_arguments import as_picture
from lens_core.io.images import to_rgb
from lens_core.io.readers import shown
from lens_core.types import ConfigError, TextFeatures

MAX_SIDE = 16384
"""The longest side of a picture, px."""
MAX_COUNT = 2**16
"""The most steps, and the most pictures a prompt."""
MAX_SEED = 2**63 - 1
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


def _prompts(value: Any) -> list[str]:
    prompts = texts("prompt", value)
    if not prompts:
        raise ConfigError("there is no prompt")
    return prompts


def _negative(value: Any) -> str | list[str] | None:
    if value is not None:
        texts("negative_prompt", value)
    return value if value is None or isinstance(value, str) else list(value)


def _output_type(value: Any) -> Any:
    if value not in OUTPUT_TYPES:
        raise ConfigError(f"output_type must be pil, pt, np or latent, not {value!r}")
    return value


def _count(value: Any) -> int:
    return whole("num_images_per_prompt", value, 1, MAX_COUNT)


def _image(value: Any) -> Any:
    return as_picture("image", value)


def _mask_image(value: Any) -> Any:
    return as_picture("mask_image", value)


def _steps(value: Any) -> int | None:
    return None if value is None else whole("num_inference_steps", value, 1, MAX_COUNT)


def _callback(value: Any) -> Any:
    if value is not None and not callable(value):
        raise ConfigError(f"callback_on_step_end must be a function of (pipeline, step, t, values), not {shown(value)}")
    return value


def _scale(value: Any) -> float | None:
    return None if value is None else number("guidance_scale", value, -(2**16), 2**16)


@frozen(kw_only=True)
class CallArguments:
    """The arguments of `LensPipeline.__call__` that do not depend on the model. Raises ConfigError."""

    output_type: str = field(default="pil", converter=_output_type)
    prompt: list[str] = field(converter=_prompts)
    negative_prompt: str | list[str] | None = field(default=None, converter=_negative)
    num_images_per_prompt: int = field(default=1, converter=_count)
    num_inference_steps: int | None = field(default=None, converter=_steps)
    guidance_scale: float | None = field(default=None, converter=_scale)
    guidance_interval: tuple[float, float] = field(default=(0.0, 1.0), converter=checked_interval)
    image: Any = field(default=None, converter=_image)
    mask_image: Any = field(default=None, converter=_mask_image)
    height: int | None = None
    width: int | None = None
    aspect_ratio: str | None = None
    base_resolution: int | None = None
    callback: Any = field(default=None, converter=_callback)
    negative_prompt_embeds: Any = None  # instead of the text

    def __attrs_post_init__(self) -> None:
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ConfigError("give a negative_prompt or negative_prompt_embeds, not both")

    def settings(self, presets: Mapping[str, Any], grid: int) -> GenerationSettings:
        """Complete the arguments with a model's presets. `grid`: px that a latent cell is wide."""
        height, width = self.height, self.width
        if self.image is not None and height is None and width is None and self.aspect_ratio is None:
            width, height = to_rgb(self.image).size
        steps, scale = self.num_inference_steps, self.guidance_scale
        scale = _scale(presets["guidance_scale"]) if scale is None else scale
        prompts = tuple(text for text in self.prompt for _ in range(self.num_images_per_prompt))
        assert scale is not None
        return GenerationSettings(
            prompts=prompts,
            negative_prompts=self._negative_prompts(len(prompts)) if scale != 1.0 else None,
            size=picture_size(presets, grid, height, width, self.aspect_ratio, self.base_resolution),
            grid=grid,
            steps=whole("num_inference_steps", presets["steps"], 1, MAX_COUNT) if steps is None else steps,
            guidance_scale=scale,
            guidance_interval=self.guidance_interval,
        )

    def _negative_prompts(self, count: int) -> tuple[str, ...] | None:
        """One for each picture, or None where there is nothing to avoid."""
        if not self.negative_prompt:
            return None
        negative = [self.negative_prompt] * count if isinstance(self.negative_prompt, str) else self.negative_prompt
        if len(negative) == count:
            return tuple(negative)
        if len(negative) != count // self.num_images_per_prompt:
            raise ConfigError(f"{len(negative)} negative prompts do not fit {count} pictures; give one, or one each")
        return tuple(text for text in negative for _ in range(self.num_images_per_prompt))

    def warn_of_no_effect(self, guidance_scale: float) -> None:
        """Warn the caller of the pipeline of arguments that change nothing."""
        unused = [
            ("a negative prompt", any(self.negative_prompt or ()) or self.negative_prompt_embeds is not None),
            ("a guidance interval", self.guidance_interval != (0, 1)),
        ]
        for name in (name for name, present in unused if present and guidance_scale == 1.0):
            warnings.warn(f"{name} has no effect at guidance 1; give a guidance scale above 1", stacklevel=4)
        sized = (
            self.height is not None or self.width is not None or (self.image is not None and self.aspect_ratio is None)
        )
        if self.base_resolution is not None and sized:
            warnings.warn("a base resolution has no effect beside a size or a picture; give one of them", stacklevel=4)


@frozen(kw_only=True)
class GenerationSettings:
    """All that decides a picture besides the model and the noise, one prompt for each picture. `size`: (h, w) in px."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    size: tuple[int, int]
    grid: int
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent cells."""
        return self.size[0] // self.grid, self.size[1] // self.grid


def picture_size(
    presets: Mapping[str, Any],
    grid: int,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: str | None = None,
    base_resolution: int | None = None,
) -> tuple[int, int]:
    """(height, width) in px: as given, or the preset bucket for width:height, or the nearest on the VAE's grid."""
    if height is not None or width is not None:
        if aspect_ratio is not None:
            raise ConfigError("give height and width, or an aspect ratio, not both")
        sides = {
            name: whole(name, side, -MAX_SIDE, MAX_SIDE)
            for name, side in (("height", height), ("width", width))
            if side is not None
        }
        for name, side in sides.items():
            if side < grid or side % grid:
                near = max(grid, round(side / grid) * grid)
                raise ConfigError(f"{name} {side} is not a multiple of {grid} px, the VAE's grid; use {near}")
        return sides.get("height", side), sides.get("width", side)  # one side alone: a square
    wanted = presets.get("base_resolution", 1024) if base_resolution is None else base_resolution
    base = whole("base_resolution", wanted, 1, MAX_SIDE)
    if aspect_ratio is not None and not isinstance(aspect_ratio, str):
        raise ConfigError(f'aspect_ratio must be a text, width:height, such as "3:2", not {shown(aspect_ratio)}')
    ratio = "1:1" if aspect_ratio is None else aspect_ratio
    buckets = presets.get("sizes", {}).get(str(base), {})
    if ratio in buckets:
        return int(buckets[ratio][0]), int(buckets[ratio][1])
    try:
        across, down = (float(p) for p in ratio.split(":"))
        shape = math.sqrt(across / down)
        if not 0.1 <= shape * shape <= 10:
            raise ValueError
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"aspect ratio {ratio!r} must be width:height between 1:10 and 10:1, such as 3:2") from error
    return max(grid, round(base / shape / grid) * grid), max(grid, round(base * shape / grid) * grid)


def texts_of_embeds(prompt: Any, embeds: Any) -> list[str]:
    """Empty texts in the place of prompts that were encoded already, one a row. Raises ConfigError beside a prompt."""
    if prompt is not None:
        raise ConfigError("give a prompt or prompt_embeds, not both")
    return [""] * len(getattr(embeds, "mask", [""]))


def repeated_embeds(name: str, embeds: Any, settings: GenerationSettings, each: int) -> TextFeatures:
    """Features that a caller computed, `each` row as often as its prompt has pictures. Raises ConfigError."""
    if not isinstance(embeds, TextFeatures):
        raise ConfigError(f"{name} must be what encode_prompt returned, not {type(embeds).__name__}")
    rows = [row for row in range(len(embeds.mask)) for _ in range(each)]
    if len(rows) != len(settings.prompts):
        raise ConfigError(f"{name} has {len(embeds.mask)} rows for {len(settings.prompts) // each} prompts")
    return embeds[rows]


def replace_latents(x: Tensor, answer: Any) -> None:
    """Write the latents that a callback returned, {"latents": tensor}, into those that sampling goes on with.

    Raises ConfigError where they are no tensor of the same shape.
    """
    new = answer.get("latents") if isinstance(answer, Mapping) else None
    if new is None or new is x:
        return
    if not isinstance(new, Tensor) or new.shape != x.shape:
        what = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ConfigError(f"callback_on_step_end returned latents {what}; they must be a tensor {list(x.shape)}")
    x.copy_(new)


def make_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | Sequence[int] | None, count: int
) -> tuple[list[torch.Generator], tuple[int | None, ...]]:
    """One generator for each picture, and the seed that alone gives it its noise, or None. Raises ConfigError."""
    if generator is None:
        seeds = _seeds(seed, count)
        return [torch.Generator().manual_seed(s) for s in seeds], seeds
    if seed is not None:
        raise ConfigError("give a generator or a seed, not both")
    listed = generator if isinstance(generator, Iterable) else [generator]
    several = [generator] * count if isinstance(generator, torch.Generator) else list(listed)
    if any(not isinstance(g, torch.Generator) for g in several):
        raise ConfigError(f"generator must be a torch.Generator, or a list of them, not {shown(generator)}")
    if len(several) != count:
        raise ConfigError(f"{len(several)} generators do not fit {count} pictures; give one, or one each")
    # A seed stands for the noise only if nothing has been drawn since, neither before the call nor for a picture of it.
    fresh = [
        g.device.type == "cpu" and _is_fresh(g) and all(g is not h for h in several[:i]) for i, g in enumerate(several)
    ]
    return several, tuple(g.initial_seed() if new else None for g, new in zip(several, fresh, strict=True))


def _seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    seed = seed.tolist() if hasattr(seed, "tolist") else seed  # numpy's and torch's
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        seeds = tuple(whole("seed", s, 0, MAX_SEED) for s in seed)
    else:
        seeds = tuple(whole("seed", seed, 0, MAX_SEED) + i for i in range(count))
    if len(seeds) != count:
        raise ConfigError(f"{len(seeds)} seeds do not fit {count} pictures; give one, or one each")
    return seeds


def _is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn since it was seeded."""
    return torch.equal(generator.get_state(), torch.Generator().manual_seed(generator.initial_seed()).get_state())
