"""The dataset `packed`: mixed sizes, one stream for any ranks, equal work, exact state."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lens_data.commands import packing_report
from lens_data.packed import PackedDataset
from lens_data.packing import block_flops
from lens_data.store import Store
from test_data_dataset import BUCKETS, SIZES, corrupt, fill, row

from lens_core.recipe import structure
from lens_core.testing import check_dataset
from lens_core.types import Batch, ConfigError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures, 10 of each size: 20, 10, 10, 10 in the buckets."""
    return fill(tmp_path_factory.mktemp("data") / "store", 50)


def make(store: Path, **config: object) -> PackedDataset:
    return PackedDataset(
        PackedDataset.Config(
            **{"store": str(store), "buckets": BUCKETS, "budget": 40.0, "patch_size": 4, "backbone_width": 16, **config}
        )
    )


def take(dataset: PackedDataset, number: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.batches(rank, world), number))


def contents(batch: Batch) -> list[tuple[str, int, bytes]]:
    """The samples of a batch, whole."""
    return [(c, k, i.numpy().tobytes()) for c, k, i in zip(batch.captions, batch.keys, batch.images, strict=True)]


def work(batch: Batch) -> float:
    """By hand, in pictures of 32x32: (cells + 22 + 1.3 words) tokens n cost n (6 width + n)."""
    tokens = np.array([i.shape[1] * i.shape[2] / 16 + 22 + 1.3 for i in batch.images])
    return float((tokens * (96 + tokens)).sum() / (64 * (96 + 64)))


def test_a_batch_holds_pictures_of_several_sizes_with_their_own_captions(store: Path) -> None:
    for batch in take(make(store), 6):
        assert isinstance(batch.images, tuple) and len(batch.images) == len(batch) and batch.weight == 1.0
        for caption, image in zip(batch.captions, batch.images, strict=True):
            number = int(image[0, 0, 0])
            assert caption == f"d{number}" and image.dtype == torch.uint8
            assert tuple(image.shape[1:]) == (SIZES[number % 5] if number % 5 < 4 else (16, 16))
        assert len({i.shape for i in batch.images}) == 4


def test_a_step_takes_what_its_budget_pays_for_and_no_more(store: Path) -> None:
    batches = take(make(store, budget=7.5), 40)
    for batch, after in pairwise(batches):
        first = Batch(after.images[:1], after.captions[:1])
        assert work(batch) <= 7.5 < work(batch) + work(first)


def test_every_picture_has_its_turn_once_a_pass_and_no_pass_is_like_another(store: Path) -> None:
    stream = [c for b in take(make(store), 40) for c in b.captions]
    passes = [tuple(stream[i : i + 50]) for i in range(0, len(stream) - 49, 50)]
    assert len(passes) > 10 and len(set(passes)) == len(passes)
    assert all(Counter(one) == Counter(f"d{n}" for n in range(50)) for one in passes)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_shares_the_same_steps_by_work(store: Path, world: int) -> None:
    parts = [take(make(store), 10, rank, world) for rank in range(world)]
    for n, whole in enumerate(take(make(store), 10)):
        shares = [part[n] for part in parts]
        assert sorted(s for share in shares for s in contents(share)) == sorted(contents(whole))
        assert max(map(work, shares)) < 1.05 * work(whole) / world
        assert [s.weight for s in shares] == [len(s) * world / len(whole) for s in shares]


@pytest.mark.parametrize("stop", range(0, 12, 3))
def test_a_run_that_stopped_after_any_batch_goes_on_with_other_ranks(store: Path, stop: int) -> None:
    whole = take(make(store), stop + 4)
    first = [make(store) for _ in range(2)]
    for rank, dataset in enumerate(first):
        take(dataset, stop, rank, 2)
    state = json.loads(json.dumps(first[0].state_dict()))
    assert state == first[1].state_dict() and state["batch"] == stop  # batches read ahead do not count
    assert state["samples"] == sum(map(len, whole[:stop]))
    parts = [make(store) for _ in range(4)]
    for dataset in parts:
        dataset.load_state_dict(state)
    goes_on = [take(dataset, 4, rank, 4) for rank, dataset in enumerate(parts)]
    for n, batch in enumerate(whole[stop:]):
        assert sorted(s for part in goes_on for s in contents(part[n])) == sorted(contents(batch))


def test_the_seed_alone_decides(store: Path) -> None:
    first, again, other = (
        take(make(store, **c), 8) for c in ({"seed": 3}, {"seed": 3, "prefetch_workers": 1}, {"seed": 4})
    )
    assert [contents(b) for b in first] == [contents(b) for b in again] != [contents(b) for b in other]


