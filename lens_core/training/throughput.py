"""How fast a run is: steps and samples a second, waiting for data, FLOP/s and MFU, memory, averaged metrics."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lens_core.types import Batch

PEAKS = {
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H200 NVL": 835e12,
    "GH200 480GB": 989e12, "A100-SXM4-40GB": 312e12, "A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12, "B200": 2250e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s (the vendor's data sheets) by the device's name as CUDA has it, without "NVIDIA ". It must be
the whole name: an RTX A1000 is no A100, and a MIG slice is less than the card it is of."""


def peak(device: torch.device) -> float | None:
    """The most FLOP/s that a device can do; None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return PEAKS.get(name.removeprefix("NVIDIA "))


def has_fast_bfloat16(device: torch.device) -> bool:
    """False for an x86 CPU without instructions for bfloat16: it takes several times as long as in float32 there."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return known.get("architecture") != "x86_64" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class TimedLoader:
    """A dataset's batches, passed on; counts the samples, and the seconds that the run waits for them."""

    def __init__(self) -> None:
        self.samples, self.waited = 0, 0.0

    def through(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.samples += len(batch)
            yield batch


class MetricBuffer:
    """What steps tell, until it is logged: kept where it was computed, so that nobody waits for the device meanwhile.

    A step's value of a name is the sum over the parts of its batch that tell it, in all processes, over their weights.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[Tensor, float]]] = []

    def add(self, step: Mapping[str, tuple[Tensor, float]]) -> None:
        """The sums of a step, scalars on any device, and their weights, by name."""
        self.steps.append(dict(step))

    def means(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """By name the mean over the steps that had it, and begin anew. Reads each device once. `gather` gives what all
        processes hold, each of which must call this."""
        everyone = gather(self._read())
        self.steps = []
        values_by_name: dict[str, list[float]] = {}
        for step_metrics in zip(*everyone, strict=True):
            for name in dict.fromkeys(name for each in step_metrics for name in each):
                parts = [each[name] for each in step_metrics if name in each]
                value = math.fsum(total for total, _ in parts) / math.fsum(weight for _, weight in parts)
                values_by_name.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in values_by_name.items()}

    def _read(self) -> list[dict[str, tuple[float, float]]]:
        places: dict[torch.device, list[Tensor]] = {}
        for step in self.steps:
            for value, _ in step.values():
                places.setdefault(value.device, []).append(value)
        numbers = {place: iter(torch.stack(values).tolist()) for place, values in places.items()}
        return [{name: (next(numbers[v.device]), weight) for name, (v, weight) in step.items()} for step in self.steps]


class Throughput:
    """Rates since the last line. Evaluation is not training; `left` includes it, since it will happen again."""

    def __init__(self, step: int, peak: float | None = None) -> None:
        self.first, self.begun, self.peak = step, time.monotonic(), peak
        self.flops = 0.0  # FLOPs of this process since the last line
        self.step, self.since, self.excluded, self.samples, self.waited = step, self.begun, 0.0, 0, 0.0

    def line(self, step: int, feed: TimedLoader, world: int) -> dict[str, float]:
        """What is logged: steps and samples a second, of all processes, the share of the time spent waiting, and how
        fast a process computes, of the most that its device can do (MFU) where that is known."""
        now = time.monotonic()
        seconds = max(now - self.since - self.excluded, 1e-9)
        rates = {"steps_per_second": round((step - self.step) / seconds, 3)}
        if feed.samples:
            rates["samples_per_second"] = round((feed.samples - self.samples) * world / seconds, 3)
            rates["data_wait"] = round(min((feed.waited - self.waited) / seconds, 1.0), 4)
        if self.flops:
            rates["tflops"] = round(self.flops / seconds / 1e12, 4)
            rates |= {"mfu": round(self.flops / seconds / self.peak, 4)} if self.peak else {}
        self.flops = 0.0
        self.step, self.since, self.excluded, self.samples, self.waited = step, now, 0.0, feed.samples, feed.waited
        return rates

    def left(self, step: int, last: int) -> str:
        """The time to the last step at the pace so far, in words."""
        minutes = (last - step) * (time.monotonic() - self.begun) / max(step - self.first, 1) / 60
        return f"{minutes:.1f} min left" if minutes < 120 else f"{minutes / 60:.1f} h left"


def memory(device: torch.device) -> float | None:
    """The most that the process has held, in GB (10^9 bytes): allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # not on this system
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
