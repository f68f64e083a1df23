"""What every test shares: one thread, no network, and a pipeline of toy parts."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import hub as stand_in
import pytest
import torch
import toy
from attrs import evolve

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline

torch.set_num_threads(1)

SCRIPTS = str(Path(__file__).parent.parent / "scripts")


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """The toy plugin and nothing else."""
    return Catalog.of(toy)


@pytest.fixture(scope="module")
def import_script() -> Iterator[Callable[[str], Any]]:
    """Imports a module of scripts/, which finds its neighbours."""
    sys.path.insert(0, SCRIPTS)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(SCRIPTS)


@pytest.fixture
def pipeline(catalog: Catalog) -> LensPipeline:
    """A toy pipeline whose every weight counts, the same in every test."""
    torch.manual_seed(0)
    return LensPipeline.from_parts(evolve(toy.PARTS, steps=3), catalog)


@pytest.fixture
def quick(pipeline: LensPipeline) -> LensPipeline:
    """The toy pipeline with pictures of 32 px, at guidance 1."""
    pipeline.presets |= {"guidance_scale": 1.0, "base_resolution": 32}
    return pipeline


@pytest.fixture
def checkpoint(pipeline: LensPipeline, tmp_path: Path) -> Path:
    """The toy pipeline on disk."""
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[stand_in.Hub]:
    """An empty Hub within reach, and an empty cache."""
    with stand_in.serve() as running:
        stand_in.use(running, monkeypatch, tmp_path / "cache")
        yield running


@pytest.fixture
def unplug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[stand_in.Hub], None]:
    """Go offline, as HF_HUB_OFFLINE does."""

    def call(running: stand_in.Hub) -> None:
        stand_in.use(running, monkeypatch, tmp_path / "cache", offline=True)
        running.requests.clear()

    return call
