"""Recipes: what a training run is, as frozen attrs objects, and how a YAML file becomes one with every problem at once.

A component is named by `use`; its other keys are the fields of its Config: `{use: flux2, latent_channels: 8}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, WrongType, as_use, options, parse_use, structure, unstructure
from lens_core.io import readers
from lens_core.io.readers import shown
from lens_core.types import ConfigError, LensError
from lens_core.validators import GUIDANCE, PIXELS, SEED, STEPS, each, integer, one_of, optional, real, text, within

LIKE = "like"
"""The option by which a part of the pipeline takes its sizes from the start checkpoint, or from the parts beside it."""
LIKES = ("start", "neighbours")
SIZED = ("vae", "text_encoder", "backbone")  # the parts that have it

__all__ = [
    "LIKE",
    "ComponentSpec",
    "Evaluation",
    "LoraSpec",
    "PipelineSpec",
    "Recipe",
    "Training",
    "build",
    "options",
    "parse_use",
    "read_recipe",
    "structure",
    "unstructure",
]  # fmt: skip


@frozen
class PipelineSpec:
    """The pipeline that a recipe starts from: a checkpoint, parts by name, or a checkpoint with parts replaced."""

    start: str | None = field(default=None, validator=optional(text()))  # checkpoint URI
    vae: ComponentSpec | None = None
    text_encoder: ComponentSpec | None = None
    backbone: ComponentSpec | None = None
    sampler: ComponentSpec | None = None
    reasoner: ComponentSpec | None = None  # rewrites the prompts of evaluations; no checkpoint holds it
    # Presets that the checkpoint will carry; None: those of `start`.
    guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
    steps: int | None = field(default=None, validator=optional(STEPS))
    # px, side of the square that an aspect ratio keeps the area of
    base_resolution: int | None = field(default=None, validator=optional(PIXELS))


@frozen
class LoraSpec:
    """LoRA on one trainable module: a low-rank matrix learns beside each target layer, which itself stays frozen."""

    rank: int = field(default=16, validator=integer(at_least=1, at_most=2**16))
    scale: float = field(default=1.0, validator=real(above=0))  # alpha / rank, which multiplies the adapter
    targets: tuple[str, ...] = ()  # ends of the dotted names of linear layers, such as attn.img_qkv; none: all of them


@frozen
class Training:
    """What the loop does around a method."""

    steps: int = field(validator=integer(at_least=1))  # optimizer steps in all
    lr: float = field(default=1e-4, validator=real(at_least=0))
    # muon: Muon for the weight matrices of repeated blocks, AdamW for all other weights, at the same lr.
    optimizer: str = field(default="adamw", validator=one_of("adamw", "muon"))
    # By trainable module: what multiplies its lr; 1 by default.
    lr_multipliers: dict[str, float] = field(factory=dict, validator=each(real(at_least=0)))
    warmup: int = field(default=0, validator=integer(at_least=0))  # steps of linear warm-up
    # Share of the run, at its end, over which lr falls to 0.
    lr_decay_fraction: float = field(default=0.0, validator=within(0, 1))
    lr_schedule: str = field(default="linear", validator=one_of("linear", "cosine"))  # how it falls
    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=each(real(at_least=0, below=1)))
    weight_decay: float = field(default=0.0, validator=real(at_least=0))
    max_grad_norm: float = field(default=1.0, validator=real(at_least=0))  # largest gradient norm; 0 does not clip
    # Decay of the weights' moving average, which is what is saved; 0 keeps none.
    ema_decay: float = field(default=0.0, validator=real(at_least=0, below=1))
    # Parts that each batch is split into, each with its own noise; at least one a process.
    micro_batches: int = field(default=1, validator=integer(at_least=1, at_most=2**16))
    # Processes that share one copy of each module's weights, moments and averages (FSDP2); 0: all; 1: no sharding.
    fsdp_shards: int = field(default=1, validator=integer(at_least=0, at_most=2**16))
    precision: str = field(default="fp32", validator=one_of("fp32", "bf16"))  # bf16: autocast over fp32 master weights
    compile: bool = False  # torch.compile each trainable module; needs a C++ compiler on CPUs
    activation_checkpointing: bool = (
        False  # compute activations again in the backward pass: less memory, a third more time
    )
    save_every: int = field(default=500, validator=integer(at_least=1))  # steps between checkpoints
    keep_checkpoints: int = field(default=2, validator=integer(at_least=1))  # checkpoints kept
    log_every: int = field(default=20, validator=integer(at_least=1))  # steps between log lines
    # Skipped steps in a row before the run stops; those that are not finite are skipped.
    max_skipped_steps: int = field(default=5, validator=integer(at_least=1))
    # Times the running median from which a loss or a gradient's norm is skipped as well; 0: never.
    spike: float = field(default=0.0, validator=real(above=1, zero=True))
    trackers: tuple[str, ...] = ()  # tensorboard, trackio, wandb …: where lines of the log go besides log.jsonl
    export_dtype: str = field(default="fp32", validator=one_of("fp32", "bf16"))  # how the finished model is stored
    threads: int = field(default=0, validator=integer(at_least=0, at_most=1024))  # torch threads; 0: torch's choice
    lora: dict[str, LoraSpec] = field(factory=dict)  # by trainable module; others are trained in full


@frozen
class Evaluation:
    """What is measured during training, with the weights that would be exported. It never influences training."""

    # Steps between evaluations; the start and the end are evaluated too.
    every: int = field(validator=integer(at_least=1))
    # Drawn into samples/step-N.png; picture i has the seed `seed + i`.
    prompts: tuple[str, ...] = field(default=(), validator=each(text()))
    benchmarks: tuple[ComponentSpec, ...] = ()  # generated for and scored, never trained on
    validation: ComponentSpec | None = None  # a dataset that is not learned from, for methods that can validate
    validation_batches: int = field(default=8, validator=integer(at_least=1))  # of it
    seed: int = field(default=0, validator=SEED)
    # Height, width px of what is drawn; None: the preset.
    size: tuple[int, int] | None = field(default=None, validator=optional(each(PIXELS)))
    steps: int | None = field(default=None, validator=optional(STEPS))  # of the sampler; None: the preset
    guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))  # None: the preset
    batch_size: int = field(default=16, validator=integer(at_least=1, at_most=2**16))  # pictures drawn at once
    keep_best: str = ""  # the benchmark by whose overall score the weights are chosen that are exported; "": the last
    # Early stopping: evaluations without a better score after which the run ends; 0: never.
    patience: int = field(default=0, validator=integer(at_least=0))

    def __attrs_post_init__(self) -> None:
        problems = []
        if not (self.prompts or self.benchmarks or self.validation):
            problems.append("evaluates nothing; name prompts, benchmarks or validation")
        if self.keep_best and self.keep_best not in self.named_benchmarks():
            named = ", ".join(self.named_benchmarks()) or "none"
            problems.append(
                f"keep_best is {shown(self.keep_best)}, which is no benchmark of this section; there is {named}"
            )
        if self.patience and not self.keep_best:
            problems.append("patience waits for a better score; name its benchmark in keep_best")
        if problems:
            raise ConfigError(problems)

    def named_benchmarks(self) -> dict[str, ComponentSpec]:
        """The benchmarks by the names they are logged under: their own, and a number where one is there twice."""
        named: dict[str, ComponentSpec] = {}
        for i, use in enumerate(self.benchmarks):
            name = use.use.rpartition(":")[2]
            named[f"{name}_{i}" if name in named else name] = use
        return named


@frozen
class Recipe:
    """One training run."""

    method: ComponentSpec
    train: Training
    dataset: ComponentSpec | None = None  # where its method reads one
    pipeline: PipelineSpec = field(factory=PipelineSpec)
    seed: int = field(default=0, validator=SEED)
    evaluation: Evaluation | None = None


def build(catalog: Catalog, kind: str, use: ComponentSpec, path: str = "$") -> tuple[str, type[Any], Any]:
    """(qualified name, class, config) of the component that `use` names, its options checked.

    A config that names components itself tells them: `uses()` yields (path in it, kind, use), and they are checked too.
    """
    try:
        entry = catalog.find(kind, use.use)
    except LensError as error:
        raise ConfigError(f"{path}: {error}") from error
    config = structure(entry.cls.Config, use.options, path)
    problems: list[str] = []
    for place, inner, named in getattr(config, "uses", tuple)():
        try:
            build(catalog, inner, named, f"{path}.{place}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return entry.name, entry.cls, config


def _check_like(catalog: Catalog, kind: str, spec: ComponentSpec, path: str) -> None:
    """Check a part that takes its sizes from elsewhere: `like`, and each option that is written, by itself."""
    if spec.options[LIKE] not in LIKES:
        raise ConfigError(f"{path}.{LIKE}: must be {' or '.join(LIKES)}, not {shown(spec.options[LIKE])}")
    written = ComponentSpec(spec.use, {k: v for k, v in spec.options.items() if k != LIKE})
    try:
        build(catalog, kind, written, path)
    except ConfigError as error:
        written_paths = tuple(f"{path}.{name}" for name in written.options)
        problems = [p for p in error.problems if p.startswith(written_paths)]
        if problems:
            raise ConfigError(problems) from error


def read_recipe(path: Path, catalog: Catalog, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, checked whole: its own fields and the options of every component it names.

    `changes` are PATH=VALUE, as in `method.gan=0`, with values as YAML has them; they count as if the file said so.
    """
    data, problems = readers.read_yaml(path, missing="there is no such recipe")
    for change in changes:
        problems += change_data(data, change)
    recipe: Recipe | None = None
    try:
        recipe = structure(Recipe, data)
    except ConfigError as error:
        problems += error.problems
    for kind, value, where in _named(data if isinstance(data, Mapping) else {}):
        try:
            spec = as_use(value, None)
            check = _check_like if kind in SIZED and LIKE in spec.options else build
            check(catalog, kind, spec, where)
        except ConfigError as error:
            problems += error.problems
        except WrongType:
            pass  # reported above
    if problems or recipe is None:
        raise ConfigError([f"{path}: {p}" for p in problems])
    return recipe


