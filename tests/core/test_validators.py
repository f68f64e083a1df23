"""Ranges of config fields: every number has one, and all problems of a recipe are raised at once."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import field, frozen

from lens_core.catalog import Catalog
from lens_core.protocols import KINDS
from lens_core.recipe import (
    ComponentSpec,
    Evaluation,
    LoraSpec,
    PipelineSpec,
    Recipe,
    Training,
    options,
    read_recipe,
    structure,
    unstructure,
)
from lens_core.types import ConfigError
from lens_core.validators import (
    SEED,
    RangeError,
    Rule,
    each,
    integer,
    matching,
    one_of,
    optional,
    real,
    text,
    within,
)

INSTALLED = Catalog.installed()
CORE = [PipelineSpec, LoraSpec, Training, Evaluation, Recipe]
CONFIGS = [*CORE, *(e.cls.Config for kind in KINDS for e in INSTALLED.entries(kind))]
# What no number of a recipe may be, whatever it is for.
POISON = [math.nan, math.inf, -math.inf, True, "3", None, 10**400, -(10**400), [1]]


def numbers(hint: Any) -> Iterator[Any]:
    """int and float wherever they stand in a type."""
    if hint in (int, float):
        yield hint
    for inner in typing.get_args(hint):
        yield from numbers(inner)


def wrapped(hint: Any, value: Any) -> Any:
    """A value of the type `hint` whose numbers are all `value`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kinds = [args[0]] if len(args) == 2 and args[1] is ... else args
        return tuple(wrapped(kind, value) for kind in kinds)
    if origin is dict:
        return {"words": wrapped(args[1], value)}
    if args and type(None) in args:
        return wrapped(next(a for a in args if a is not type(None)), value)
    return value


FIELDS = [
    pytest.param(a, id=f"{config.__module__}.{config.__qualname__}.{a.name}")
    for config in dict.fromkeys(CONFIGS)
    for a in attrs.fields(attrs.resolve_types(config))
    if list(numbers(a.type))
]


def test_the_walk_finds_the_numbers_of_core_and_plugins() -> None:
    names = {p.id for p in FIELDS}
    assert len(names) > 120
    assert {"lens_core.recipe.Training.lr", "lens_mmdit.config.MMDiTConfig.num_layers"} <= names


@pytest.mark.parametrize("attribute", FIELDS)
def test_every_number_of_every_config_has_a_range(attribute: attrs.Attribute[Any]) -> None:
    rule = attribute.validator
    assert isinstance(rule, Rule), f"{attribute.name} has no validator of lens_core.validators"
    for value in POISON if float in numbers(attribute.type) else [*POISON, 2**70, -(2**70), 1.0]:
        if value is None and type(None) in typing.get_args(attribute.type):
            continue
        value_ = wrapped(attribute.type, value)
        assert not rule.allows(value_), f"{attribute.name} takes {value_!r}"
    if attribute.default is not attrs.NOTHING and not isinstance(attribute.default, attrs.Factory):  # type: ignore[arg-type]
        assert rule.allows(attribute.default)


@pytest.mark.parametrize("config", dict.fromkeys(CONFIGS), ids=lambda c: f"{c.__module__}.{c.__qualname__}")
def test_the_defaults_of_every_config_make_the_round_trip(config: type[Any]) -> None:
    if any(a.default is attrs.NOTHING for a in attrs.fields(config)) or config is Evaluation:
        return  # it has no defaults to be built of
    made = config()
    assert structure(config, json.loads(json.dumps(unstructure(made)))) == made


# ---- one rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (integer(at_least=1), [1, 2**31 - 1], [0, -1, 2**31, 1.0, True, "1", None]),
        (integer(at_least=2, zero=True), [0, 2], [1, -1, False]),
        (integer(), [-5, 0, 5], [2**31, -(2**31)]),
        (SEED, [0, 2**63 - 1], [-1, 2**63, 2**64, 0.0]),
        (real(at_least=0), [0, 0.0, 1e308, 3], [-0.0, -1e-300, math.nan, math.inf, True, "1", 10**400]),
        (real(), [-1e308, -0.0, 0], [math.nan, -math.inf]),
        (real(above=0), [5e-324], [0.0, -0.0]),
        (real(above=1, zero=True), [0, 0.0, 1.5], [1, 0.5, -0.0, -1]),
        (real(at_least=0, below=1), [0, 0.999], [1, 1.0]),
        (within(0, 1), [0, 1, 0.5], [-0.1, 1.0000001, math.nan]),
        (one_of("fp32", "bf16"), ["fp32"], ["fp16", "", None, 32]),
        (optional(within(0, 1)), [None, 1], [2, "x"]),
        (each(within(0, 1)), [[], (0.5, 1), {"a": 1}], [(0.5, 2), {"a": math.inf}, "ab", 3, None]),
        (each(each(integer(at_least=1)), at_least=1), [((1, 2),)], [(), ((1, 0),), (1,)]),
        (each(real(), keys=one_of("a", "b")), [{"a": 1}], [{"c": 1}]),
        (matching("[a-z]+", "letters"), ["abc"], ["", "ab1", "abc\n", 3]),
        (text(), ["a", " a\nb "], ["", " \n", 3]),
        (
            options(weight=real(above=0)),
            [ComponentSpec("a"), ComponentSpec("a", {"weight": 2}), ComponentSpec("a", {"weight": "1e-1"})],
            [
                ComponentSpec("a", {"weight": 0}),
                ComponentSpec("a", {"weight": math.inf}),
                ComponentSpec("a", {"weight": "much"}),
            ],
        ),
    ],
)
def test_a_rule_takes_what_is_in_its_range_and_nothing_else(rule: Rule, good: list[Any], bad: list[Any]) -> None:
    assert [v for v in good if not rule.allows(v)] == []
    assert [v for v in bad if rule.allows(v)] == []


