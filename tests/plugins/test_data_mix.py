"""Several datasets as one: by weight, resumable, and never confused with each other."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from lens_data.mix import Mix
from lens_shapes.dataset import ShapesDataset

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build, read_recipe
from lens_core.testing import check_dataset
from lens_core.types import CheckpointError, ConfigError

KNOWN = {"sizes": [[64, 64]], "batch": 4, "pool_size": 8, "dense_caption_ratio": 0.0}
NEW = {**KNOWN, "tasks": {"novel": 1.0}}


def mix(weight: float = 1.0, seed: int = 0) -> Mix:
    datasets = [{"use": "shapes", **KNOWN, "weight": 3}, {"use": "shapes", **NEW, "weight": weight}]
    _, cls, config = build(Catalog.installed(), "dataset", ComponentSpec("mix", {"datasets": datasets, "seed": seed}))
    return cls(config)


def captions_of(dataset: Any, count: int, rank: int = 0, world: int = 1) -> list[tuple[str, ...]]:
    return [batch.captions for batch in islice(dataset.batches(rank, world), count)]


def is_new(captions: tuple[str, ...]) -> bool:
    assert len({"moon" in caption for caption in captions}) == 1, "a batch is of one dataset"
    return "moon" in captions[0]


def test_it_keeps_the_contract_of_a_dataset():
    check_dataset(mix, before=5, after=12)


def test_batches_come_by_share():
    new = [is_new(c) for c in captions_of(mix(weight=1.0), 400)]
    assert 65 <= sum(new) <= 135  # a quarter of 400, plus or minus four standard deviations
    assert new != [is_new(c) for c in captions_of(mix(weight=1.0, seed=1), 400)]
    assert sum(is_new(c) for c in captions_of(mix(weight=27.0), 100)) > 75


def test_each_part_is_what_it_is_alone():
    alone = ShapesDataset(build(Catalog.installed(), "dataset", ComponentSpec("shapes", NEW))[2])
    mixed = [c for c in captions_of(mix(), 60) if is_new(c)]
    assert mixed == captions_of(alone, len(mixed))


def test_ranks_share_a_batch_between_them():
    whole, first, second = captions_of(mix(), 12), captions_of(mix(), 12, 0, 2), captions_of(mix(), 12, 1, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_keys_of_two_parts_are_never_one():
    keys: dict[bool, set[int]] = {True: set(), False: set()}
    for batch in islice(mix().batches(0, 1), 80):
        keys[is_new(batch.captions)] |= set(batch.keys)
    assert len(keys[True]) == len(keys[False]) == 8 and not keys[True] & keys[False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"datasets": []}, "datasets: must have at least 1 item"),
        ({"datasets": [{"use": "shapes", "weight": 0}]}, r"datasets\[0\]\.weight: must be above 0, not 0"),
        ({"datasets": [{"use": "shapes", "weight": "half"}]}, r"datasets\[0\]\.weight: must be a number, not 'half'"),
        ({"datasets": ["shapes"], "seed": -1}, "seed: must be at least 0"),
        ({"datasets": ["shapez"]}, r"\$\.datasets\[0\]: no dataset is called 'shapez'\. Did you mean 'shapes'\?"),
        ({"datasets": ["shapes", {"use": "shapes", "bach": 3}]}, r"\$\.datasets\[1\]\.bach: unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build(Catalog.installed(), "dataset", ComponentSpec("mix", options))


def test_a_state_of_other_parts_is_refused():
    state = mix().state_dict()
    with pytest.raises(CheckpointError, match="is of 1 datasets, and the recipe names 2"):
        mix().load_state_dict({**state, "datasets": state["datasets"][:1]})


def test_a_recipe_may_mix(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "method: flow_matching\ndataset: {use: mix, datasets: [{use: shapes, weight: 2}]}\ntrain: {steps: 1}\n"
    )
    assert read_recipe(path, Catalog.installed()).dataset == ComponentSpec(
        "mix", {"datasets": [{"use": "shapes", "weight": 2}]}
    )


def test_the_state_of_another_number_of_datasets_is_refused_in_one_line():
    state = mix().state_dict()
    state["datasets"] = state["datasets"][:1]
    with pytest.raises(CheckpointError, match="the checkpoint is of 1 datasets, and the recipe names 2; undo"):
        mix().load_state_dict(state)
