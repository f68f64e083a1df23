"""Recipes and configs: strict, and every problem told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import toy
from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training, build, read_recipe, structure, unstructure
from lens_core.types import ConfigError

GOOD = """
pipeline: {vae: blocks, text_encoder: letters, backbone: {use: mixer, width: 8}, sampler: even}
method: {use: fit, bad: [1, 2]}
dataset: squares
train: {steps: 4, lr: 1e-3, betas: [0.9, 0.95]}
"""


@frozen
class Sample:
    flag: bool = False
    count: int = 1
    share: float = 0.5
    name: str = "a"
    sizes: tuple[int, ...] = (1,)
    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    table: dict[str, float] = attrs.field(factory=dict)


def problems(data: Any, cls: type[Any] = Sample) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        structure(cls, data)
    return list(caught.value.problems)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("flag", "false", "must be true or false, not 'false'"),
        ("flag", 0, "must be true or false, not 0"),
        ("count", 1.0, "must be a whole number, not 1.0"),
        ("count", True, "must be a whole number, not True"),
        ("count", "3", "must be a whole number, not '3'"),
        ("share", "half", "must be a number, not 'half'"),
        ("share", "1", "must be a number, not '1'"),
        ("share", True, "must be a number, not True"),
        ("name", 3, "must be text, not 3"),
        ("name", None, "must be text, not None"),
        (
            "name",
            {"tiny": None},
            "must be text, not {'tiny': None}; put quotes around \"tiny:\", which YAML takes for a mapping",
        ),
        ("sizes", 3, "must be a list, not 3"),
        ("sizes", "12", "must be a list, not '12'"),
        ("pair", [1], "must have 2 items, not 1"),
        ("maybe", "x", "must be a whole number, not 'x'"),
    ],
)
def test_a_wrong_type_is_refused_with_its_path(field: str, value: Any, words: str) -> None:
    assert problems({field: value}) == [f"$.{field}: {words}"]


def test_a_number_may_be_written_as_yaml_mistakes_it() -> None:
    assert structure(Sample, {"share": "1e-4"}).share == 1e-4
    assert structure(Sample, {"share": 2}).share == 2.0
    assert type(structure(Sample, {"share": 2}).share) is float


def test_all_problems_are_reported_at_once() -> None:
    reported = problems({"flag": "false", "coutn": 3, "name": 3, "table": {"a": "b"}})
    assert len(reported) == 4
    assert any(p.startswith("$.coutn: unknown. Did you mean 'count'? Fields: flag, count") for p in reported)
    assert {p.split(":")[0].split("[")[0] for p in reported} == {"$.flag", "$.coutn", "$.name", "$.table"}


def test_a_missing_field_is_named() -> None:
    assert problems({}, Training) == ["$.steps: missing"]


def test_something_else_than_a_mapping_is_refused() -> None:
    assert problems(None) == ["$: must be a mapping, not None"]


def test_a_config_that_refuses_its_values_is_quoted_with_its_path(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match=r"^\$\.pipeline\.backbone: width is 0; it must be at least 1$"):
        build(catalog, "backbone", ComponentSpec("mixer", {"width": 0}), "$.pipeline.backbone")


def test_a_recipe_is_read_whole(tmp_path: Path, catalog: Catalog) -> None:
    recipe = read_recipe(write(tmp_path, GOOD), catalog)
    assert recipe == Recipe(
        method=ComponentSpec("fit", {"bad": [1, 2]}),
        dataset=ComponentSpec("squares"),
        train=Training(steps=4, lr=1e-3, betas=(0.9, 0.95)),
        pipeline=PipelineSpec(
            vae=ComponentSpec("blocks"),
            text_encoder=ComponentSpec("letters"),
            backbone=ComponentSpec("mixer", {"width": 8}),
            sampler=ComponentSpec("even"),
        ),
    )


def test_the_problems_of_a_recipe_and_of_its_components_are_reported_together(tmp_path: Path, catalog: Catalog) -> None:
    text = """
pipeline: {vae: blocs, backbone: {use: mixer, widht: 8}, start: 3}
method: {use: fit, bad: [1, x]}
dataset: {seed: 3}
train: {lr: fast, epochs: 3}
"""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog)
    problems = "\n".join(caught.value.problems)
    assert all(p.startswith(f"{path}: $") for p in caught.value.problems)
    for words in (
        "$.pipeline.vae: no vae is called 'blocs'. Did you mean 'blocks'?",
        "$.pipeline.backbone.widht: unknown. Did you mean 'width'?",
        "$.pipeline.start: must be text, not 3",
        "$.method.bad",
        "$.dataset: must name a component",
        "$.train.lr: must be a number, not 'fast'",
        "$.train.epochs: unknown",
    ):
        assert words in problems
    assert len(caught.value.problems) == len(set(caught.value.problems)), "each problem is told once"


TWINS = """\
train:
  steps: 4
  lr: 1e-3
  steps: 9