@frozen
class Knobs:
    lr: float = field(default=1.0, validator=real(at_least=0))
    pair: tuple[float, float] = field(default=(0.0, 0.0), validator=each(real(at_least=0, below=1)))
    rates: dict[str, float] = field(factory=dict, validator=each(real(at_least=0)))
    count: int = field(default=1, validator=integer(at_least=1, at_most=8))
    kind: str = field(default="even", validator=one_of("even", "odd"))
    spike: float = field(default=0.0, validator=real(above=1, zero=True))
    flag: bool = False


WRONG: dict[str, Any] = {
    "lr": math.nan, "pair": [0.5, 1.0], "rates": {"x": 1, "y": -1}, "count": 10**30, "kind": "evn", "spike": 0.5,
}  # fmt: skip
LINES = [
    "lr: must be finite and at least 0, not nan",
    "pair[1]: must be at least 0 and below 1, not 1.0",
    "rates.y: must be at least 0, not -1.0",
    "count: must be at least 1 and at most 8, not 1000000000000000000000000000000",
    "kind: must be even or odd, not 'evn'. Did you mean 'even'?",
    "spike: must be above 1, or 0, not 0.5",
]


def test_all_fields_are_checked_at_once_and_reported_with_path_value_and_range() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Knobs, WRONG, "$.train")
    assert list(caught.value.problems) == [f"$.train.{line}" for line in LINES]


def test_ranges_are_reported_beside_wrong_types_and_unknown_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Knobs, {**WRONG, "flag": "no", "cuont": 3}, "$")
    assert {line.partition(": ")[0] for line in caught.value.problems} == {
        "$.flag", "$.cuont", *(f"$.{line.partition(':')[0]}" for line in LINES)
    }  # fmt: skip
    assert len(caught.value.problems) == 8


def test_a_config_built_in_python_is_checked_too() -> None:
    with pytest.raises(RangeError) as caught:
        Knobs(lr=-1.0, spike=math.inf)
    assert caught.value.problems == (
        "lr: must be at least 0, not -1.0", "spike: must be finite and above 1, or 0, not inf"
    )  # fmt: skip
    with pytest.raises(RangeError, match="lr: must be a number, not True"):
        attrs.evolve(Knobs(), lr=True)


def test_what_is_shown_of_a_value_is_one_short_line() -> None:
    for value in ("x\ny" * 10_000, [[["a"] * 9] * 9] * 9, 16**5000, {"k" * 9999: "v" * 9999}):
        with pytest.raises(ConfigError) as caught:
            structure(Knobs, {"lr": value, "kind": value, "count": value})
        assert len(caught.value.problems) == 3
        assert all(len(line) < 300 and "\n" not in line for line in caught.value.problems)


# ---- a recipe -------------------------------------------------------------------------------------------------------

RECIPE = """
pipeline: {vae: blocks, text_encoder: letters, backbone: mixer, sampler: even}
method: fit
dataset: squares
train: {steps: 4}
evaluation: {every: 2, prompts: [red]}
"""


@pytest.mark.parametrize(
    "change",
    [
        "train.lr=-1", "train.lr=.nan", "train.lr=.inf", "train.lr=-0.0",
        "train.max_grad_norm=-0.1", "train.max_grad_norm=.nan", "train.max_grad_norm=-.inf",
        "train.lr_multipliers.backbone=-1", "train.lr_multipliers.backbone=.nan", "train.betas=[0.9, 1.0]",
        "train.betas=[-0.1, 0.9]", "train.betas=[.nan, 0.9]", "train.steps=0", "train.steps=9223372036854775808",
        "train.weight_decay=-1", "train.max_skipped_steps=0",
        "train.warmup=-1", "train.lr_decay_fraction=.nan", "train.ema_decay=1", "train.ema_decay=.nan",
        "train.spike=.nan", "train.spike=-2", "train.threads=-1", "train.threads=1000000",
        "train.micro_batches=0", "train.fsdp_shards=-1",
        "train.lora.backbone.rank=0", "train.lora.backbone.scale=.inf", "seed=-1", "seed=18446744073709551616",
        "seed=true", "pipeline.steps=0", "pipeline.steps=70000", "pipeline.guidance_scale=.nan",
        "pipeline.guidance_scale=65536", "pipeline.base_resolution=0", "evaluation.every=0", "evaluation.seed=-1",
        "evaluation.batch_size=0", "evaluation.validation_batches=-1", "evaluation.steps=0",
        "evaluation.guidance_scale=.inf", "evaluation.size=[0, 16]",
        "evaluation.patience=-1", "evaluation.prompts=['']",
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_with_the_recipe(change: str, tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    read_recipe(path, catalog)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog, [change])
    (line,) = caught.value.problems
    where = change.partition("=")[0].replace("lora.backbone", "lora")
    assert f"$.{where.rpartition('.')[0]}" in line and where.rpartition(".")[2] in line and "must be" in line
