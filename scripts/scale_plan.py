"""What 800 million pictures would cost: the plan of docs/at-scale.md, from what this machine takes for one.

    python scripts/scale_plan.py

Measures time on a CPU for pictures of three sizes, the bytes of a row in each table, and the time and memory of the
search for duplicates; all else is arithmetic with the ASSUMPTIONS.
"""

from __future__ import annotations

import io
import math
import time
import tracemalloc
from typing import Any

import numpy as np

PICTURES = 800_000_000
ASSUMPTIONS = {
    "bytes of a picture's file": 300_000,
    "share of pictures kept": 0.5,
    "dollars for an hour of a core": 0.04,
    "dollars for an hour of a machine with 1 TB of memory": 7.0,
    "dollars for a TB kept for a month": 23.0,
    "cores of the cluster": 2000,
    "tokens of a picture for a captioner": 1000,
    "tokens of a dense caption": 150,
    "dollars for a million tokens in": 0.10,
    "dollars for a million tokens out": 0.40,
}
RECIPE = {
    "sources": [{"use": "text_pictures", "count": 1}],
    "filters": ["file", "resolution", "luminance", "entropy", "clarity", "blockiness", "borders"],
}


def photo(side: int, seed: int) -> bytes:
    """A JPEG whose spectrum falls as in photographs."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    frequency = np.fft.rfftfreq(side)[None] ** 2 + np.fft.fftfreq(side)[:, None] ** 2
    frequency[0, 0] = 1
    planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency**0.5, s=(side, side))
    pixels = np.clip(128 + 45 * planes / planes.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def reading(side: int, count: int = 6) -> tuple[float, dict[str, float]]:
    """Seconds on a CPU for a picture that is decoded, hashed and measured by all filters; bytes of its rows."""
    from lens_curate import tables
    from lens_curate.parts import Part
    from lens_curate.recipe import CurationSpec
    from lens_curate.worker import PartTask, Worker

    from lens_core.config import structure
    from lens_core.io.sources import SourceItem

    worker = Worker(structure(CurationSpec, RECIPE), "/nonexistent")
    items = [SourceItem(f"{n}.jpg", photo(side, n), ({"caption": "A picture of noise. " * 20},)) for n in range(count)]
    worker.sources[0].source.read = lambda part: iter(items)  # type: ignore[method-assign]
    task = PartTask(0, Part("part"), True, tuple(range(len(worker.filters))))
    begun = time.process_time()
    answers = list(worker.run([task]))
    seconds = (time.process_time() - begun) / count
    sizes: dict[str, float] = {}
    for answer in answers:
        name = answer.kind.split()[0]
        sizes[name] = sizes.get(name, 0) + tables.load(answer.body).nbytes / count
    return seconds, sizes


def searching(count: int) -> tuple[float, float]:
    """Seconds on a CPU and peak bytes, for each hash, of the search for near and mirrored duplicates."""
    from lens_curate.duplicates import near_duplicates

    rng = np.random.default_rng(0)
    straight, mirrored = (rng.integers(0, 2**64, (count, 4), dtype=np.uint64) for _ in range(2))
    rank = rng.permutation(count)
    begun = time.process_time()
    near_duplicates(straight, mirrored, rank, 32)
    seconds = time.process_time() - begun
    tracemalloc.start()
    near_duplicates(straight, mirrored, rank, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds / count, peak / count


def arrays() -> int:
    """Bytes of a record in the arrays that decide."""
    from attrs import fields
    from lens_curate.tables import RecordArrays

    widths = {"key": 16, "part": 16, "id": 32, "hashes": 32, "mirrored": 32}
    total = 0
    for each in fields(RecordArrays):
        kind = str(each.type)
        if each.name in widths:
            total += widths[each.name]
        elif "NDArray" in kind:
            total += 8 if "64" in kind else 4 if "32" in kind else 1
    return total


def band_recall(count: int, turned: float) -> float:
    """The share of copies that share a band with their original, where each bit is turned with this probability."""
    from lens_curate.duplicates import _STABLE, BANDS, band_bits

    stable, width = len(_STABLE), band_bits(count)
    share = 0.0
    for k in range(stable - width + 1):
        weight = math.comb(stable, k) * turned**k * (1 - turned) ** (stable - k)
        share += weight * (1 - (1 - math.comb(stable - k, width) / math.comb(stable, width)) ** BANDS)
    return share


def plan(seconds: float, rows: dict[str, float], search: tuple[float, float]) -> list[tuple[str, str, str]]:
    a = ASSUMPTIONS
    hours, cores = PICTURES * seconds / 3600, a["cores of the cluster"]
    kept = PICTURES * a["share of pictures kept"]
    row = sum(rows.values())
    raw = PICTURES * a["bytes of a picture's file"] / 1e12
    slower = math.log2(PICTURES) / math.log2(300_000)  # sorting
    deciding = PICTURES * search[0] * slower / 3600
    memory = PICTURES * (arrays() + search[1]) / 1e9
    tokens = a["tokens of a picture for a captioner"] * a["dollars for a million tokens in"]
    tokens += a["tokens of a dense caption"] * a["dollars for a million tokens out"]
    stored = kept * a["bytes of a picture's file"] / 1e12
    return [
        ("read, decode, hash, measure",
         f"{hours:,.0f} core hours, {hours / cores:,.1f} h on {cores:,} cores; {raw:,.0f} TB read",
         f"{hours * a['dollars for an hour of a core']:,.0f}"),
        ("side tables", f"{row:,.0f} bytes a picture, {PICTURES * row / 1e12:,.1f} TB",
         f"{PICTURES * row / 1e12 * a['dollars for a TB kept for a month']:,.0f} a month"),
        ("duplicates and verdicts, in one process", f"{deciding:,.0f} h, {memory:,.0f} GB of memory",
         f"{deciding * a['dollars for an hour of a machine with 1 TB of memory']:,.0f}"),
        ("write the store", f"{stored:,.0f} TB read again and written",
         f"{stored * a['dollars for a TB kept for a month']:,.0f} a month"),
        ("dense captions of what is kept", f"{kept:,.0f} captions", f"{kept * tokens / 1e6:,.0f}"),
    ]  # fmt: skip


def main() -> None:
    reading(64)  # what is loaded and computed once
    sizes: dict[int, Any] = {side: reading(side) for side in (256, 512, 1024)}
    print("| picture | CPU ms |\n|---|---|")
    for side, (seconds, _) in sizes.items():
        print(f"| {side} x {side} px | {seconds * 1000:.0f} |")
    rows = sizes[1024][1]
    print("\n| side table | bytes a picture |\n|---|---|")
    for name, size in sorted(rows.items()):
        print(f"| {name} | {size:,.0f} |")
    search = searching(300_000)
    print(f"\nsearch: {search[0] * 1e6:.0f} µs and {search[1]:,.0f} bytes a picture; arrays: {arrays()} bytes")
    print("\n| bits flipped | " + " | ".join(f"{n:,}" for n in (1_000_000, PICTURES)) + " |\n|---|---|---|")
    for turned in (0.01, 0.02, 0.04, 0.06):
        print(f"| {turned:.0%} | {band_recall(1_000_000, turned):.1%} | {band_recall(PICTURES, turned):.1%} |")
    print("\n| step | amount | dollars |\n|---|---|---|")
    for line in plan(sizes[1024][0], rows, search):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
