"""A plugin written for the API `lens.v1`. Frozen: while v1 is supported, it must load; never edit it.

It implements every v1 hook, and imports whatever v1 promises to the authors of plugins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core import hookimpl
from lens_core.checkpoints.tensor_files import load_module, save_module
from lens_core.io.atomic_files import read_json, write_json
from lens_core.protocols import BaseMethod, dtype_of
from lens_core.types import (
    Batch,
    CheckpointError,
    ConfigError,
    LensError,
    Loss,
    Message,
    NumericalError,
    PictureOutcome,
    PictureRequest,
    PluginError,
    Prompt,
    Record,
    Score,
    Shard,
    SystemInfo,
    TextFeatures,
    did_you_mean,
    move,
)
from lens_core.validators import each, integer, listed, matching, one_of, optional, real, within

PROMISED = (
    CheckpointError, LensError, NumericalError, PluginError, Message, Shard, TextFeatures, did_you_mean, dtype_of,
    load_module, move, read_json, save_module, write_json, each, matching, one_of, optional, real, within,
)  # fmt: skip


@frozen
class Settings:
    size: int = field(default=1, validator=integer(at_least=1))  # px
    names: tuple[str, ...] = field(default=(), converter=listed)
    extra: dict[str, float] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.size > 100:
            raise ConfigError(f"fossil: size is {self.size}; it must be at most 100")


class Base:
    Config = Settings

    def __init__(self, config: Settings, pipeline: Any = None) -> None:
        self.config = config


class Weights(Base):
    def save(self, folder: Path) -> None:
        write_json(folder / "fossil.json", {})

    @classmethod
    def load(cls, folder: Path, config: Settings, dtype: Any = None) -> Any:
        return cls(config)


class FossilVAE(Weights):
    channels, downscale = 4, 16

    def encode(self, pixels: Any) -> Any:
        return pixels

    def decode(self, z: Any) -> Any:
        return z


class FossilEncoder(Weights):
    layers, width = 1, 8

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        raise NotImplementedError


class FossilBackbone(Weights):
    def forward(self, x: Any, t: Any, text: TextFeatures) -> Any:
        return x


class FossilSampler(Base):
    def times(self, size: tuple[int, int], steps: int) -> Any:
        return None

    def sample(self, velocity: Any, x: Any, steps: int, start: int = 0) -> Iterator[tuple[float, Any]]:
        yield 0.0, x


class FossilReward(Base):
    def score(self, images: Any, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", 1.0, {"whole": 1.0}, "seen") for _ in prompts]


class FossilReasoner(Base):
    def refine(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)


class FossilMethod(Base, BaseMethod):
    def trainable_modules(self) -> Mapping[str, Any]:
        return {}

    def steps(self, batches: Iterator[Batch], modules: Mapping[str, Any], rng: Any) -> Iterator[Sequence[Any]]:
        yield from ([b] for b in batches)

    def update_order(self, step: int) -> Sequence[str]:
        return ()

    def loss(self, module_name: str, modules: Mapping[str, Any], batch: Any, rng: Any) -> Loss:
        return Loss(batch, {"part": batch})

    def validate(self, batch: Batch, modules: Mapping[str, Any], rng: Any) -> dict[str, float]:
        return {"loss": 0.0}


class FossilDataset(Base):
    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        yield Batch(None, ("a caption",), (7,))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FossilCurator(Base):
    version = "1"
    columns = ("age",)

    def score(self, records: Sequence[Record]) -> dict[str, list[float]]:
        return {"age": [float(len(r.brief)) for r in records]}


class FossilBenchmark(Base):
    def prompts(self) -> list[Prompt]:
        return [Prompt("a trilobite", 1, "shells", {"count": 1})]

    def score(self, images: Any, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("abstain") for _ in prompts]


class FossilGenerator(Base):
    def describe(self) -> SystemInfo:
        return SystemInfo("fossil")

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        for request in requests:
            yield PictureOutcome(request, "refused", reason="extinct: nothing is drawn")


class FossilPerceiver(Base):
    perceives = "lines"

    def describe(self) -> Mapping[str, Any]:
        return {"model": "fossil", "revision": "1", "version": 1}

    def perceive(self, images: Sequence[Any], questions: Sequence[Any]) -> Sequence[Any]:
        return [[] for _ in images]

    def canary(self) -> str | None:
        return None


class FossilLLM(Base):
    def chat(self, messages: Sequence[Message]) -> str:
        return messages[-1].text


@hookimpl
def lens_vaes() -> dict[str, type[Any]]:
    return {"fossil": FossilVAE}


@hookimpl
def lens_text_encoders() -> dict[str, type[Any]]:
    return {"fossil": FossilEncoder}


@hookimpl
def lens_backbones() -> dict[str, type[Any]]:
    return {"fossil": FossilBackbone}


@hookimpl
def lens_samplers() -> dict[str, type[Any]]:
    return {"fossil": FossilSampler}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    return {"fossil": FossilReward}


@hookimpl
def lens_reasoners() -> dict[str, type[Any]]:
    return {"fossil": FossilReasoner}


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    return {"fossil": FossilMethod}


@hookimpl
def lens_datasets() -> dict[str, type[Any]]:
    return {"fossil": FossilDataset}


@hookimpl
def lens_curators() -> dict[str, type[Any]]:
    return {"fossil": FossilCurator}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    return {"fossil": FossilBenchmark}


@hookimpl
def lens_generators() -> dict[str, type[Any]]:
    return {"fossil": FossilGenerator}


@hookimpl
def lens_perceivers() -> dict[str, type[Any]]:
    return {"fossil": FossilPerceiver}


@hookimpl
def lens_llms() -> dict[str, type[Any]]:
    return {"fossil": FossilLLM}


@hookimpl
def lens_commands() -> dict[str, str]:
    return {"fossil": "lens_fossil:dig"}


def dig(depth: int = 1) -> None:
    """Dig for fossils."""


@hookimpl
def lens_pages() -> dict[str, str]:
    return {"fossil": "lens_fossil:show"}


@hookimpl
def lens_fetch(uri: str) -> Path | None:
    return Path("/fossils") if uri == "fossil:" else None


@hookimpl
def lens_describe(folder: Path) -> dict[str, Any] | None:
    return {"format": 1, "components": {}} if folder.name == "fossil" else None
