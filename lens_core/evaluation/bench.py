"""A benchmark run with a folder: `lens bench` as a function. Writes pictures/, table.md, result.json and sheet.png."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.attribution import building
from lens_core.catalog import Catalog
from lens_core.evaluation import report, run
from lens_core.evaluation.run import BenchmarkResult
from lens_core.inference import png_metadata
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, build, parse_use
from lens_core.types import LensError
from lens_core.validators import integer, optional

MAX_PROMPTS = 1_000_000
SHEET_IMAGES = 56  # on the contact sheet: seven rows of eight


@frozen
class BenchmarkRequest:
    """A benchmark, the model to measure, and how to draw. `images` may set steps, guidance scale and size."""

    benchmark: str  # a name, or as a recipe names it: '{use: shapes, split: train}'
    model: ModelRequest
    images: GenerateRequest = field(factory=GenerateRequest)
    limit: int | None = field(default=None, validator=optional(integer(at_least=1, at_most=MAX_PROMPTS)))  # prompts
    seed: int = 0
    batch_size: int = field(default=50, validator=integer(at_least=1))

    def spec(self) -> ComponentSpec:
        """The benchmark with its options."""
        named = parse_use(self.benchmark)
        return ComponentSpec(named.use, named.options | ({} if self.limit is None else {"prompts": self.limit}))


@frozen
class BenchmarkReport:
    """A finished run: its folder, the table in it, and what was measured under which settings."""

    folder: Path
    result: BenchmarkResult
    settings: dict[str, Any]
    seconds: float

    @property
    def text(self) -> str:
        """The table, and the settings in one line below it."""
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if k != "versions")
        return f"{report.table(self.result)}\n\n{settings}"


def run_benchmark(
    request: BenchmarkRequest,
    folder: Path | None = None,
    *,
    catalog: Catalog | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> BenchmarkReport:
    """Measure a model with a benchmark and write the results to `folder`, runs/bench-NAME if None.

    Raises LensError where drawing or scoring fails; the images that were drawn until then stay in the folder.
    """
    catalog = catalog or Catalog.installed()
    spec = request.spec()
    name, cls, config = build(catalog, "benchmark", spec, "$")
    folder = folder or Path("runs") / f"bench-{spec.use.replace(':', '-')}"
    pipeline = request.model.load(catalog=catalog)
    with building(name):
        benchmark = cls(config)
    start = time.perf_counter()
    pictures = folder / "pictures"
    try:
        result = run.evaluate(
            pipeline, benchmark, seed=request.seed, batch_size=request.batch_size, log=log,
            on_images=partial(report.save_pictures, pictures), ceiling=True, **request.images.arguments(),
        )  # fmt: skip
    except LensError as error:
        if not pictures.is_dir():
            raise
        raise type(error)(f"{error}; what was drawn is in {pictures}") from error
    finished = BenchmarkReport(folder, result, _settings(request, pipeline, result), time.perf_counter() - start)
    _write(finished, benchmark, request.seed)
    return finished


def _settings(request: BenchmarkRequest, pipeline: LensPipeline, result: BenchmarkResult) -> dict[str, Any]:
    """What decides the figures, as result.json and the table name it."""
    images, presets = request.images, pipeline.presets
    return {
        "benchmark": request.benchmark,
        "model": request.model.name,
        "model_hash": "+".join([pipeline.version, *pipeline.loras]),
        "seed": request.seed,
        "steps": images.steps or presets["steps"],
        "guidance_scale": presets["guidance_scale"] if images.guidance_scale is None else images.guidance_scale,
        "size": list(result.images.shape[-2:]),
        "dtype": pipeline.dtype,
        "device": pipeline.device.type,
        "versions": png_metadata.versions(),
    }


def _write(finished: BenchmarkReport, benchmark: Any, seed: int) -> None:
    folder, result = finished.folder, finished.result
    prompts = benchmark.prompts()
    atomic_files.write_atomic(folder / "table.md", lambda p: p.write_text(f"{finished.text}\n", encoding="utf-8"))
    measured = report.result_json(result, prompts, seed)
    seconds = round(finished.seconds, 1)
    atomic_files.write_json(folder / "result.json", {**finished.settings, "seconds": seconds, **measured})
    shown = min(SHEET_IMAGES, len(prompts))
    passed = [None if s.value is None else s.value >= 0.5 for s in result.scores[:shown]]
    sheet = report.contact_sheet(result.images[:shown], [p.text for p in prompts[:shown]], passed)
    atomic_files.write_atomic(folder / "sheet.png", lambda p: sheet.save(p, format="PNG"))
