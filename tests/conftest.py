"""What every test shares: one thread, no network, and a pipeline of toy parts."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import toy

from lens_core.catalog import Catalog
from lens_core.config import Parts, Use
from lens_core.pipeline import LensPipeline

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """The toy plugin and nothing else."""
    return Catalog.of(toy)


@pytest.fixture
def pipeline(catalog: Catalog) -> LensPipeline:
    """A toy pipeline whose every weight counts, the same in every test."""
    torch.manual_seed(0)
    parts = Parts(vae=Use("blocks"), text_encoder=Use("letters"), backbone=Use("mixer"), sampler=Use("even"), steps=3)
    return LensPipeline.from_parts(parts, catalog)


@pytest.fixture
def checkpoint(pipeline: LensPipeline, tmp_path: Path) -> Path:
    """The toy pipeline on disk."""
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