def change_data(data: Any, change: str) -> Iterator[str]:
    """Put PATH=VALUE into the data of a recipe, or raise with the reason."""
    path, sign, text = change.partition("=")
    *way, last = path.strip().split(".")
    if not sign or not all([*way, last]):
        yield f"{shown(change)} is no change of a recipe; write PATH=VALUE, method.gan=0 for instance"
        return
    try:
        value, twice = readers.parse_yaml(text)
    except ValueError as error:
        yield f"{shown(change)}: the value of {path.strip()} cannot be read as YAML: {error}"
        return
    yield from twice
    here = data
    for step in way:
        inner = here.get(step, {}) if isinstance(here, dict) else None
        if isinstance(inner, dict | str):  # a component without options, or what an alias may have put elsewhere too
            inner = here[step] = {"use": inner} if isinstance(inner, str) else dict(inner)
        here = inner
    if isinstance(here, dict):
        here[last] = value
    else:
        yield f"{shown(change)}: {'.'.join(way) or 'the recipe'} is no section, so nothing in it can be changed"


def _named(data: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    inner, evaluation = (v if isinstance(v, Mapping) else {} for v in (data.get("pipeline"), data.get("evaluation")))
    components = [(k, data[k], f"$.{k}") for k in ("method", "dataset") if k in data]
    components += [
        (k, inner[k], f"$.pipeline.{k}")
        for k in ("vae", "text_encoder", "backbone", "sampler", "reasoner")
        if inner.get(k) is not None
    ]
    benchmarks = evaluation.get("benchmarks")
    for i, use in enumerate(benchmarks if isinstance(benchmarks, list) else ()):
        components.append(("benchmark", use, f"$.evaluation.benchmarks[{i}]"))
    held = evaluation.get("validation")
    return [*components, ("dataset", held, "$.evaluation.validation")] if held is not None else components
