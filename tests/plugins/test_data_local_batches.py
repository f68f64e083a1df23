"""The dataset `store` with `local_batch_sizes`: each rank draws its own bucket, with the batch size of its area."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import lens_data
import lens_flow
import numpy as np
import pytest
import torch
import toy
from lens_data.buckets import LENS_BUCKETS
from lens_data.dataset import StoreDataset
from lens_data.mix import Mix
from lens_data.packed import PackedDataset
from test_data_dataset import BUCKETS, corrupt, fill

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.recipe import ComponentSpec, Recipe, structure
from lens_core.testing import check_dataset
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError

LOCAL = (6, 2)  # samples of a rank at 16 px and at 32 px


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures: 20, 10, 10 in the buckets of the first group, 10 in that of the second."""
    return fill(tmp_path_factory.mktemp("data") / "store", 50)


def make(store: Path, **config: object) -> StoreDataset:
    options = {"store": str(store), "buckets": BUCKETS, "local_batch_sizes": LOCAL, **config}
    return StoreDataset(StoreDataset.Config(**options))


def take(dataset: StoreDataset, number: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.batches(rank, world), number))


def samples(batch: Batch) -> list[tuple[str, int, bytes]]:
    """The samples of a batch, whole."""
    return [(c, k, i.numpy().tobytes()) for c, k, i in zip(batch.captions, batch.keys, batch.images, strict=True)]


def steps(store: Path, number: int, world: int, **config: object) -> list[list[Batch]]:
    """Of each step, the batches of all ranks."""
    ranks = [take(make(store, **config), number, rank, world) for rank in range(world)]
    return [list(step) for step in zip(*ranks, strict=True)]


def test_a_rank_has_the_batch_size_of_its_area_and_need_not_share_it(store: Path) -> None:
    drawn = steps(store, 20, world=4)
    for batch in (batch for step in drawn for batch in step):
        height, width = batch.images.shape[2:]
        assert len(batch) == (2 if (height, width) == (32, 32) else 6)
    assert any(len({batch.images.shape[2:] for batch in step}) > 1 for step in drawn)
    assert any(len({len(batch) for batch in step}) > 1 for step in drawn)


