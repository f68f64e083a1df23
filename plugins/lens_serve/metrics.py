"""What `/metrics` says, in Prometheus' text format.

The client library of Prometheus is not needed for a dozen numbers of one process that one thread writes down.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lens_serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


class Metrics:
    """Counts of the HTTP side. Written by the event loop's thread alone."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """A request was answered with pictures, `seconds` after it was accepted."""
        self._buckets[bisect_left(BUCKETS, seconds)] += 1
        self._seconds += seconds

    def text(self, engine: Engine) -> str:
        return "\n".join(self._lines(engine)) + "\n"

    def _lines(self, engine: Engine) -> Iterator[str]:
        counters = engine.counters
        yield from _head("lens_http_responses_total", "counter", "HTTP responses by path and status.")
        for (path, status), count in sorted(self.responses.items()):
            yield f'lens_http_responses_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("lens_jobs_total", "counter", "Requests for pictures by outcome.")
        for outcome in ("done", "failed", "cancelled", "refused"):
            yield f'lens_jobs_total{{outcome="{outcome}"}} {getattr(counters, outcome)}'
        for name, kind, value, words in (
            ("images_total", "counter", counters.images, "Finished pictures."),
            ("batches_total", "counter", counters.batches, "Calls of the pipeline."),
            ("steps_total", "counter", counters.steps, "Sampler steps, of a batch each."),
            ("drawing_seconds_total", "counter", counters.drawing_seconds, "Seconds in which the pipeline drew."),
            ("jobs_waiting", "gauge", engine.waiting, "Requests in the queue."),
            ("jobs_running", "gauge", engine.running, "Requests that are drawn."),
            ("queue_limit", "gauge", engine.limits.max_queue, "Requests that may wait."),
        ):
            yield from _head(f"lens_{name}", kind, words)
            yield f"lens_{name} {value:.10g}"
        yield from self._histogram()
        memory = _resident_bytes()
        if memory is not None:
            yield from _head("process_resident_memory_bytes", "gauge", "Resident memory of the process.")
            yield f"process_resident_memory_bytes {memory}"

    def _histogram(self) -> Iterator[str]:
        name = "lens_job_seconds"
        yield from _head(name, "histogram", "Seconds from the acceptance of a request to its pictures.")
        total = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._buckets, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._seconds:.10g}"
        yield f"{name}_count {total}"


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP {name} {words}"
    yield f"# TYPE {name} {kind}"


def _resident_bytes() -> int | None:
    """Of this process; None where the system does not say."""
    import os

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