method: {use: fit, bad: [1], bad: [2]}
pipeline: {vae: blocs}
train: {steps: 5}
dataset: squares
train: {steps: 6}
"""


def test_a_key_that_stands_twice_is_refused_with_its_lines_beside_the_other_problems(
    tmp_path: Path, catalog: Catalog
) -> None:
    path = write(tmp_path, TWINS)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog)
    assert sorted(caught.value.problems) == [
        f"{path}: {words}"
        for words in (
            "$.method.bad: stands in lines 5 and 5; keep one",
            "$.pipeline.vae: no vae is called 'blocs'. Did you mean 'blocks'?",
            "$.train.steps: stands in lines 2 and 4; keep one",
            "$.train: stands in lines 1 and 7 and 9; keep one",
        )
    ]


def test_a_twin_is_found_in_a_list_and_behind_an_anchor_that_holds_itself(tmp_path: Path, catalog: Catalog) -> None:
    path = write(tmp_path, GOOD + "other: &a [1, {b: 2, b: 3}, *a]\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog)
    assert f"{path}: $.other[1].b: stands in lines 6 and 6; keep one" in caught.value.problems


def test_one_key_in_two_mappings_and_one_that_overrides_a_merged_one_are_no_twins(
    tmp_path: Path, catalog: Catalog
) -> None:
    merged = GOOD.replace("method: {use: fit, bad: [1, 2]}", "method: &m {use: fit, stop: 3}")
    merged = merged.replace("dataset: squares", "dataset: {<<: *m, use: squares, batch: 2, seed: 2}")
    with pytest.raises(ConfigError) as caught:  # the merge brings a field that the dataset does not have: YAML's way
        read_recipe(write(tmp_path, merged), catalog)
    assert [p.partition(": $")[2] for p in caught.value.problems] == [
        ".dataset.stop: unknown. Known: batch, seed. Fields: batch, seed."
    ]


@pytest.mark.parametrize(
    "text", ["a: [", "a: \x00", "- 1", "", "a: 2026-13-01", "? [a]\n: 1", "[" * 999, "--- a\n--- b"]
)
def test_what_is_not_a_yaml_mapping_is_refused_in_one_line(text: str, tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, text), catalog)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_not_utf8_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="there is no such recipe"):
        read_recipe(tmp_path / "no.yaml", catalog)
    (tmp_path / "latin.yaml").write_bytes("method: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path / "latin.yaml", catalog)


def test_what_is_written_reads_back_equal(tmp_path: Path, catalog: Catalog) -> None:
    sample = Sample(flag=True, sizes=(1, 2), pair=(3, 4.0), maybe=5, table={"a": 1.0})
    assert structure(Sample, unstructure(sample)) == sample
    recipe = read_recipe(write(tmp_path, GOOD), catalog)
    assert structure(Recipe, unstructure(recipe)) == recipe
    assert unstructure(toy.Fit.Config(bad=(1,))) == {"bad": [1], "bad_role": "backbone", "stop": -1}


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"precision": "fp16"}, {"lr_decay_fraction": 1.5}, {"ema_decay": 1.0}, {"keep_checkpoints": 0}],
)
def test_training_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    (problem,) = problems({"steps": 1, **change}, Training)
    assert next(iter(change)) in problem


# ---- changes --------------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, *changes: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: fit\ndataset: {use: squares}\ntrain: {steps: 3, betas: [0.9, 0.99]}\n")
    return read_recipe(path, Catalog.of(toy), changes)


def test_changes_count_as_if_the_recipe_said_so(tmp_path: Path) -> None:
    recipe = changed(tmp_path, "train.steps=7", "train.betas=[0, 0.5]", "method.bad=[1]", "seed = 4", "train.lr=1e-4")
    assert (recipe.train.steps, recipe.train.betas, recipe.train.lr, recipe.seed) == (7, (0, 0.5), 1e-4, 4)
    assert recipe.method == ComponentSpec("fit", {"bad": [1]}) and recipe.dataset == ComponentSpec("squares")
    assert changed(tmp_path, "method.use=fit", "method.bad=[2]").method == ComponentSpec("fit", {"bad": [2]})
    assert changed(tmp_path, "method=fit", "train.steps=1", "train.steps=2").train.steps == 2
    assert changed(tmp_path, "evaluation.every=2", "evaluation.prompts=[red]").evaluation is not None


def test_a_change_keeps_to_its_place_where_an_alias_repeats_a_section(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: fit\ndataset: &d {use: squares, batch: 4}\ntrain: {steps: 3}\nevaluation: {every: 1, validation: *d}\n"
    )
    recipe = read_recipe(path, Catalog.of(toy), ["evaluation.validation.batch=2"])
    assert recipe.evaluation is not None and recipe.evaluation.validation == ComponentSpec("squares", {"batch": 2})
    assert recipe.dataset == ComponentSpec("squares", {"batch": 4})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.steps", "is no change of a recipe; write PATH=VALUE"),
        ("=3", "is no change of a recipe"),
        ("train..steps=3", "is no change of a recipe"),
        ("train.steps=[", r"'train\.steps=\[': the value of train\.steps cannot be read as YAML: "),
        ("dataset={use: squares, batch: [1", "the value of dataset cannot be read as YAML: .*line 1"),
        ("seed=2024-02-31", "the value of seed cannot be read as YAML: "),
        ("train.steps.more=3", "train.steps is no section"),
        ("train.stepz=3", "stepz"),
        ("train.steps=many", "steps"),
        ("method.badly=1", "badly"),
    ],
)
def test_a_change_that_cannot_be_is_refused(change: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(tmp_path, change)
