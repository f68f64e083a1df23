"""Spike detection: which optimizer steps are skipped, because their loss or gradient is not finite or far too large."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HISTORY = 100  # steps whose median a spike is measured against
LEAST = 20  # steps before anything is a spike: a young run's gradients fall fast


class SpikeDetector:
    """Decide which steps of a module to skip: those that are not finite, or far above what is usual for it.

    Usual is the running median of the last good steps: of the gradient's norm, and of the loss where it is always
    positive. All of it is part of a checkpoint.
    """

    def __init__(self, factor: float, trainable: Sequence[str]) -> None:
        self.factor = factor
        self.row = dict.fromkeys(trainable, 0)  # bad steps in a row
        self.skipped = dict.fromkeys(trainable, 0)  # in all
        self.finite = dict.fromkeys(trainable, True)  # whether the last step's loss and gradient were
        self.usual: dict[str, dict[str, list[float]]] = {
            module_name: {"loss": [], "gradient": []} for module_name in trainable
        }

    def fault(self, module_name: str, loss: float, norm: float) -> str | None:
        """Why the step is not to be taken, or None. Counts it either way."""
        self.finite[module_name] = math.isfinite(loss) and math.isfinite(norm)
        reason = self._fault(module_name, loss, norm)
        self.row[module_name] = self.row[module_name] + 1 if reason else 0
        self.skipped[module_name] += bool(reason)
        if self.factor and not reason:
            for name, value in (("loss", loss), ("gradient", norm)):
                self.usual[module_name][name] = [*self.usual[module_name][name][1 - HISTORY :], value]
        return reason

    def _fault(self, module_name: str, loss: float, norm: float) -> str | None:
        if not self.finite[module_name]:
            return "a non-finite loss or gradient"
        for name, value in (("loss", loss), ("gradient", norm)):
            before = self.usual[module_name][name]
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
        self.usual = {
            module_name: {k: list(v) for k, v in kinds.items()} for module_name, kinds in state["usual"].items()
        }
