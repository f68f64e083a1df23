"""A plugin of toy components: every kind the pipeline and the loop need, in milliseconds and without diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from lens_core import flow, hookimpl
from lens_core.checkpoints.tensor_files import build_on_meta, load_module, read_weights, save_module
from lens_core.inference.pixels import to_pixels
from lens_core.recipe import ComponentSpec, PipelineSpec
from lens_core.types import Batch, ConfigError, Loss, Prompt, Score, TextFeatures

# A pipeline of all of them; and one whose width is not the default, so that a recipe that loses options shows.
PARTS = PipelineSpec(
    vae=ComponentSpec("blocks"),
    text_encoder=ComponentSpec("letters"),
    backbone=ComponentSpec("mixer"),
    sampler=ComponentSpec("even"),
)
NARROW = evolve(PARTS, backbone=ComponentSpec("mixer", {"width": 8}))


class Weights(nn.Module):
    folder: str

    @frozen
    class Config:
        pass

    def save(self, folder: Path) -> None:
        save_module(self, folder / self.folder)

    @classmethod
    def load(cls, folder: Path, config: Any, dtype: torch.dtype | None = None) -> Self:
        tensors = read_weights(folder / cls.folder)
        module = build_on_meta(lambda: cls(config), folder / "lens.json", 1, tensors)
        load_module(module, folder / cls.folder, dtype=dtype, tensors=tensors)
        return module


class Blocks(Weights):
    """A VAE of 16 px blocks: 3 colours and their mean."""

    folder, channels, downscale = "vae", 4, 16

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.5))

    def encode(self, pixels: Tensor) -> Tensor:
        z = nn.functional.avg_pool2d(pixels, 16)
        return torch.cat([z, z.mean(1, keepdim=True)], 1) / self.gain

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z[:, :3] * self.gain, scale_factor=16)


class Letters(Weights):
    """One vector a letter."""

    folder, layers, width = "text_encoder", 1, 8

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 8)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        codes = [torch.tensor(list(p.encode()), dtype=torch.long) for p in prompts]
        return TextFeatures.cat(
            [TextFeatures(self.table(c)[None, None], torch.ones(1, len(c), dtype=torch.bool)) for c in codes]
        )


class Mixer(Weights):
    """A velocity of the cell, the time and the mean letter. `calls` counts forward passes, `dtypes` what it saw."""

    folder = "transformer"

    @frozen
    class Config:
        width: int = 16  # hidden channels

        def __attrs_post_init__(self) -> None:
            if self.width < 1:
                raise ConfigError(f"width is {self.width}; it must be at least 1")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner, self.words, self.outer = (
            nn.Linear(5, config.width),
            nn.Linear(8, config.width),
            nn.Linear(config.width, 4),
        )
        self.calls: list[tuple[int, int]] = []  # batch and tokens of each forward pass

    @staticmethod
    def refuses(dtype: torch.dtype) -> str | None:
        return "the mixer overflows in float16; use bfloat16" if dtype == torch.float16 else None

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.calls.append((len(x), text.mask.shape[1]))
        time = t.to(x.dtype).view(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        cells = torch.cat([x, time], 1).movedim(1, -1)
        weight = text.mask[:, None, :, None].to(x.dtype)
        words = (text.features * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
        v: Tensor = self.outer(torch.tanh(self.inner(cells) + self.words(words)[:, None, None])).movedim(-1, 1)
        return v

    def packed(self, xs: Sequence[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        return [self(x[None], t[i : i + 1], text[i : i + 1])[0] for i, x in enumerate(xs)]


class Even:
    """Euler steps of equal length."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def sample(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int
    ) -> Iterator[tuple[float, Tensor]]:
        x = noise
        for i in range(steps):
            x = x - velocity(x, torch.full((len(x),), 1 - i / steps)) / steps
            yield 1 - (i + 1) / steps, x


class Squares:
    """Dataset: 16 px pictures of one colour, with its name."""

    @frozen
    class Config:
        batch: int = 4
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.config, self.served = config, 0

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        while True:
            rng = torch.Generator().manual_seed(self.config.seed + 1000 * self.served + rank)
            colours = torch.randint(3, (self.config.batch,), generator=rng)
            images = torch.zeros(self.config.batch, 3, 16, 16, dtype=torch.uint8)
            images[torch.arange(self.config.batch), colours] = 255
            self.served += 1
            yield Batch(images, tuple(("red", "green", "blue")[c] for c in colours))

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.served = state["served"]


class Fit:
    """Method: two trainable modules, updated in turn. `seen` records which parameters could learn at each loss."""

    @frozen
    class Config:
        bad: tuple[int, ...] = ()  # losses, counted from 0, that are NaN
        bad_role: str = "backbone"
        stop: int = -1  # the step after which `halt` is called

    halt: Callable[[], None] = staticmethod(lambda: None)
    seen: list[tuple[str, set[str]]]

    def __init__(self, config: Config, pipeline: Any) -> None:
        self.config, self.pipeline, self.count = config, pipeline, 0
        self.critic = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        Fit.seen = []

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return {"backbone": self.pipeline.backbone, "critic": self.critic}

    def steps(self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator) -> Iterator[Any]:
        for batch in batches:
            with torch.no_grad():  # which must be left before the yield
                z = self.pipeline.vae.encode(to_pixels(batch.images))
            yield [(z, self.pipeline.encode(batch.captions))]

    def update_order(self, step: int) -> Sequence[str]:
        return ("critic", "backbone") if step % 2 == 0 else ("backbone",)

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Any, rng: torch.Generator) -> Loss:
        Fit.seen.append((module_name, {r for r, n in modules.items() if any(p.requires_grad for p in n.parameters())}))
        z, text = batch
        if module_name == "critic":
            return Loss(modules["critic"](z.movedim(1, -1)).square().mean())
        noise, t = torch.randn(z.shape, generator=rng), torch.rand(len(z), generator=rng)
        error = (modules["backbone"](flow.mix(z, noise, t), t, text) - flow.velocity(z, noise)).square().mean()
        self.count += 1
        bad = self.count - 1 in self.config.bad
        return Loss(error * math.nan if bad else error, {"error": error.detach()})

    def after_step(self, step: int, modules: Mapping[str, nn.Module]) -> None:
        if step == self.config.stop:
            Fit.halt()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class Reds:
    """Benchmark: is it red? It abstains on what it was not asked to judge."""

    headline = ("red",)

    @frozen
    class Config:
        prompts: int = 4

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> Sequence[Prompt]:
        return [Prompt(f"red {i}", i, "red" if i % 2 == 0 else "other") for i in range(self.config.prompts)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Score]:
        red = images[:, 0].float().mean((1, 2)) > images[:, 1:].float().mean((1, 2, 3))
        return [
            Score("ok", float(r)) if p.task == "red" else Score("abstain") for r, p in zip(red, prompts, strict=True)
        ]


@hookimpl
def lens_vaes() -> dict[str, type[Any]]:
    return {"blocks": Blocks}


@hookimpl
def lens_text_encoders() -> dict[str, type[Any]]:
    return {"letters": Letters}


@hookimpl
def lens_backbones() -> dict[str, type[Any]]:
    return {"mixer": Mixer}


@hookimpl
def lens_samplers() -> dict[str, type[Any]]:
    return {"even": Even}


@hookimpl
def lens_datasets() -> dict[str, type[Any]]:
    return {"squares": Squares}


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    return {"fit": Fit}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    return {"reds": Reds}
