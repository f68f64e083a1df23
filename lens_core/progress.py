"""What a run tells of itself while it goes on: pace, waiting, memory, trackers; and which of its steps are spikes."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_core.types import Batch, ConfigError, did_you_mean

HISTORY = 100  # steps whose median a spike is measured against
LEAST = 20  # steps before anything is a spike: a young run's gradients fall fast


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


class Feed:
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


class Tally:
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
        found: dict[str, list[float]] = {}
        for told in zip(*everyone, strict=True):
            for name in dict.fromkeys(name for each in told for name in each):
                parts = [each[name] for each in told if name in each]
                value = math.fsum(total for total, _ in parts) / math.fsum(weight for _, weight in parts)
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _read(self) -> list[dict[str, tuple[float, float]]]:
        places: dict[torch.device, list[Tensor]] = {}
        for step in self.steps:
            for value, _ in step.values():
                places.setdefault(value.device, []).append(value)
        numbers = {place: iter(torch.stack(values).tolist()) for place, values in places.items()}
        return [{name: (next(numbers[v.device]), weight) for name, (v, weight) in step.items()} for step in self.steps]


class Pace:
    """Rates since the last line. What a look takes is not training; `left` counts it, for it will be taken again."""

    def __init__(self, step: int, peak: float | None = None) -> None:
        self.first, self.begun, self.peak = step, time.monotonic(), peak
        self.work = 0.0  # FLOPs of this process since the last line
        self.step, self.since, self.away, self.samples, self.waited = step, self.begun, 0.0, 0, 0.0

    def line(self, step: int, feed: Feed, world: int) -> dict[str, float]:
        """What is logged: steps and samples a second, of all processes, the share of the time spent waiting, and how
        fast a process computes, of the most that its device can do (MFU) where that is known."""
        now = time.monotonic()
        seconds = max(now - self.since - self.away, 1e-9)
        found = {"steps_per_second": round((step - self.step) / seconds, 3)}
        if feed.samples:
            found["samples_per_second"] = round((feed.samples - self.samples) * world / seconds, 3)
            found["data_wait"] = round(min((feed.waited - self.waited) / seconds, 1.0), 4)
        if self.work:
            found["tflops"] = round(self.work / seconds / 1e12, 4)
            found |= {"mfu": round(self.work / seconds / self.peak, 4)} if self.peak else {}
        self.work = 0.0
        self.step, self.since, self.away, self.samples, self.waited = step, now, 0.0, feed.samples, feed.waited
        return found

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


class Spikes:
    """Which steps of a role are not to be taken: those that are not finite, or far above what is usual for it.

    Usual is the running median of the last good steps: of the gradient's norm, and of the loss where it is always
    positive. All of it is part of a checkpoint.
    """

    def __init__(self, factor: float, roles: Sequence[str]) -> None:
        self.factor = factor
        self.row = dict.fromkeys(roles, 0)  # bad steps in a row
        self.skipped = dict.fromkeys(roles, 0)  # in all
        self.finite = dict.fromkeys(roles, True)  # whether the last step's loss and gradient were
        self.usual: dict[str, dict[str, list[float]]] = {role: {"loss": [], "gradient": []} for role in roles}

    def fault(self, role: str, loss: float, norm: float) -> str | None:
        """Why the step is not to be taken, or None. Counts it either way."""
        self.finite[role] = math.isfinite(loss) and math.isfinite(norm)
        found = self._fault(role, loss, norm)
        self.row[role] = self.row[role] + 1 if found else 0
        self.skipped[role] += bool(found)
        if self.factor and not found:
            for name, value in (("loss", loss), ("gradient", norm)):
                self.usual[role][name] = [*self.usual[role][name][1 - HISTORY :], value]
        return found

    def _fault(self, role: str, loss: float, norm: float) -> str | None:
        if not self.finite[role]:
            return "a non-finite loss or gradient"
        for name, value in (("loss", loss), ("gradient", norm)):
            before = self.usual[role][name]
            if self.factor and len(before) >= LEAST and min(before) > 0:
                usual = statistics.median(before)
                if value > self.factor * usual:
                    return f"a {name} of {value:.3g}, {value / usual:.1f} times the usual one"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "skipped": self.skipped, "finite": self.finite, "usual": self.usual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.row, self.skipped = dict(state["row"]), dict(state["skipped"])
        self.finite = {**self.finite, **state.get("finite", {})}  # not in a checkpoint of before it was kept
        self.usual = {role: {k: list(v) for k, v in kinds.items()} for role, kinds in state["usual"].items()}


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError where Accelerate knows no such tracker, or its package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    bundled = {str(kind) for kind in LoggerType}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"$.train.trackers: no tracker is called {name!r}.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name in bundled and name not in map(str, get_available_trackers()):
            extra = "'lens-t2i[track]'" if name in ("tensorboard", "trackio") else name
            raise ConfigError(f"$.train.trackers: {name} is not installed; pip install {extra}, or leave it out")


class Trackers:
    """Accelerate's trackers of a run. One that fails is told and left out; it never stops a training."""

    def __init__(self, accelerator: Any, recipe: Mapping[str, Any], out: Path, say: Callable[[str], None]) -> None:
        self.say = say
        if accelerator.log_with:
            named = {str(t): {"name": out.name} for t in accelerator.log_with if str(t) in ("wandb", "trackio")}
            accelerator.init_trackers("lens", dict(_flat(recipe, "")), named)
        self.trackers = accelerator.trackers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for tracker in list(self.trackers):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # whatever a service or its client does, the training is worth more
                self.trackers.remove(tracker)
                self.say(f"the tracker {tracker.name} failed and is left out from now on: {error}")

    def finish(self) -> None:
        while self.trackers:
            self.trackers.pop().finish()


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value if isinstance(value, bool | int | float | str) else str(value)
