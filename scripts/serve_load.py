"""Load on `lens serve`: is anything lost, is memory flat, how long does a request take, what do batches gain?

    python scripts/serve_load.py --output docs/results/serve/load.json             # 500 requests, and rates
    python scripts/serve_load.py --output /tmp/load.json --requests 60 --rounds 1  # a quick look

Each server is a process of its own, `lens serve` with `tiny:`; the clients are OpenAI's, each a thread of this process.

- load: so many requests of 16 clients. Every answer is decoded, and its facts are compared with what was sent. Memory
  is what the server's /metrics says, after each tenth of the requests.
- rates: pictures by second for 1, 4 and 16 clients, in rounds. One client draws one picture at a time. Wall time
  depends on what else the machine does; pictures by second of the server's CPU time, which the system counts, hardly
  does.

docs/serve.md has the figures.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLIENTS = (1, 4, 16)
PARTS = 10  # of the load
KEPT = 20  # every so many pictures are drawn again alone
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "pink", "purple"), ("circle", "square", "triangle", "star", "ring")


def prompt_of(number: int) -> str:
    """One of 900 prompts, so that hardly any stands in the server's cache."""
    first, second = divmod(number * 37 % 900, 30)
    return " left of ".join(f"a {COLOURS[one % 6]} {SHAPES[one // 6]}" for one in (first, second))


class Served:
    """A server's process, by its address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, of all its threads."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        from urllib.request import urlopen

        with urlopen(f"{self.url.removesuffix('/v1')}/metrics") as answer:
            text = answer.read().decode()
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])


@contextmanager
def server(*words: str) -> Iterator[Served]:
    """`lens serve` on the CPU at a free port; stopped by SIGTERM afterwards."""
    command = [sys.executable, "-m", "lens_core", "serve", "--port", "0", "--device", "cpu", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"http://[^ ,;]+", line)
        if address is None:
            raise SystemExit(line + process.stderr.read())
        yield Served(process, address[0])
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(120):
            print(process.stderr.read(), file=sys.stderr)
        process.stderr.close()


class Work:
    """Requests for clients to take, one after another, and what became of each."""

    def __init__(self, url: str, numbers: Iterable[int], side: int, steps: int) -> None:
        self.url, self.side, self.steps = url, side, steps
        self._next = iter(numbers)
        self._lock = threading.Lock()
        self.seconds: list[float] = []  # of each request that was answered rightly
        self.faults: list[str] = []
        self.pictures: dict[int, bytes] = {}  # pixels of some, by request

    def take(self) -> int | None:
        with self._lock:
            return next(self._next, None)

    def client(self) -> None:
        """Send requests until none is left; each begins when the one before it is answered."""
        from openai import OpenAI

        with OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600) as client:
            while (number := self.take()) is not None:
                begin = time.perf_counter()
                try:
                    answer = client.images.generate(
                        prompt=prompt_of(number), size=f"{self.side}x{self.side}",
                        extra_body={"seed": number, "steps": self.steps},
                    )  # fmt: skip
                    seconds = time.perf_counter() - begin
                    assert answer.data is not None
                    self.check(number, answer.data[0].b64_json or "")
                except Exception as error:
                    self.faults.append(f"{number}: {type(error).__name__}: {error}"[:300])
                else:
                    self.seconds.append(seconds)

    def check(self, number: int, encoded: str) -> None:
        """Raise AssertionError for a picture that is not the one of request `number`."""
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        facts = json.loads(image.text["lens"])  # type: ignore[attr-defined]  # a PNG's
        assert image.size == (self.side, self.side), image.size
        assert (facts["seed"], facts["prompt"]) == (number, prompt_of(number)), facts
        if number % KEPT == 0:
            self.pictures[number] = image.convert("RGB").tobytes()

    def run(self, clients: int) -> float:
        """Wall seconds that all requests took."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for one in [pool.submit(self.client) for _ in range(clients)]:
                one.result()
        return time.perf_counter() - begin


def load(served: Served, arguments: argparse.Namespace) -> dict[str, Any]:
    """What became of the requests of 16 clients, and the server's memory meanwhile."""
    side, steps, count = arguments.side, arguments.steps, arguments.requests
    seconds, faults, wall = [], [], 0.0
    pictures: dict[int, bytes] = {}
    Work(served.url, range(64), side, steps).run(16)  # memory grows until batches of each size were drawn
    memory = [served.metric("process_resident_memory_bytes")]
    before = served.metric("lens_images_total"), served.metric("lens_batches_total")
    for part in range(PARTS):
        work = Work(served.url, range(part * count // PARTS, (part + 1) * count // PARTS), side, steps)
        wall += work.run(16)
        seconds += work.seconds
        faults += work.faults
        pictures |= work.pictures
        memory.append(served.metric("process_resident_memory_bytes"))
    images = served.metric("lens_images_total") - before[0]
    batches = served.metric("lens_batches_total") - before[1]
    alone = Work(served.url, list(pictures), side, steps)
    alone.run(1)
    apart = [abs(a - b) for n, one in pictures.items() for a, b in zip(one, alone.pictures[n], strict=True)]
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "clients": 16, "requests": arguments.requests, "answered": len(seconds),
        "lost": len(faults), "faults": faults[:5],
        "seconds": {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "max": round(max(seconds), 3)},
        "images_per_second": round(len(seconds) / wall, 2),
        "images_per_batch": round(images / batches, 2),
        "resident_mib": [round(bytes_ / 2**20, 1) for bytes_ in memory],
        "alone_against_batched": {"pictures": len(pictures), "max_difference": max(apart, default=None)},
    }  # fmt: skip


def rates(served: Served, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Pictures by second of 1, 4 and 16 clients, in the median of rounds."""
    samples: dict[int, list[tuple[float, float, float]]] = {}
    count = arguments.pictures
    for number in range(arguments.rounds):
        for clients in CLIENTS if number % 2 == 0 else reversed(CLIENTS):
            numbers = range(1000 + 100 * number, 1000 + 100 * number + count)
            work = Work(served.url, numbers, arguments.side, arguments.steps)
            cpu, batches = served.cpu_seconds(), served.metric("lens_batches_total")
            wall = work.run(clients)
            assert not work.faults, work.faults
            cpu, batches = served.cpu_seconds() - cpu, served.metric("lens_batches_total") - batches
            samples.setdefault(clients, []).append((count / wall, count / cpu, count / batches))
    names = ("images_per_second", "images_per_cpu_second", "images_per_batch")
    return [
        {"clients": clients}
        | {n: round(statistics.median(v), 2) for n, v in zip(names, zip(*some, strict=True), strict=True)}
        | {"rounds": [[round(value, 2) for value in one] for one in some]}
        for clients, some in samples.items()
    ]


def machine() -> dict[str, Any]:
    """What this ran on."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    import fastapi
    import openai
    import torch
    import uvicorn

    versions = {one.__name__: one.__version__ for one in (fastapi, openai, torch, uvicorn)}
    return {
        "cpu": model[1] if model else platform.processor(), "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"), "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=32, help="of each measurement of a rate")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="px, of every picture")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped too
    before = os.getloadavg()
    result: dict[str, Any] = {"machine": machine(), "steps": arguments.steps, "side": arguments.side}
    with server() as served:
        result["load"] = load(served, arguments)
        print(json.dumps(result["load"], indent=1), flush=True)
        result["rates"] = rates(served, arguments)
    result["load_average"] = {"before": before, "after": os.getloadavg()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
