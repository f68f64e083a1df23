"""When the next request may begin: evenly spaced, and not before an API that asked to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """At most `per_minute` requests begin in a minute, evenly spaced; None is no limit. Safe to call from several
    threads."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._spacing = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = self._held = -float("inf")
        self._lock = threading.Lock()

    def enter(self) -> float:
        """0.0, and a request may begin now; or the seconds after which to call this again."""
        with self._lock:
            now = self._clock()
            start = max(self._next, self._held)
            if now < start:
                return start - now
            self._next = now + self._spacing
            return 0.0

    def hold(self, seconds: float) -> None:
        """Let no request begin for so long."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)
