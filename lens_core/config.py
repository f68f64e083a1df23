"""Strict configuration: recipes and configs become frozen attrs objects, and all problems are told at once.

Unknown keys, wrong types and `"false"` for a bool are errors; `1e-4`, which YAML reads as a string, is a number.
A component is named by `use`; its other keys are the fields of its Config: `{use: flux2, latent_channels: 8}`.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs
from attrs import field, frozen
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError

from lens_core import reading
from lens_core.catalog import Catalog
from lens_core.reading import one_line, shown
from lens_core.types import ConfigError, LensError, did_you_mean
from lens_core.validators import (
    GUIDANCE,
    PIXELS,
    SEED,
    STEPS,
    RangeError,
    Rule,
    each,
    integer,
    one_of,
    optional,
    real,
    text,
    within,
)

T = TypeVar("T")


@frozen
class Use:
    """A named component with the options of its Config, as a recipe writes it."""

    use: str
    options: dict[str, Any] = field(factory=dict)


class _WrongType(ValueError):
    pass


def _exactly(kind: type[Any], words: str) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            colon = kind is str and isinstance(value, dict) and list(value.values()) == [None]
            name = str(next(iter(value)))[:80] if colon else ""
            hint = f'; put quotes around "{name}:", which YAML takes for a mapping' if colon else ""
            raise _WrongType(f"must be {words}, not {shown(value)}{hint}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    if type(value) not in (int, float):
        raise _WrongType(f"must be a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise _WrongType(f"must be a number of at most 1e308, not {shown(value)}") from error


def _use(value: Any, _: Any) -> Use:
    if isinstance(value, str):
        return Use(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("use"), str):
        raise _WrongType(f"must name a component (`flux2`, or `{{use: flux2, …}}`), not {shown(value)}")
    return Use(value["use"], {k: v for k, v in value.items() if k != "use"})


def parse_use(text: str) -> Use:
    """A component named in one line of YAML, as on a command line: `shapes`, or `{use: shapes, split: train}`."""
    try:
        value, problems = reading.parse_yaml(text)
        use = _use(value, None)
    except ValueError as error:  # no YAML, or what _use refuses
        raise ConfigError(f"{shown(text)[1:-1]}: {one_line(error)}") from error
    if problems:
        raise ConfigError([f"{shown(text)[1:-1]}: {problem}" for problem in problems])
    return use


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _tuple(value: Any, hint: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _WrongType(f"must be a list, not {shown(value)}")
    args = typing.get_args(hint)
    kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else list(args)
    if len(kinds) != len(value):
        raise _WrongType(f"must have {len(kinds)} items, not {len(value)}")
    return tuple(_CONVERTER.structure(v, k) for v, k in zip(value, kinds, strict=True))


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _optional(value: Any, hint: Any) -> Any:
    rest = [a for a in typing.get_args(hint) if a is not type(None)]
    if value is None:
        return None
    problems: list[Exception] = []
    for kind in rest:
        try:
            return _CONVERTER.structure(value, kind)
        except Exception as error:  # the next alternative may fit
            problems.append(error)
    raise problems[0]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _literal(value: Any, hint: Any) -> Any:
    allowed = typing.get_args(hint)
    if not any(type(value) is type(word) and value == word for word in allowed):
        raise _WrongType(f"must be {' or '.join(map(str, allowed))}, not {shown(value)}")
    return value


def _all_at_once(cls: type[Any]) -> Any:
    """How cattrs builds `cls`. Where a field is of a wrong type there is nothing to build, and the ranges of the other
    fields are checked one by one, so that their problems are raised together with it."""
    plain = cattrs.gen.make_dict_structure_fn(
        cls, _CONVERTER, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
    )

    def hook(data: Any, _: Any) -> Any:
        try:
            return plain(data, cls)
        except ClassValidationError as error:
            if any(isinstance(inner, ConfigError) and not _field(inner) for inner in error.exceptions):
                raise  # it was built, and refused its values itself
            failed = {_field(inner) for inner in error.exceptions}
            found: list[str] = []
            for a in attrs.fields(cls):
                if a.name in data and a.name not in failed and isinstance(a.validator, Rule):
                    found += a.validator.problems(_CONVERTER.structure(data[a.name], a.type), a.name)
            more = [RangeError(found)] if found else []
            raise ClassValidationError(error.message, [*error.exceptions, *more], cls) from error

    return hook


def _field(error: BaseException) -> str | None:
    """The field that cattrs was at."""
    note = next((n for n in getattr(error, "__notes__", []) if hasattr(n, "name")), None)
    return note.name if note is not None else None


_CONVERTER = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
_CONVERTER.register_structure_hook(bool, _exactly(bool, "true or false"))
_CONVERTER.register_structure_hook(int, _exactly(int, "a whole number"))
_CONVERTER.register_structure_hook(str, _exactly(str, "text"))
_CONVERTER.register_structure_hook(float, _number)
_CONVERTER.register_structure_hook_func(_is_literal, _literal)
_CONVERTER.register_structure_hook_factory(attrs.has, _all_at_once)
_CONVERTER.register_structure_hook(Use, _use)
_CONVERTER.register_structure_hook_func(_is_tuple, _tuple)
_CONVERTER.register_structure_hook_func(_is_optional, _optional)


def _problems(error: BaseException, path: str, cls: Any) -> list[str]:
    """Flatten cattrs' nested groups into lines, each with its path."""
    if isinstance(error, ClassValidationError):
        fields = {f.name: f.type for f in attrs.fields(error.cl)} if attrs.has(error.cl) else {}
        lines: list[str] = []
        for inner in error.exceptions:
            name = _field(inner)
            lines += _problems(inner, f"{path}.{name}" if name else path, fields.get(name or "", error.cl) or error.cl)
        return lines
    if isinstance(error, IterableValidationError):
        lines = []
        for inner in error.exceptions:
            note = next((n for n in getattr(inner, "__notes__", []) if hasattr(n, "index")), None)
            lines += _problems(inner, f"{path}[{note.index}]" if note is not None else path, cls)
        return lines
    if isinstance(error, ForbiddenExtraKeysError):
        names = [f.name for f in attrs.fields(error.cl)]
        return [
            f"{path}.{shown(key)[1:-1]}: unknown.{did_you_mean(key, names)} Fields: {', '.join(names) or 'none'}."
            for key in sorted(map(str, error.extra_fields))
        ]
    if isinstance(error, KeyError):
        key = f".{error.args[0]}"  # cattrs names the missing field itself
        return [f"{path.removesuffix(key)}{key}: missing"]
    if isinstance(error, RangeError):
        return [f"{path}.{p}" for p in error.problems]
    if isinstance(error, ConfigError):
        return [f"{path}: {p}" for p in error.problems]
    return [f"{path}: {one_line(error, 1000)}"]


