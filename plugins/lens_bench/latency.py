"""Seconds a picture by part: encode the prompt, denoise, decode, save; cold and warm; and the peak of memory."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.inference import png_metadata
from lens_core.types import ConfigError, PictureRequest

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

PARTS = ("encode", "denoise", "decode", "save")
PROMPT = "a photo of a red apple and a blue cup on a wooden table"


@frozen
class Timing:
    """Seconds of one picture; `parts` sum up to `total`, apart from what stands between them."""

    total: float
    parts: Mapping[str, float]


@frozen
class Latency:
    """`load`: seconds until the model is there. `cold` is the first picture, `warm` are the following ones."""

    load: float
    cold: Timing
    warm: tuple[Timing, ...]
    peak_bytes: int | None  # of the GPU's memory; on a CPU of the process; None where the system does not say
    description: Mapping[str, Any]

    def median(self, part: str = "") -> float:
        """Of the warm pictures, in seconds; of all parts together where `part` is ""."""
        return statistics.median(t.parts[part] if part else t.total for t in self.warm)


def measure(generator: Any, size: tuple[int, int] | None, pictures: int, prompt: str = PROMPT) -> Latency:
    """Draw 1 + `pictures` pictures one at a time. Parts are known of Lens pipelines; of other generators, which may be
    remote, only the total is. Raises ConfigError for fewer than one warm picture."""
    if pictures < 1:
        raise ConfigError(f"--pictures must be at least 1, not {pictures}")
    start = time.perf_counter()
    info = generator.describe()
    load = time.perf_counter() - start
    pipeline = generator.pipeline if isinstance(generator, PipelineGenerator) else None
    _reset_peak(pipeline)
    timings = [_timed(generator, pipeline, PictureRequest(prompt, i, size, "0", i)) for i in range(1 + pictures)]
    settings = {"system": info.name, "revision": info.revision, "settings": dict(info.settings), "size": size}
    return Latency(load, timings[0], tuple(timings[1:]), _peak(pipeline), settings)


def _timed(generator: Any, pipeline: LensPipeline | None, request: PictureRequest) -> Timing:
    parts: dict[str, float] = {}
    with _watched(pipeline, parts):
        start = time.perf_counter()
        (outcome,) = generator.generate([request])
        total = time.perf_counter() - start
    if outcome.status != "ok":
        raise ConfigError(f"the picture is {outcome.status} ({outcome.reason}); nothing can be timed")
    if pipeline is not None:
        parts["save"] = _save_seconds(outcome.image)
    return Timing(total, {name: parts[name] for name in PARTS if name in parts})


@contextmanager
def _watched(pipeline: LensPipeline | None, parts: dict[str, float]) -> Iterator[None]:
    """Count the seconds of the pipeline's own methods into `parts`, after whatever is queued on its device."""
    if pipeline is None:
        yield
        return
    names = {"encode_once": "encode", "decode": "decode"}
    cls = type(pipeline)

    def timed(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            _wait(pipeline)
            start = time.perf_counter()
            result = method(*arguments, **options)
            _wait(pipeline)
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - start
            return result

        return call

    def sampled(*arguments: Any, **options: Any) -> Iterator[Any]:
        _wait(pipeline)
        start = time.perf_counter()
        yield from cls.sample(pipeline, *arguments, **options)
        _wait(pipeline)
        parts["denoise"] = parts.get("denoise", 0.0) + time.perf_counter() - start

    try:
        for name, part in names.items():
            setattr(pipeline, name, timed(getattr(pipeline, name), part))
        pipeline.sample = sampled  # type: ignore[method-assign,assignment]  # for the time of one picture
        yield
    finally:
        for name in (*names, "sample"):
            pipeline.__dict__.pop(name, None)


def _wait(pipeline: LensPipeline | None) -> None:
    import torch

    if pipeline is not None and pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


def _save_seconds(data: bytes) -> float:
    """How long it takes to write the picture as PNG once more, with its facts."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    start = time.perf_counter()
    png_metadata.save_to(image, io.BytesIO(), {"prompt": PROMPT})
    return time.perf_counter() - start


def _reset_peak(pipeline: LensPipeline | None) -> None:
    import torch

    if pipeline is not None and pipeline.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipeline.device)


def _peak(pipeline: LensPipeline | None) -> int | None:
    import torch

    if pipeline is None:
        return None
    if pipeline.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(pipeline.device))
    try:
        import resource
        import sys
    except ImportError:  # no such module on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_json(latency: Latency, machine: str) -> dict[str, Any]:
    """For latency.json: everything, and the machine by name."""
    return {
        **latency.description,
        "machine": machine,
        "load_seconds": latency.load,
        "cold": {"total": latency.cold.total, **latency.cold.parts},
        "warm": [{"total": t.total, **t.parts} for t in latency.warm],
        "seconds_per_picture": latency.median(),
        "peak_bytes": latency.peak_bytes,
        "versions": png_metadata.versions(),
    }


def table(latency: Latency) -> str:
    """A line for each part: the first picture, and the median and the range of the following ones."""
    rows = ["| part | cold, s | warm, s (median) | warm, s (range) |", "|---|---|---|---|"]
    for part in (*latency.cold.parts, ""):
        values = [t.parts[part] if part else t.total for t in latency.warm]
        cold = latency.cold.parts[part] if part else latency.cold.total
        span = f"{min(values):.4f} to {max(values):.4f}"
        rows.append(f"| {part or '**a picture**'} | {cold:.4f} | {statistics.median(values):.4f} | {span} |")
    peak = "unknown" if latency.peak_bytes is None else f"{latency.peak_bytes / 2**20:,.0f} MiB"
    rows += ["", f"load {latency.load:.2f} s, peak memory {peak}, {len(latency.warm)} warm pictures"]
    return "\n".join(rows)


def machine() -> str:
    """The GPU's name, or the processor's and how many of its cores this process may use."""
    import os
    import platform
    from pathlib import Path

    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"