def test_batch_sizes_follow_the_groups_as_they_are_named_and_not_their_areas(store: Path) -> None:
    backwards = steps(store, 8, world=2, buckets=BUCKETS[::-1], local_batch_sizes=LOCAL[::-1])
    assert [samples(b) for step in backwards for b in step] == [
        samples(b) for step in steps(store, 8, world=2) for b in step
    ]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_number_of_ranks_sees_the_same_stream(store: Path, world: int) -> None:
    one = [samples(batch) for (batch,) in steps(store, 24, world=1)]
    many = [samples(batch) for step in steps(store, 24 // world, world) for batch in step]
    assert many == one


def test_every_picture_has_its_turn_equally_often_whatever_its_area(store: Path) -> None:
    seen = Counter(caption for (batch,) in steps(store, 240, world=1) for caption in batch.captions)
    assert len(seen) == 50 and max(seen.values()) - min(seen.values()) <= 3 and min(seen.values()) > 15


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
@pytest.mark.parametrize("world", [2, 3])
def test_a_run_that_stopped_goes_on_in_the_stream_with_other_ranks(store: Path, stop: int, world: int) -> None:
    stream = [samples(batch) for (batch,) in steps(store, stop * 2 + 4 * world, world=1)]
    stopped = [make(store) for _ in range(2)]
    for rank, dataset in enumerate(stopped):
        take(dataset, stop, rank, 2)
    state = json.loads(json.dumps(stopped[0].state_dict()))
    assert state == stopped[1].state_dict()  # one state does for all ranks, and batches read ahead do not count
    assert (state["batch"], state["local_batches"]) == (stop, 2 * stop)
    ranks = [make(store) for _ in range(world)]
    for dataset in ranks:
        dataset.load_state_dict(state)
    goes_on = [take(dataset, 4, rank, world) for rank, dataset in enumerate(ranks)]
    assert [samples(goes_on[rank][n]) for n in range(4) for rank in range(world)] == stream[2 * stop :]


def test_weighted_means_of_ranks_are_the_mean_over_all_samples_of_the_step(store: Path) -> None:
    for step in steps(store, 12, world=4):
        assert sum(batch.weight for batch in step) == pytest.approx(4)
        values = [batch.images.double().mean((1, 2, 3)) for batch in step]
        by_ranks = sum(batch.weight * float(v.mean()) for batch, v in zip(step, values, strict=True)) / 4
        assert by_ranks == pytest.approx(float(torch.cat(values).mean()))


def test_what_replaces_a_corrupt_picture_does_not_follow_from_the_ranks(tmp_path: Path) -> None:
    path = corrupt(tmp_path / "store", 5, 10, 13, 24)
    with pytest.warns(UserWarning, match="is corrupt"):
        one = [samples(batch) for (batch,) in steps(path, 24, world=1)]
    with pytest.warns(UserWarning, match="is corrupt"):
        four = [samples(batch) for step in steps(path, 6, world=4) for batch in step]
    assert four == one


def test_it_keeps_the_contract_of_a_dataset(store: Path) -> None:
    check_dataset(lambda: make(store))


def test_captions_are_drawn_by_the_place_in_the_stream(store: Path) -> None:
    captions = [batch.captions for (batch,) in steps(store, 60, world=1, dense_caption_ratio=0.5)]
    flat = [c[0] for batch in captions for c in batch]
    assert abs(np.mean([kind == "d" for kind in flat]) - 0.5) < 0.1
    assert [b.captions for s in steps(store, 30, 2, dense_caption_ratio=0.5) for b in s] == captions


def test_a_run_whose_ranks_draw_areas_of_their_own_ends_with_the_same_bits_when_it_was_stopped(
    store: Path, tmp_path: Path
) -> None:
    buckets = [[[16, 16], [16, 32], [32, 16]], [[32, 32]]]
    options = {"store": str(store), "buckets": buckets, "max_upscale": 1.5, "local_batch_sizes": LOCAL}
    parts = {"vae": "blocks", "text_encoder": "letters", "backbone": {"use": "mixer", "width": 8}, "sampler": "euler"}
    settings = {"steps": 6, "lr": 1e-2, "save_every": 3, "keep_checkpoints": 9, "micro_batches": 3}
    data = {"use": "store", **options}
    recipe = structure(Recipe, {"pipeline": parts, "method": "flow_matching", "dataset": data, "train": settings})
    catalog = Catalog.of(toy, lens_data, lens_flow)
    Trainer(recipe, catalog, tmp_path / "whole", log=lambda line: None).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-0000006")
    Trainer(recipe, catalog, tmp_path / "again", log=lambda line: None).train()
    whole, again, begun = (
        tensor_files.read_tensors(tmp_path / run / "checkpoints" / step / "state.safetensors")
        for run, step in (("whole", "step-0000006"), ("again", "step-0000006"), ("whole", "step-0000003"))
    )
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert any(not torch.equal(begun[k], whole[k]) for k in begun if k.startswith("net/"))


def test_each_group_of_buckets_needs_a_size(store: Path) -> None:
    with pytest.raises(ConfigError, match="local_batch_sizes has 1 sizes for 2 groups of buckets; give one for each"):
        make(store, local_batch_sizes=(4,))
    with pytest.raises(ConfigError, match=r"local_batch_sizes\[1\]: must be at least 1"):
        make(store, local_batch_sizes=(4, 0))
    with pytest.raises(ConfigError, match="too few for a batch of 51"):
        make(store, local_batch_sizes=(51, 1))


def test_a_dry_run_says_what_each_rank_costs_without_a_store() -> None:
    """By hand: n = h w / 256 + 22 + 1.3 x 109 tokens cost 48 (24 1536^2 n + 4 1536 n^2) FLOPs."""
    config = StoreDataset.Config("nowhere", buckets=LENS_BUCKETS, local_batch_sizes=(24, 10, 6))
    head, _, *rows, last = StoreDataset.estimate(config).splitlines()
    assert head == "dataset: each rank draws a bucket of its own; a rank's batch"
    work = []
    for row, group, count in zip(rows, LENS_BUCKETS, (24, 10, 6), strict=True):
        tokens = np.array([h * w / 256 for h, w in group]) + 22 + 1.3 * 109
        work.append(count * np.mean(48 * (24 * 1536**2 * tokens + 4 * 1536 * tokens**2)))
        assert row.split()[3:6] == [str(count), f"{count * tokens.mean():,.0f}", f"{work[-1] / 1e12:.1f}"]
    ratio = np.array(work) / np.mean(work)
    assert [row.split()[-1] for row in rows] == [f"{r:.2f}" for r in ratio] and ratio.max() < 1.15  # about equal
    assert last == f"the slowest group takes {ratio.max() - 1:.1%} more than the mean"
    assert "all ranks share one bucket" in StoreDataset.estimate(StoreDataset.Config("nowhere"))
    assert "64 pictures of 4096 tokens" in PackedDataset.estimate(
        PackedDataset.Config("nowhere", buckets=(((1024, 1024),),))
    )
    mixed = Mix.Config(
        (ComponentSpec("store", {"store": "nowhere", "local_batch_sizes": [24, 10, 6]}), ComponentSpec("shapes"))
    )
    assert "each rank draws a bucket of its own" in Mix.estimate(mixed)
