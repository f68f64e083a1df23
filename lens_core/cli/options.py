"""Parse the texts of options that several commands have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attrs import frozen
from cyclopts import Group, Parameter

from lens_core.arguments import parse_lora
from lens_core.io import readers
from lens_core.io.progress import print_line
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from lens_core.inference.requests import ModelRequest
    from lens_core.recipe import ComponentSpec

CORE_COMMANDS = ("generate", "train", "bench", "compare", "check", "push", "lora", "plugins")
"""Names that no plugin's command may take."""
MAX_STEPS = 10_000  # a typing error of a few digits would run for days


@frozen
class ModelOptions:
    """The options of every command that draws: which model, and how it is loaded.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], a backbone in one file, or tiny:, which is used if none is given.
    backbone
        A single .safetensors or .gguf file with the backbone, which replaces the model's own.
    text_encoder
        The same for the text encoder, or a folder with GPT-OSS.
    vae
        The same for the VAE.
    lora
        A LoRA file or folder, with an optional weight: PATH or PATH:0.8. May be given more than once.
    sampler
        Another sampler than the checkpoint's: euler, heun, dpmpp, euler_ancestral, or with options,
        '{use: euler, mu: 1.0}'.
    device
        auto, cpu, cuda, cuda:1 …; auto if not given.
    dtype
        auto (bfloat16 on GPUs, float32 on CPUs), bfloat16, float32; auto if not given.
    offload
        Offload plan: none, modulation, model, encoder-cpu, block; auto, which is used if none is given, takes the
        fastest that fits.
    prompt_cache
        A folder that keeps text features; for a prompt that is there the text encoder is not even read.
    reasoner
        Rewrites prompts before they are drawn: a name, a line of YAML, a YAML file, or a text file with its system
        prompt. None if not given.
    lossy_vae_tile
        Decode in overlapping tiles of this side in px, to save memory: the picture differs a little. Whole if none.
    """

    model: str | None = None
    backbone: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    lora: Annotated[list[str] | None, Parameter(negative="")] = None
    sampler: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    prompt_cache: Path | None = None
    reasoner: str | None = None
    lossy_vae_tile: int | None = None

    def request(self) -> ModelRequest:
        """What they ask for, as a script writes it."""
        from lens_core.inference.requests import ModelRequest

        return ModelRequest(
            self.model or "tiny:", self.backbone, self.text_encoder, self.vae, parse_loras(self.lora),
            parse_sampler(self.sampler), self.device or "auto", self.dtype or "auto",
            self.offload or "auto", self.prompt_cache, parse_reasoner(self.reasoner),
            self.lossy_vae_tile,
        )  # fmt: skip

    def generator_options(self) -> dict[str, Any]:
        """The same as options of the generator `pipeline`; None where an option is not given."""
        from lens_core.recipe import unstructure

        sampler, reasoner = parse_sampler(self.sampler), parse_reasoner(self.reasoner)
        paths = {name: getattr(self, name) for name in ("backbone", "text_encoder", "vae", "prompt_cache")}
        return {
            "model": self.model,
            "loras": [f"{path}:{weight:g}" for path, weight in parse_loras(self.lora)] or None,
            "sampler": None if sampler is None else unstructure(sampler),
            "reasoner": None if reasoner is None else unstructure(reasoner),
            **{name: None if path is None else str(path) for name, path in paths.items()},
            **{name: getattr(self, name) for name in ("device", "dtype", "offload", "lossy_vae_tile")},
        }


PROMPTS, MODEL, PICTURE, SAMPLING, INIT_IMAGE = (
    Group(name, sort_key=place)
    for place, name in enumerate(("Prompts and files", "Model", "Picture", "Sampling", "Init image"))
)
"""The groups of options in the help of commands that draw."""
ModelGroup = Annotated[ModelOptions, Parameter(name="*", group=MODEL)]
"""The type of a command's parameter that stands for all of these options."""
DEFAULT_MODEL = ModelOptions()


def print_to_terminal(line: str) -> None:
    """Print a line to stderr where that is a terminal, above the live lines that are there."""
    if sys.stderr.isatty():
        print_line(line)


def parse_loras(options: list[str] | None) -> tuple[tuple[Path, float], ...]:
    """PATH or PATH:WEIGHT, several times."""
    return tuple(parse_lora(text) for text in options or ())


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """HEIGHTxWIDTH in px."""
    if size is None:
        return None, None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and len(p) <= 5 and 0 < int(p) <= 16384 for p in parts):
        raise ConfigError(f"size {readers.shown(size)} must be HEIGHTxWIDTH in px, for example 128x160")
    return int(parts[0]), int(parts[1])


def parse_interval(text: str | None) -> tuple[float, float]:
    """LOW,HIGH in times."""
    try:
        low, high = (float(part) for part in (text or "0,1").split(","))
    except ValueError as error:
        raise ConfigError(
            f"guidance interval {readers.shown(text)} must be LOW,HIGH in times, for example 0.2,0.9"
        ) from error
    return low, high


def check_steps(steps: int | None) -> int | None:
    """A number of sampler steps that a command may ask for."""
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    if steps is not None and steps > MAX_STEPS:
        raise ConfigError(f"steps must be at most {MAX_STEPS}, not {steps}")
    return steps


def parse_sampler(text: str | None) -> ComponentSpec | None:
    """A sampler by name, or in a line of YAML with its options."""
    from lens_core.config import parse_use

    return parse_use(text) if text else None


def parse_reasoner(text: str | None) -> ComponentSpec | None:
    """A reasoner by name, in a line of YAML, in a YAML file, as a text file with its system prompt, or a checkpoint."""
    from lens_core.catalog import Catalog
    from lens_core.inference.reasoner_files import named_reasoner

    return None if text is None else named_reasoner(text, Catalog.installed())


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a UTF-8 file, one a line."""
    if (prompt is None) == (file is None):
        raise ConfigError("give one prompt, or a file of prompts with --prompts-file, one a line")
    if prompt is not None:
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what to draw")
        return [prompt]
    assert file is not None
    lines = [line.strip() for line in readers.lines(readers.read_text(file)) if line.strip()]
    if not lines:
        raise ConfigError(f"{file}: holds no prompt; write one a line")
    return lines
