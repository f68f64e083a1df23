"""The dataset `store`: buckets, epochs, ranks, exact state, and pictures that turn out to be corrupt."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import lens_data
import lens_flow
import numpy as np
import pytest
import torch
import toy
from lens_data.dataset import StoreDataset
from lens_data.store import Store
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, Recipe, Training, structure
from lens_core.training.memory_estimate import memory
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, LensError

BUCKETS = (((16, 16), (16, 24), (24, 16)), ((32, 32),))
SIZES = [(16, 16), (16, 24), (24, 16), (32, 32), (20, 20)]  # of the pictures; the last is shown at 16x16


def row(number: int, height: int, width: int, **changes: object) -> dict[str, object]:
    """A picture that says its number: every pixel is (number, 7, number)."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number, 7, number)).save(file, "PNG")
    data = file.getvalue()
    key = hashlib.sha256(data).hexdigest()
    words = {"brief": f"b{number}", "dense": f"d{number}"}
    return {"id": key, "image": data, "height": height, "width": width, "source": "test", **words, **changes}


def fill(path: Path, count: int, begin: int = 0) -> Path:
    Store(str(path), create=True).add([row(n, *SIZES[n % 5]) for n in range(begin, begin + count)])
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures, 10 of each size: 20, 10, 10, 10 in the buckets."""
    return fill(tmp_path_factory.mktemp("data") / "store", 50)


def make(store: Path, **config: object) -> StoreDataset:
    return StoreDataset(StoreDataset.Config(**{"store": str(store), "buckets": BUCKETS, "batch": 4, **config}))


def take(dataset: StoreDataset, number: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(islice(dataset.batches(rank, world), number))


def same(a: Batch, b: Batch) -> bool:
    return a.captions == b.captions and a.keys == b.keys and torch.equal(a.images, b.images)


def numbers(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_a_batch_is_pictures_of_one_bucket_with_their_own_captions(store):
    seen = set()
    for batch in take(make(store), 25):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[:2] == (4, 3)
        size = tuple(batch.images.shape[2:])
        for number, caption, image in zip(numbers(batch), batch.captions, batch.images, strict=True):
            assert caption == f"d{number}" and image[1].unique().tolist() == [7]
            assert size == (SIZES[number % 5] if number % 5 < 4 else (16, 16))
        seen.add(size)
    assert seen == {(16, 16), (16, 24), (24, 16), (32, 32)}


def test_equal_keys_are_equal_pictures(store):
    pairs = {(key, n) for b in take(make(store), 30) for key, n in zip(b.keys, numbers(b), strict=True)}
    assert len(pairs) == len(dict(pairs)) == len({n for _, n in pairs}) == 50


def test_every_picture_has_its_turn_once_a_pass_even_in_a_bucket_that_fills_no_batch(tmp_path):
    path = fill(tmp_path / "store", 15)  # 6, 3, 3, 3 in the buckets; 3 are fewer than a batch
    batches = take(make(path), 60)  # 240 samples of 15: 16 passes
    counts = Counter(n for b in batches for n in numbers(b))
    assert sorted(counts) == list(range(15)) and set(counts.values()) == {16}


def test_no_pass_is_like_another_and_none_begins_before_the_last_ended(store):
    stream = [n for b in take(make(store, seed=5), 100) if b.images.shape[2:] == (16, 24) for n in numbers(b)]
    passes = [tuple(stream[i : i + 10]) for i in range(0, len(stream) - 9, 10)]
    assert len(passes) >= 7 and len(set(passes)) == len(passes)
    # Within an epoch a bucket's batches come in any order, so sets are compared over whole rounds of both.
    assert Counter(stream[:40]) == Counter({n: 4 for n in range(50) if n % 5 == 1})


def test_the_seed_alone_decides(store):
    first = take(make(store, seed=3), 12)
    assert all(same(a, b) for a, b in zip(first, take(make(store, seed=3, prefetch_workers=1), 12), strict=True))
    assert [b.captions for b in first] != [b.captions for b in take(make(store, seed=4), 12)]


def test_the_order_of_imports_is_no_matter(store, tmp_path):
    other = tmp_path / "store"
    for begin in (40, 0, 20, 30, 10):
        fill(other, 10, begin)
    assert all(same(a, b) for a, b in zip(take(make(store), 12), take(make(other), 12), strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_one_bucket_and_share_the_global_batch(store, world):
    parts = [take(make(store), 10, rank, world) for rank in range(world)]
    for n, whole in enumerate(take(make(store), 10)):
        assert torch.equal(whole.images, torch.cat([part[n].images for part in parts]))
        assert whole.captions == sum((part[n].captions for part in parts), ())
        assert whole.keys == sum((part[n].keys for part in parts), ())


@pytest.mark.parametrize("stop", range(0, 16, 3))
def test_a_run_that_stopped_after_any_batch_goes_on_with_other_ranks(store, stop):
    whole = take(make(store), stop + 4)
    first = [make(store) for _ in range(2)]
    for rank, dataset in enumerate(first):
        take(dataset, stop, rank, 2)
    state = json.loads(json.dumps(first[0].state_dict()))
    assert state == first[1].state_dict() and state["batch"] == stop  # batches read ahead do not count
    parts = [make(store) for _ in range(4)]
    for dataset in parts:
        dataset.load_state_dict(state)
    parts = [take(dataset, 4, rank, 4) for rank, dataset in enumerate(parts)]
    for n, batch in enumerate(whole[stop:]):
        assert torch.equal(batch.images, torch.cat([part[n].images for part in parts]))
        assert batch.captions == sum((part[n].captions for part in parts), ())


RESUME = """
import hashlib, json, sys
from itertools import islice
from lens_data.dataset import StoreDataset
store, state, world = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
buckets = (((16, 16), (16, 24), (24, 16)), ((32, 32),))
for rank in range(world):
    dataset = StoreDataset(StoreDataset.Config(store=store, buckets=buckets, batch=4))
    dataset.load_state_dict(state)
    for batch in islice(dataset.batches(rank, world), 5):
        print(batch.images.numpy().tobytes().hex()[:64], *batch.captions, *batch.keys)