def structure(cls: type[T], data: Any, path: str = "$") -> T:
    """`data` as a `cls`, or a ConfigError that lists every problem with its path."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: must be a mapping, not {shown(data)}")
    try:
        return _CONVERTER.structure(data, cls)
    except Exception as error:
        raise ConfigError(_problems(error, path, cls)) from error


def unstructure(config: Any) -> dict[str, Any]:
    """The plain mapping that `structure` would read back."""
    return typing.cast("dict[str, Any]", _plain(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Use):
        return {"use": value.use, **_plain(value.options)}
    if attrs.has(type(value)):
        return {f.name: _plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class _Options(Rule):
    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.rules = rules

    def problems(self, value: Any, place: str) -> Iterator[str]:
        for name, rule in self.rules.items():
            if isinstance(value, Use) and name in value.options:
                given = value.options[name]
                with contextlib.suppress(_WrongType):  # as YAML mistakes it: the rule refuses what is no number at all
                    given = _number(given, None) if isinstance(given, str) else given
                yield from rule.problems(given, f"{place}.{name}")


def options(**rules: Rule) -> Rule:
    """Options that a `Use` may carry for whoever names it, such as the weight of a reward, each with its rule."""
    return _Options(rules)


@frozen
class Parts:
    """The pipeline that a recipe starts from: a checkpoint, parts by name, or a checkpoint with parts replaced."""

    start: str | None = field(default=None, validator=optional(text()))  # checkpoint URI
    vae: Use | None = None
    text_encoder: Use | None = None
    backbone: Use | None = None
    sampler: Use | None = None
    # Presets that the checkpoint will carry; None: those of `start`.
    guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
    steps: int | None = field(default=None, validator=optional(STEPS))
    # px, side of the square that an aspect ratio keeps the area of
    base_resolution: int | None = field(default=None, validator=optional(PIXELS))


@frozen
class Adapter:
    """LoRA on a role: a low-rank matrix learns beside each target layer, and the layer itself stays as it is."""

    rank: int = field(default=16, validator=integer(at_least=1, at_most=2**16))
    scale: float = field(default=1.0, validator=real(above=0))  # alpha / rank, which multiplies the adapter
    targets: tuple[str, ...] = ()  # ends of the dotted names of linear layers, such as attn.img_qkv; none: all of them


@frozen
class Training:
    """What the loop does around a method."""

    steps: int = field(validator=integer(at_least=1))  # optimizer steps in all
    lr: float = field(default=1e-4, validator=real(at_least=0))
    # By role: what multiplies lr for it; 1 where none is given.
    rates: dict[str, float] = field(factory=dict, validator=each(real(at_least=0)))
    warmup: int = field(default=0, validator=integer(at_least=0))  # steps of linear warm-up
    decay: float = field(default=0.0, validator=within(0, 1))  # share of the run, at its end, over which lr falls to 0
    shape: str = field(default="linear", validator=one_of("linear", "cosine"))  # how it falls
    betas: tuple[float, float] = field(default=(0.9, 0.99), validator=each(real(at_least=0, below=1)))
    weight_decay: float = field(default=0.0, validator=real(at_least=0))
    clip: float = field(default=1.0, validator=real(at_least=0))  # largest gradient norm; 0 does not clip
    # Decay of the weights' moving average, which is what is saved; 0 keeps none.
    ema: float = field(default=0.0, validator=real(at_least=0, below=1))
    # That a batch is worked through in, each with noise of its own; at least one a process.
    parts: int = field(default=1, validator=integer(at_least=1, at_most=2**16))
    # Processes among which each role's weights, moments and averages are divided; 0: all; 1: none.
    shards: int = field(default=1, validator=integer(at_least=0, at_most=2**16))
    precision: str = field(default="fp32", validator=one_of("fp32", "bf16"))  # bf16: autocast over fp32 master weights
    compile: bool = False  # torch.compile each role; needs a C++ compiler on CPUs
    checkpointing: bool = False  # compute activations again on the way back: less memory, a third more time
    save_every: int = field(default=500, validator=integer(at_least=1))  # steps between checkpoints
    keep: int = field(default=2, validator=integer(at_least=1))  # checkpoints kept
    log_every: int = field(default=20, validator=integer(at_least=1))  # steps between log lines
    # Skipped steps in a row before the run stops; those that are not finite are skipped.
    bad_steps: int = field(default=5, validator=integer(at_least=1))
    # Times the running median from which a loss or a gradient's norm is skipped as well; 0: never.
    spike: float = field(default=0.0, validator=real(above=1, zero=True))
    trackers: tuple[str, ...] = ()  # tensorboard, trackio, wandb …: where lines of the log go besides log.jsonl
    weights: str = field(default="fp32", validator=one_of("fp32", "bf16"))  # how the finished model is stored
    threads: int = field(default=0, validator=integer(at_least=0, at_most=1024))  # torch threads; 0: torch's choice
    adapters: dict[str, Adapter] = field(factory=dict)  # by role; a role without one is trained in full


@frozen
class Watch:
    """What is looked at while a run goes on, with the weights that it would export. Learning never hears of it."""

    # Steps between looks; the beginning and the end are looked at too.
    every: int = field(validator=integer(at_least=1))
    # Drawn into samples/step-N.png; picture i has the seed `seed + i`.
    prompts: tuple[str, ...] = field(default=(), validator=each(text()))
    benchmarks: tuple[Use, ...] = ()  # drawn and judged, and never learned from
    validation: Use | None = None  # a dataset that is not learned from, for methods that can validate
    batches: int = field(default=8, validator=integer(at_least=1))  # of it
    seed: int = field(default=0, validator=SEED)
    # Height, width px of what is drawn; None: the preset.
    size: tuple[int, int] | None = field(default=None, validator=optional(each(PIXELS)))
    steps: int | None = field(default=None, validator=optional(STEPS))  # of the sampler; None: the preset
    guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))  # None: the preset
    batch: int = field(default=16, validator=integer(at_least=1, at_most=2**16))  # pictures drawn at once
    keep_best: str = ""  # the benchmark by whose overall score the weights are chosen that are exported; "": the last
    # Looks without a better score after which the run ends; 0: never.
    patience: int = field(default=0, validator=integer(at_least=0))

    def __attrs_post_init__(self) -> None:
        problems = []
        if not (self.prompts or self.benchmarks or self.validation):
            problems.append("looks at nothing; name prompts, benchmarks or validation")
        if self.keep_best and self.keep_best not in self.judges():
            named = ", ".join(self.judges()) or "none"
            problems.append(
                f"keep_best is {shown(self.keep_best)}, which is no benchmark of this section; there is {named}"
            )
        if self.patience and not self.keep_best:
            problems.append("patience waits for a better score; name its benchmark in keep_best")
        if problems:
            raise ConfigError(problems)

    def judges(self) -> dict[str, Use]:
        """The benchmarks by the names they are logged under: their own, and a number where one is there twice."""
        found: dict[str, Use] = {}
        for i, use in enumerate(self.benchmarks):
            name = use.use.rpartition(":")[2]
            found[f"{name}_{i}" if name in found else name] = use
        return found


@frozen
class Recipe:
    """One training run."""

    method: Use
    train: Training
    dataset: Use | None = None  # where its method reads one
    pipeline: Parts = field(factory=Parts)
    seed: int = field(default=0, validator=SEED)
    watch: Watch | None = None


def build(catalog: Catalog, kind: str, use: Use, path: str = "$") -> tuple[str, type[Any], Any]:
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


def read_recipe(path: Path, catalog: Catalog, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, checked whole: its own fields and the options of every component it names.

    `changes` are PATH=VALUE, as in `method.gan=0`, with values as YAML has them; they count as if the file said so.
    """
    data, problems = reading.read_yaml(path, missing="there is no such recipe")
    for change in changes:
        problems += _change(data, change)
    recipe: Recipe | None = None
    try:
        recipe = structure(Recipe, data)
    except ConfigError as error:
        problems += error.problems
    for kind, value, where in _named(data if isinstance(data, Mapping) else {}):
        try:
            build(catalog, kind, _use(value, None), where)
        except ConfigError as error:
            problems += error.problems
        except _WrongType:
            pass  # told above
    if problems or recipe is None:
        raise ConfigError([f"{path}: {p}" for p in problems])
    return recipe


def _change(data: Any, change: str) -> Iterator[str]:
    """Put PATH=VALUE into the data of a recipe, or say why it cannot be done."""
    path, sign, text = change.partition("=")
    *way, last = path.strip().split(".")
    try:
        value, twice = reading.parse_yaml(text)
    except ValueError:
        sign = ""
    if not sign or not all([*way, last]):
        yield f"{shown(change)} is no change of a recipe; write PATH=VALUE, method.gan=0 for instance"
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
    inner, watch = (v if isinstance(v, Mapping) else {} for v in (data.get("pipeline"), data.get("watch")))
    found = [(k, data[k], f"$.{k}") for k in ("method", "dataset") if k in data]
    found += [
        (k, inner[k], f"$.pipeline.{k}")
        for k in ("vae", "text_encoder", "backbone", "sampler")
        if inner.get(k) is not None
    ]
    judges = watch.get("benchmarks")
    for i, use in enumerate(judges if isinstance(judges, list) else ()):
        found.append(("benchmark", use, f"$.watch.benchmarks[{i}]"))
    held = watch.get("validation")
    return [*found, ("dataset", held, "$.watch.validation")] if held is not None else found
