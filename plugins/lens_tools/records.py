"""What a stage of the GPU check has measured so far, on disk after every item: a kill loses one item at most."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lens_core.io import atomic_files


class Records:
    """The results of one stage: `items` by name, each a mapping. `deadline` is a time of `time.time`."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self.begun = time.time()
        self.facts: dict[str, Any] = {}
        self.items: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def write(self) -> None:
        content = {"facts": self.facts, "items": self.items, "seconds": round(time.time() - self.begun, 1)}
        atomic_files.write_json(self.path, plain(content))

    def run(self, name: str, measure: Callable[[dict[str, Any]], None], need: float = 0.0) -> bool:
        """Let `measure` put what it finds into a mapping, the item `name` -> whether it came through.

        An error is kept in the item, and the stage goes on. With less than `need` seconds left, nothing is run.
        """
        record: dict[str, Any] = {}
        self.items[name] = record
        if self.left() < need:
            record["skipped"] = f"{max(self.left(), 0):.0f} s left, {need:.0f} s needed"
            self.write()
            return False
        begun = time.time()
        try:
            measure(record)
        except Exception as error:  # one broken item must not cost the others
            lines = traceback.extract_tb(error.__traceback__)[-4:]
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            record["where"] = [f"{Path(line.filename).name}:{line.lineno} {line.name}" for line in lines]
        record["took_s"] = round(time.time() - begun, 2)
        free_memory()
        self.write()
        print(f"{self.path.stem}: {name}: {record.get('error', 'ok')} ({record['took_s']} s)", flush=True)
        return "error" not in record


def free_memory() -> None:
    """Give back what is not in use, so that the next item begins with an empty device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gb(device: torch.device) -> float | None:
    """The most that was allocated since `reset_peak`, GB (10^9 bytes); None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def plain(value: Any) -> Any:
    """As JSON has it: floats of six digits, None for what is not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