"""


def test_a_new_process_goes_on_with_the_same_batches(store):
    dataset = make(store)
    take(dataset, 7)
    arguments = [sys.executable, "-c", RESUME, str(store), json.dumps(dataset.state_dict()), "1"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    lines = subprocess.run(arguments, capture_output=True, text=True, check=True, env=paths).stdout.splitlines()
    expected = [
        " ".join([b.images.numpy().tobytes().hex()[:64], *b.captions, *map(str, b.keys)])
        for b in take(make(store), 12)[7:]
    ]
    assert lines == expected


def test_a_store_that_grew_meanwhile_is_read_as_it_was(tmp_path):
    path = fill(tmp_path / "store", 30)
    whole, dataset = take(make(path), 12), make(path)
    running = dataset.batches(0, 1)
    begun = [next(running) for _ in range(5)]
    fill(path, 20, 30)
    begun += [next(running)]  # a running one does not notice
    assert all(same(a, b) for a, b in zip(begun, whole[:6], strict=True))
    grown = make(path)
    assert [b.captions for b in take(grown, 6)] != [b.captions for b in whole[:6]]
    resumed = make(path)
    resumed.load_state_dict(dataset.state_dict())
    assert all(same(a, b) for a, b in zip(take(resumed, 6), whole[6:], strict=True))
    assert resumed.state_dict()["version"] == dataset.state_dict()["version"]


def test_new_captions_meanwhile_do_not_reach_a_resumed_run(tmp_path):
    path = fill(tmp_path / "store", 20)
    whole, dataset = take(make(path), 8), make(path)
    take(dataset, 2)
    Store(str(path)).replace([row(n, *SIZES[n % 5], dense="new") for n in range(20)])
    assert {c for b in take(make(path), 8) for c in b.captions} == {"new"}
    resumed = make(path)
    resumed.load_state_dict(dataset.state_dict())
    assert all(same(a, b) for a, b in zip(take(resumed, 6), whole[2:], strict=True))


def test_a_copied_store_will_do_and_another_store_will_not(tmp_path):
    path = fill(tmp_path / "store", 20)
    dataset = make(path)
    take(dataset, 3)
    state = {**dataset.state_dict(), "version": 99}  # the copy has versions of its own
    shutil.copytree(path, tmp_path / "copy")
    copy = make(tmp_path / "copy")
    copy.load_state_dict(state)
    assert same(take(copy, 1)[0], take(dataset, 1)[0])
    other = make(fill(tmp_path / "other", 20, 5))
    with pytest.raises(LensError, match="holds other pictures than when the run stopped"):
        other.load_state_dict(state)


def test_dense_is_the_share_of_dense_captions_and_what_is_missing_is_replaced(tmp_path, store):
    captions = [c for b in take(make(store, dense_caption_ratio=0.25, batch=10), 100) for c in b.captions]
    assert sum(c.startswith("d") for c in captions) / 1000 == pytest.approx(0.25, abs=0.05)
    assert {c[0] for b in take(make(store, dense_caption_ratio=0.0), 10) for c in b.captions} == {"b"}
    path = tmp_path / "store"
    Store(str(path), create=True).add([row(n, 16, 16, **{k: ""}) for n, k in enumerate(["brief", "dense"] * 4)])
    with pytest.warns(UserWarning, match="3 of 4 buckets have no picture: 16x24, 24x16, 32x32"):
        dataset = make(path)
    assert {c for b in take(dataset, 2) for c in b.captions} == {f"{'bd'[1 - n % 2]}{n}" for n in range(8)}


def corrupt(path: Path, *which: int) -> Path:
    """50 pictures, some of which are torn although the store has their sizes."""
    rows = [row(n, *SIZES[n % 5]) for n in range(50)]
    for n in which:
        rows[n]["image"] = rows[n]["image"][:50]
    Store(str(path), create=True).add(rows)
    return path


def test_a_corrupt_picture_is_replaced_by_another_of_its_bucket_and_counted(store, tmp_path):
    path = corrupt(tmp_path / "store", 1, 6, 8)
    sound, dataset = take(make(store), 25), make(path)
    with pytest.warns(UserWarning, match="is corrupt .*; replaced") as warned:
        batches = take(dataset, 25)
    assert len(dataset.corrupt) == 3 == len(warned)
    assert set(dataset.corrupt) == {row(n, *SIZES[n % 5])["id"] for n in (1, 6, 8)}
    replaced = 0
    for batch, before in zip(batches, sound, strict=True):
        for n, was, caption in zip(numbers(batch), numbers(before), batch.captions, strict=True):
            assert n not in (1, 6, 8) and caption == f"d{n}"
            assert n == was or was in (1, 6, 8)
            replaced += n != was
    assert replaced == sum(n in (1, 6, 8) for b in sound for n in numbers(b)) > 0


@pytest.mark.filterwarnings("ignore:.*is corrupt")
def test_substitutes_are_the_same_for_any_ranks_and_after_a_resume(tmp_path):
    path = corrupt(tmp_path / "store", *range(1, 50, 10), *range(3, 50, 10))
    whole = take(make(path), 20)
    parts = [take(make(path), 20, rank, 4) for rank in range(4)]
    resumed = make(path)
    resumed.load_state_dict({**resumed.state_dict(), "batch": 9})
    assert all(same(a, b) for a, b in zip(take(resumed, 11), whole[9:], strict=True))
    for n, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([part[n].images for part in parts]))


def test_a_bucket_of_nothing_but_corrupt_pictures_ends_with_one_clear_line(tmp_path):
    path = corrupt(tmp_path / "store", *range(3, 50, 5))
    with pytest.raises(LensError, match=r"pictures drawn from the bucket 32x32 cannot be decoded; import"):
        take(make(path), 40)


def test_what_fits_no_bucket_is_reported(store, tmp_path):
    with pytest.warns(UserWarning, match="of 50 pictures, 40 too small are left out"):
        dataset = make(store, buckets=(((32, 32),),))
    assert {tuple(b.images.shape[2:]) for b in take(dataset, 3)} == {(32, 32)}
    message = "0 of 50 pictures fit the buckets, too few for a batch of 4; 50 are too small; lower batch"
    with pytest.raises(ConfigError, match=message):
        make(store, buckets=(((512, 512),),))
    with pytest.raises(ConfigError, match="50 of 50 pictures fit the buckets, too few for a batch of 51"):
        make(store, batch=51)


def test_every_area_shows_large_pictures_at_small_sizes_too(store):
    sizes = {}
    for batch in take(make(store, every_area=True), 60):
        for n in numbers(batch):
            sizes.setdefault(n, set()).add(tuple(batch.images.shape[2:]))
    assert all(sizes[n] == {(16, 16), (32, 32)} for n in range(3, 50, 5))


def test_stopping_early_leaves_no_thread(store):
    import threading

    batches = make(store).batches(0, 1)
    next(batches)
    assert any(t.name.startswith("store") for t in threading.enumerate())
    batches.close()
    assert not any(t.name.startswith("store") for t in threading.enumerate())


def test_a_recipe_names_the_store_and_its_table():
    options = {"store": "x", "buckets": [[[512, 512]], [[768, 768], [864, 640]]], "dense_caption_ratio": 0.8}
    config = structure(StoreDataset.Config, options)
    assert config.buckets == (((512, 512),), ((768, 768), (864, 640)))
    assert sum(map(len, structure(StoreDataset.Config, {"store": "x"}).buckets)) == 27
    with pytest.raises(ConfigError, match=r"\$\.store: missing"):
        structure(StoreDataset.Config, {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buckets": ()}, "buckets: must have at least 1 item"),
        ({"buckets": (((0, 512),),)}, r"buckets\[0\]\[0\]\[0\]: must be at least 1"),
        ({"buckets": (((512, 512),), ((512, 512),))}, "name a size twice"),
        ({"batch": 0}, "batch: must be at least 1"),
        ({"prefetch_workers": 0}, "prefetch_workers: must be at least 1"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"dense_caption_ratio": 1.5}, "dense_caption_ratio: must be at least 0 and at most 1"),
        ({"max_crop": 1.0}, "max_crop: must be at least 0 and below 1"),
        ({"max_upscale": 0.0}, "max_upscale: must be above 0"),
        ({"cache": "a/b"}, "cache: must be a name"),
    ],
)
def test_a_wrong_config_is_refused_with_its_cure(wrong, message):
    with pytest.raises(ConfigError, match=message):
        StoreDataset.Config(store="x", **wrong)


def test_without_lancedb_the_dataset_is_offered_and_names_the_extra(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    entry = Catalog.of(lens_data).find("dataset", "store")
    with pytest.raises(LensError, match=r"pip install 'lens-t2i\[data\]'"):
        entry.cls(entry.cls.Config(str(store)))


def test_a_batch_that_ranks_cannot_share_is_refused(store):
    with pytest.raises(ConfigError, match="multiple of 3"):
        take(make(store), 1, 0, 3)


def test_read_ahead_in_many_threads_keeps_the_order(store, monkeypatch):
    import time

    import lens_data.dataset as module

    decode, rng = module.pictures.read, np.random.default_rng(0)

    def slow(data: bytes) -> Image.Image:
        time.sleep(rng.random() / 200)
        return decode(data)

    expected = take(make(store, prefetch_workers=1), 20)
    monkeypatch.setattr(module.pictures, "read", slow)
    assert all(same(a, b) for a, b in zip(take(make(store, prefetch_workers=8), 20), expected, strict=True))


def test_more_ranks_than_samples_are_refused(store):
    with pytest.raises(ConfigError, match="a batch of 4 has no equal shares for 8 ranks; use a multiple of 8"):
        take(make(store), 1, world=8)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_bucket_that_is_not_on_the_grid_of_the_vae_is_refused_before_anything_is_trained(store, tmp_path, mixed):
    part = {"store": str(store), "buckets": (((16, 16), (16, 24)),), "batch": 2}
    dataset = ComponentSpec("mix", {"datasets": [{"use": "store", **part}]}) if mixed else ComponentSpec("store", part)
    catalog = Catalog.of(toy, lens_data, lens_flow)
    plan = Recipe(
        method=ComponentSpec("flow_matching"), dataset=dataset, train=Training(steps=2, lr=1e-2), pipeline=toy.PARTS
    )
    message = r"\$\.dataset.*\.buckets: width 24 is not a multiple of 16 px, the VAE's grid; use"
    with pytest.raises(ConfigError, match=message):
        memory(plan, catalog)
    with pytest.raises(ConfigError, match=message):
        Trainer(plan, catalog, tmp_path / "run", log=lambda line: None)
