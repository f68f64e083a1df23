"""Memory a picture takes while a store is filled and while it is open: under 300 bytes, whatever its captions are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from lens_data import caching, dataset, imports
from lens_data.caching import EncodingCache
from lens_data.dataset import StoreDataset
from lens_data.store import Store

from lens_core.io.sources import SourceItem

MANY = 6000
MADE_BY = {"vae": {"name": "one", "hash": "1"}}


def items() -> Iterator[SourceItem]:
    for number in range(MANY):
        yield SourceItem(f"{number}", b"%d" % number, ({"brief": f"no {number}", "dense": f"picture {number} " * 50},))


def peak(run: Callable[[], object]) -> float:
    """Bytes a picture, of Python, numpy and Arrow, above what there was before."""
    arrow = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(arrow)
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run()
        return (tracemalloc.get_traced_memory()[1] - base + arrow.max_memory()) / MANY
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is held for a while, whatever the number of pictures, is small beside them."""
    monkeypatch.setattr(imports, "ROWS", 200)
    monkeypatch.setattr(dataset, "ROWS", 200)
    monkeypatch.setattr(imports.pictures, "read", lambda data: SimpleNamespace(size=(64, 64)))
    Store(str(tmp_path / "store"), create=True)  # what lancedb itself takes is not counted
    return tmp_path / "store"


def test_an_import_of_new_and_of_known_pictures(store: Path) -> None:
    for added in (MANY, 0):
        reports: list[imports.ImportReport] = []
        assert peak(lambda made=reports: made.append(imports._fill(store, items(), "dense", "here", False))) < 300
        assert reports[0].added == added and reports[0].total == MANY


def test_opening_a_store_and_a_cache(store: Path) -> None:
    imports._fill(store, items(), "dense", "here", False)
    plain = StoreDataset.Config(str(store), buckets=(((64, 64),),), batch=8)
    assert peak(lambda: StoreDataset(plain)) < 300
    keys = [key for key, _ in StoreDataset(plain).encodings()]
    assert len(keys) == len(set(keys)) == 2 * MANY
    EncodingCache(Store(str(store)), "c", MADE_BY).add(dict.fromkeys(keys, b""))
    cached = StoreDataset.Config(str(store), buckets=(((64, 64),),), batch=8, cache="c")
    assert peak(lambda: StoreDataset(cached)) < 600
    assert EncodingCache(Store(str(store)), "c").lacking([*keys, "t:other"]) == (1, 2 * MANY + 1)
    assert caching.text_key("other") not in EncodingCache(Store(str(store)), "c")
