"""Progress of a curation on stderr: what is done, how fast, and how long the rest takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from attrs import field, mutable

Clock = Callable[[], float]


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@mutable
class Progress:
    """Counts what is done. On a terminal one line is rewritten every second; elsewhere a line is added every 30."""

    what: str
    total: int = 0  # 0: not known
    done: int = 0
    clock: Clock = time.monotonic
    _begun: float = field(init=False)
    _shown: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._begun = self._shown = self.clock()

    def add(self, count: int) -> None:
        self.done += count
        terminal = sys.stderr.isatty()
        if self.clock() - self._shown >= (1 if terminal else 30):
            self._shown = self.clock()
            print(
                f"\r\x1b[K{self}" if terminal else str(self), end="" if terminal else "\n", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        if self.done:
            start = "\r\x1b[K" if sys.stderr.isatty() else ""
            print(f"{start}{self}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        elapsed = max(self.clock() - self._begun, 1e-9)
        rate = self.done / elapsed
        total = max(self.total, self.done)
        of = f" of {total:,}" if self.total else ""
        left = f", {duration((total - self.done) / rate)} left" if rate and self.total and self.done < total else ""
        return f"{self.what}: {self.done:,}{of}, {rate:,.1f} a second{left}"