def test_it_keeps_the_contract_of_a_dataset(store: Path) -> None:
    check_dataset(lambda: make(store))


def test_longer_captions_cost_more(tmp_path: Path) -> None:
    path = tmp_path / "store"
    words = {"dense": " ".join(["word"] * 40), "brief": ""}
    Store(str(path), create=True).add([row(n, 32, 32, **(words if n % 2 else {"dense": ""})) for n in range(20)])
    with pytest.warns(UserWarning, match="3 of 4 buckets have no picture"):
        dataset = make(path)
    assert set(dataset.tokens(40).tolist()) == {64 + 22 + 1.3, 64 + 22 + 1.3 * 40}
    costs = block_flops(dataset.tokens(20), 16) / block_flops(np.array([64.0]), 16)
    assert len(take(dataset, 1)[0]) == np.searchsorted(costs.cumsum(), 40.0, "right") < 20


def test_a_caption_costs_no_more_than_what_the_encoder_reads_of_it_and_needs_no_spaces(tmp_path: Path) -> None:
    path = tmp_path / "store"
    captions = ["word " * 10_000, "一" * 80, "a b"]
    Store(str(path), create=True).add([row(n, 32, 32, dense=captions[n % 3], brief="") for n in range(12)])
    with pytest.warns(UserWarning, match="3 of 4 buckets have no picture"):
        dataset = make(path, max_text_tokens=100)
    assert set(dataset.tokens(12).round(3).tolist()) == {64 + 100, 64 + 22 + 1.3 * 30, 64 + 22 + 1.3 * 2}
    assert len(take(dataset, 1)[0]) > 0, "one endless caption does not stop the training"


@pytest.mark.filterwarnings("ignore:.*is corrupt")
def test_a_corrupt_picture_is_replaced_by_one_of_its_bucket_on_any_ranks(tmp_path: Path) -> None:
    path = corrupt(tmp_path / "store", 3, 6, 13)
    whole = take(make(path), 8)
    parts = [take(make(path), 8, rank, 4) for rank in range(4)]
    assert {int(i[0, 0, 0]) for b in whole for i in b.images}.isdisjoint((3, 6, 13))
    for n, batch in enumerate(whole):
        assert sorted(s for part in parts for s in contents(part[n])) == sorted(contents(batch))


def test_what_cannot_be_is_refused_in_one_line(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"a sample of 87 tokens costs 1.56 pictures .* budget of 1.2; raise budget"):
        take(make(store, budget=1.2), 1)
    with pytest.raises(ConfigError, match=r"a step of 2 samples has no share for each of 4 ranks; raise budget"):
        take(make(store, budget=1.8), 1, 0, 4)
    with pytest.raises(ConfigError, match="budget: must be above 0"):
        make(store, budget=0.0)
    with pytest.raises(ConfigError, match=r"\$\.batch: unknown"):
        structure(PackedDataset.Config, {"store": "x", "batch": 4})


def test_the_plan_of_a_recipe_tells_what_its_dataset_would_do(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
method: flow_matching
train: {{steps: 1}}
dataset:
  {{use: packed, store: '{store}', budget: 40.0, patch_size: 4, backbone_width: 16,
   buckets: [[[16, 16], [16, 24], [24, 16]], [[32, 32]]]}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    assert packing_report(tmp_path / "recipe.yaml", ranks=4, samples=600) == 0
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(n.rstrip("%")) / 100 for n in line.split()[1:]] for line in said[2:]}
    parts = [take(make(store), 10, rank, 4) for rank in range(4)]
    loads = np.array([[work(part[n]) for part in parts] for n in range(10)])
    assert said[0].startswith("600 samples, ") and list(rows) == ["independent", "tokens", "packed"]
    assert rows["packed"][3] == pytest.approx(loads.mean() / 10, abs=0.01)
    other = text.replace("packed", "store").replace("budget: 40.0, patch_size: 4, backbone_width: 16", "batch: 4")
    (tmp_path / "recipe.yaml").write_text(other)
    with pytest.raises(ConfigError, match="is not `packed`, so it packs nothing"):
        packing_report(tmp_path / "recipe.yaml")


def test_on_the_27_sizes_64_ranks_do_useful_work_and_independent_buckets_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert packing_report() == 0
    said = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(n.rstrip("%")) / 100 for n in line.split()[1:]] for line in said[2:]}
    useful, imbalance, worst, filled = rows["packed"]
    assert useful >= 0.98 and imbalance <= 0.02 and worst <= 0.02 and filled >= 0.98
    assert rows["independent"][0] < 0.6 and rows["independent"][1] > 0.5
    with pytest.raises(ConfigError, match=r"100 samples at a budget of .* fill no step of 64 ranks"):
        packing_report(samples=100)
