"""Measure code on a GPU or a CPU: rounds in turn, medians, distances, and which kernels ran."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for all that is queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """How long `run` takes: between CUDA events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    torch.cuda.synchronize(device)
    event: Any = torch.cuda.Event  # torch leaves it untyped
    begin, end = event(enable_timing=True), event(enable_timing=True)
    stream = torch.cuda.current_stream(device)  # that of the current device has nothing to do, if it is another one
    begin.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def in_turn(
    runs: Mapping[str, Run], device: torch.device, repeats: int = 5, warm_up: int = 2, left: Callable[[], float] = float
) -> dict[str, list[float]]:
    """Seconds of each run, round by round: a round runs each once, forwards and backwards in turn (ABBA).

    `left` is how many seconds there still are; 0 where nobody counts. No round begins that would not end in time.
    """
    for name in list(runs) * warm_up:
        _ = runs[name]()
    synchronize(device)
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        begun, before = time.monotonic(), left()
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            rounds[name].append(seconds(runs[name], device))
        if before and before < 2.2 * (time.monotonic() - begun):
            break
    return rounds


def figures(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most of seconds, and how many there are."""
    listed = list(values)
    return {
        "median_s": statistics.median(listed), "least_s": min(listed), "most_s": max(listed), "repeats": len(listed)
    }  # fmt: skip


def ratio(slow: Iterable[float], fast: Iterable[float]) -> dict[str, float]:
    """How much faster the second is, by pairs of one round: what slows the machine for both cancels."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}


def distance(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, computed in float32 at least; NaN where either has one."""
    precise = torch.promote_types(want.dtype, torch.float32)
    a, b = got.detach().to(want.device, precise), want.detach().to(precise)
    return float((a - b).norm() / b.norm())


def kernels(run: Run, device: torch.device, most: int = 12) -> dict[str, Any]:
    """What one run launches: how many kernels, the milliseconds they take, and the `most` dearest by name.

    On a CPU operators stand for kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    run()
    synchronize(device)
    with profile(activities=kinds) as profiler:
        run()
        synchronize(device)
    totals: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        on_gpu = getattr(event.device_type, "name", "") == "CUDA"
        # Regions that somebody named are on the GPU's line of time too, around kernels that count by themselves.
        if on_gpu != cuda or getattr(event, "is_user_annotation", False) or (not cuda and event.cpu_parent is not None):
            continue
        took = event.device_time_total if cuda else event.cpu_time_total
        before = totals.get(event.name, (0.0, 0))
        totals[event.name] = before[0] + float(took) / 1000, before[1] + 1
    top = sorted(totals.items(), key=lambda item: -item[1][0])[:most]
    return {
        "launches": sum(count for _, count in totals.values()),
        "milliseconds": round(sum(took for took, _ in totals.values()), 3),
        "top": [{"name": name[:120], "ms": round(took, 3), "calls": count} for name, (took, count) in top],
    }
