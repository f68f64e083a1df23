"""The tests that need a GPU. Without one they are skipped; LENS_TEST_DEVICE=cpu runs them on the CPU, as a rehearsal.

With LENS_GPU_RESULTS=FILE the outcome of each test is in that file as soon as it is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that are the same in every run

import pytest
import torch

from lens_core import Catalog, LensPipeline

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("LENS_TEST_DEVICE", "cuda")
RESULTS = os.environ.get("LENS_GPU_RESULTS")
OUTCOMES: dict[str, dict[str, Any]] = {}


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs a CUDA device; LENS_TEST_DEVICE=cpu runs it on the CPU")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if WANTED == "cuda" and not torch.cuda.is_available():
                item.add_marker(missing)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (
        RESULTS is None
        or "PYTEST_XDIST_WORKER" in os.environ
        or not (report.when == "call" or report.outcome != "passed")
    ):
        return
    line: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line["error"] = " ".join(str(getattr(crash, "message", report.longrepr)).split())[:600]
    line |= dict(report.user_properties)
    OUTCOMES[report.nodeid.removeprefix("tests/gpu/")] = line
    part = Path(f"{RESULTS}.part")
    part.write_text(json.dumps({"tests": OUTCOMES}, indent=1, sort_keys=True), encoding="utf-8")
    part.replace(RESULTS)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(WANTED)


@pytest.fixture(scope="session")
def installed() -> Catalog:
    return Catalog.installed()


@pytest.fixture
def tiny(installed: Catalog, device: torch.device) -> LensPipeline:
    """The embedded checkpoint in float32 on the device."""
    return LensPipeline.from_pretrained("tiny:", catalog=installed, dtype=torch.float32, device=device)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Attention's backward pass adds in any order on a GPU, unless it is asked for one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 is float32: convolutions would take TF32, of 10 bits."""
    torch.manual_seed(0)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    if torch.cuda.is_available():
        torch.cuda.synchronize()
