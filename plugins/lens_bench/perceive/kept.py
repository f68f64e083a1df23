"""Perceivers that stay in memory from one call of `score` to the next, one for each role of a benchmark.

The stages of `lens bench` keep none: there, one model is in memory at a time, and is asked about all pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from attrs import define


@define
class LoadedPerceiver:
    """A perceiver, what it says about itself, and whether it has passed its canary."""

    perceiver: Any
    described: Mapping[str, Any]
    proven: bool = False

    def close(self) -> None:
        """Free its memory."""
        if hasattr(self.perceiver, "close"):
            self.perceiver.close()


class KeptPerceivers:
    """By role the perceiver that was used last. `lock` is for whoever asks them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._by_role: dict[str, tuple[Any, LoadedPerceiver]] = {}

    def get(self, role: str, options: Any, load: Callable[[], LoadedPerceiver]) -> LoadedPerceiver:
        """The perceiver of a role. One with other options is freed first, so that never two of a role are in memory."""
        if role in self._by_role and self._by_role[role][0] != options:
            self.drop(role)
        if role not in self._by_role:
            self._by_role[role] = options, load()
        return self._by_role[role][1]

    def drop(self, role: str) -> None:
        """Free the perceiver of a role."""
        if role in self._by_role:
            self._by_role.pop(role)[1].close()

    def close(self) -> None:
        """Free all of them."""
        for role in list(self._by_role):
            self.drop(role)


KEPT = KeptPerceivers()
"""Those of this process."""
