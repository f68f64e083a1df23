"""Speed and memory of a curation, beside other ways to do the same work. docs/curate.md has the figures.

    python scripts/curation_speed.py --output /tmp/speed                        # 20,000 pictures, every engine
    python scripts/curation_speed.py --output /tmp/speed --memory 20000,200000  # is the peak of memory flat?
    python scripts/curation_speed.py --output /tmp/speed --driver 20000,200000  # the same without decoding, in minutes
    python scripts/curation_speed.py --hashes 1000,10000,100000,1000000         # near duplicates among so many hashes

Pictures are made here, of 64 x 64 px, in tars of 1,000; a tenth are copies of others. Each engine runs in a process of
its own; wall time, time of all its processes on a CPU, and the peak of the memory of all of them (PSS, so that pages
they share count once) are those of the whole process, from its start to its end.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """\
sources:
  - {use: tars, path: PATH}
filters:
  - {use: resolution, keep: {short_side: {min: 32}}}
  - {use: luminance, keep: {mean: {min: 20, max: 235}}}
  - {use: entropy, keep: {entropy: {min: 2}}}
  - {use: clarity, keep: {edge: {min: 8}}}
"""
SMALL_RECIPE = "".join(RECIPE.splitlines(keepends=True)[:4])  # for memory, which filters do not change
PER_TAR = 1000


def make(folder: Path, count: int) -> Path:
    """Tars with `count` pictures: random blobs, a tenth of them copies, scaled and compressed again."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-count // PER_TAR)):
        path = folder / f"{number:05}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for record in range(number * PER_TAR, min(count, (number + 1) * PER_TAR)):
                copied = record % 10 == 9
                rng = np.random.default_rng(record // 10 if copied else 1_000_000 + record)
                if record < 10 * (count // 10) and not copied and record < count // 10:
                    rng = np.random.default_rng(record)  # what a copy is of
                grid = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(grid).resize((64, 64), Image.Resampling.BICUBIC)
                data = io.BytesIO()
                image.resize((60, 60) if copied else (64, 64)).save(data, "JPEG", quality=75 if copied else 90)
                for ending, part in ((".jpg", data.getvalue()), (".txt", f"Blobs of colour, {record}.".encode())):
                    info = tarfile.TarInfo(f"{record:08}{ending}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
        path.with_suffix(".part").rename(path)
    return folder


# ---- engines --------------------------------------------------------------------------------------------------------


def lens(folder: Path, store: Path, runner: str, text: str = RECIPE) -> int:
    """`lens data curate`; how many were kept."""
    from lens_curate.curation import curate
    from lens_curate.recipe import read_spec

    recipe = store.parent / f"{store.name}.yaml"
    recipe.write_text(text.replace("PATH", str(folder)))
    return int(curate(read_spec(recipe), store, runner=runner).data["kept"])


def measured(name: str, file: bytes) -> dict[str, Any] | None:
    """One picture, decoded, scored and hashed; None where it is not kept. What a user of another library writes."""
    from lens_curate import hashes, measures
    from lens_curate.worker import thumbnail

    from lens_core.io.images import ImageError, read_rgb
    from lens_core.types import Record

    scorers = [kind(kind.Config()) for kind in (measures.Luminance, measures.Entropy, measures.Clarity)]
    try:
        image = read_rgb(file)
    except ImageError:
        return None
    record = Record(file, np.asarray(image))
    scores = {k: v[0] for scorer in scorers for k, v in scorer.score([record]).items()}
    if not (min(image.size) >= 32 and 20 <= scores["mean"] <= 235 and scores["entropy"] >= 2 and scores["edge"] >= 8):
        return None
    straight, mirrored = hashes.perceptual_hash(record.pixels)
    return {"name": name, "pixels": hashes.pixel_digest(record.pixels), "straight": straight, "mirrored": mirrored,
            "colours": hashes.colour_grid(record.pixels), "area": image.width * image.height,
            "sharp": measures.sharpness(record), "thumbnail": thumbnail(image, 96)}  # fmt: skip


def distinct(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the pictures that are left without duplicates."""
    from lens_curate.duplicates import equal_groups, near_duplicates
    from lens_curate.hashes import grid_array, hash_array

    rank = np.empty(len(rows), np.int64)
    rank[np.lexsort(([-r["sharp"] for r in rows], [-r["area"] for r in rows]))] = np.arange(len(rows))
    alone = np.flatnonzero(equal_groups(np.array([r["pixels"] for r in rows], "S16"), rank) < 0)
    some = [rows[n] for n in alone]
    straight, mirrored = (hash_array([r[name] for r in some]) for name in ("straight", "mirrored"))
    grids, order = grid_array([r["colours"] for r in some]), np.argsort(np.argsort(rank[alone]))
    instead, _, _ = near_duplicates(straight, mirrored, order, 32, lambda places: grids[places], 56)
    return {some[n]["name"] for n in np.flatnonzero(instead < 0)}


def pool_tar(path: Path) -> list[dict[str, Any]]:
    from lens_core.io.tars import read_tar

    rows = (measured(item.name, item.image or b"") for item in read_tar(path))
    return [row for row in rows if row is not None]


def pool(folder: Path, store: Path) -> int:
    """The same work with a process pool: no resume, no verdicts, no report."""
    from concurrent.futures import ProcessPoolExecutor

    from lens_data.store import Store

    from lens_core.io.tars import read_tar

    with ProcessPoolExecutor() as processes:
        keep = distinct([row for part in processes.map(pool_tar, sorted(folder.glob("*.tar"))) for row in part])
    database = Store(str(store), create=True)
    for path in sorted(folder.glob("*.tar")):
        held = [{"id": item.name, "image": item.image, "height": 64, "width": 64, "brief": "",
                 "dense": item.captions[0]["caption"].decode(), "source": "pool"}
                for item in read_tar(path) if item.name in keep]  # fmt: skip
        database.insert(held)
    return len(keep)


def datasets_row(example: dict[str, Any]) -> dict[str, Any]:
    return measured(example["__key__"], example["jpg"]["bytes"]) or {"name": None}


def with_datasets(folder: Path, store: Path) -> int:
    """The same work with `datasets.map`, of Hugging Face; it keeps a copy of the pictures in its cache."""
    import datasets
    from lens_data.store import Store

    datasets.disable_progress_bars()
    files, cache = sorted(map(str, folder.glob("*.tar"))), f"{store}-cache"
    data = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=cache)
    data = data.cast_column("jpg", datasets.Image(decode=False))
    rows = data.map(datasets_row, num_proc=os.cpu_count()).filter(lambda name: name is not None, input_columns="name")
    keep = distinct(
        rows.select_columns(["name", "pixels", "straight", "mirrored", "colours", "area", "sharp"]).to_list()
    )
    database = Store(str(store), create=True)
    for batch in data.filter(lambda key: key in keep, input_columns="__key__").iter(1000):
        columns = zip(batch["__key__"], batch["jpg"], batch["txt"], strict=True)
        database.insert([{"id": key, "image": image["bytes"], "height": 64, "width": 64, "brief": "", "dense": text,
                          "source": "datasets"} for key, image, text in columns])  # fmt: skip
    return len(keep)


def driver(count: int, store: Path) -> int:
    """A curation of `count` records whose hashes and scores are drawn, not measured: all that one process holds of a
    collection, and none of the work on pictures, whose memory does not depend on their number."""
    from collections.abc import Iterator

    from lens_curate import curation, sources, tables, worker
    from lens_curate.parts import Part, text_digest

    from lens_core.io.sources import SourceItem
    from lens_core.types import Record

    class Simulated(sources.Tars):
        def check(self) -> None:
            pass

        def parts(self) -> Iterator[Part]:
            yield from (Part(f"{start}", count=min(64, count - start)) for start in range(0, count, 64))

        def read(self, part: Part) -> Iterator[SourceItem]:
            for number in range(int(part.key), int(part.key) + part.count):
                text = {"dense": f"Picture {number}, " + "described at some length. " * 20}
                yield SourceItem(f"{number}", number.to_bytes(8, "big") * 64, (text,))

    def record(self: Any, source: Any, part: str, name: str, item: Any) -> tuple[dict[str, Any], Any]:
        from hashlib import sha256

        rng = np.random.default_rng(int(name))
        row = tables.record_row(text_digest(source.name, name), part, source, name, "", item.captions[0]["dense"])
        drawn = rng.bytes(256)
        row |= {"id": sha256(item.image).hexdigest(), "pixels": drawn[:16].hex(), "phash": drawn[16:48],
                "mirrored": drawn[48:80], "colours": rng.bytes(192), "height": 64, "width": 64, "format": "PNG",
                "sharpness": rng.random(), "size": len(item.image), "thumbnail": rng.bytes(1500)}  # fmt: skip
        return row, Record(item.image, np.zeros((1, 1, 3), np.uint8))

    worker.Worker._record = record  # type: ignore[method-assign]
    worker.score_batch = lambda made, records, ids: [
        {"id": key, "fault": "", **dict.fromkeys(made.curator.columns, 100.0)} for key in ids
    ]
    sources.SOURCES["simulated"] = Simulated  # type: ignore[index]
    recipe = {"sources": [{"use": "simulated", "path": "none"}], "filters": ["luminance", "clarity", "resolution"]}
    from lens_curate.recipe import CurationSpec

    from lens_core.config import structure

    return int(curation.curate(structure(CurationSpec, recipe), store, runner="serial").data["kept"])


PEERS: dict[str, Any] = {"pool": pool, "datasets": with_datasets}


def engine(name: str, folder: Path, store: Path) -> int:
    if name in PEERS:
        return int(PEERS[name](folder, store))
    if name.startswith("driver"):
        return driver(int(name.removeprefix("driver")), store)
    if name == "memory":
        return lens(folder, store, "native", SMALL_RECIPE)
    return lens(folder, store, name)


# ---- measuring ------------------------------------------------------------------------------------------------------


class Watch:
    """Peak memory, and time on a CPU, of a process and its children, as far as they were seen twice a second."""

    def __init__(self, pid: int) -> None:
        import psutil

        self.psutil, self.root = psutil, psutil.Process(pid)
        self.peak = 0
        self.cpu: dict[int, float] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(0.5):
            total = 0
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except self.psutil.Error:
                continue
            for process in family:
                try:
                    total += process.memory_full_info().pss
                    times = process.cpu_times()
                    self.cpu[process.pid] = times.user + times.system
                except self.psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    def end(self) -> tuple[float, float]:
        """(MB, seconds)."""
        self.stop.set()
        self.thread.join()
        return self.peak / 2**20, sum(self.cpu.values())


def measure(name: str, folder: Path, store: Path) -> dict[str, Any]:
    code = [sys.executable, __file__, "--engine", name, "--pictures", str(folder), "--store", str(store)]
    begun = time.monotonic()
    process = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    out, error = process.communicate()
    peak, cpu = watch.end()
    if process.returncode:
        raise SystemExit(f"{name}: {error[-2000:]}")
    seconds = time.monotonic() - begun
    return {"engine": name, "kept": int(out.split()[-1]), "seconds": seconds, "cpu": cpu, "peak_mb": peak}


def identical(first: Path, second: Path) -> bool:
    """Whether two stores hold the same pictures, captions and verdicts, in whatever order."""
    from lens_curate.verdicts import verdicts
    from lens_data.store import Store

    def content(path: Path) -> list[Any]:
        names = ("id", "brief", "dense", "height", "width", "source")
        rows = Store(str(path)).columns(*names).to_pylist()
        return [sorted(str([row[n] for n in names]) for row in rows), sorted(map(str, verdicts(str(path))))]

    return content(first) == content(second)


def hashes(counts: list[int]) -> None:
    """Seconds of the search for near duplicates among simulated hashes, a tenth of them copies with 6 % of bits turned;
    and the share of these pairs that it finds."""
    from lens_curate.duplicates import band_bits, near_pairs
    from lens_curate.hashes import BITS, distances

    print("| hashes | bits of a band | seconds on a CPU | µs for each | of copies matched |\n|---|---|---|---|---|")
    for count in counts:
        rng = np.random.default_rng(0)
        made = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
        some = count // 10
        made[-some:] = made[:some] ^ np.packbits(rng.random((some, BITS)) < 0.06, axis=1).view(np.uint64)
        near = distances(made[-some:], made[:some]) <= 32
        begun = time.process_time()
        i, j, _ = near_pairs(made, 32)
        seconds = time.process_time() - begun
        pairs = set(zip(i.tolist(), j.tolist(), strict=True))
        matched = sum((n, count - some + n) in pairs for n in np.flatnonzero(near).tolist())
        share = matched / max(1, near.sum())
        print(f"| {count:,} | {band_bits(count)} | {seconds:.2f} | {seconds / count * 1e6:.0f} | {share:.1%} |")


def table(rows: list[dict[str, Any]], count: int) -> None:
    parts_of: dict[str, tuple[Any, ...]] = {"pool": (pool_tar, pool), "datasets": (datasets_row, with_datasets)}
    lines = {
        name: sum(len(inspect.getsource(part).splitlines()) for part in (measured, distinct, *parts))
        for name, parts in parts_of.items()
    }
    print("| engine | kept | records/s | records/s of CPU | peak, MB | lines of user code |\n|---|---|---|---|---|---|")
    for row in rows:
        rates = f"{count / row['seconds']:.0f} | {count / max(row['cpu'], 1e-9):.0f}"
        code = lines.get(row["engine"], len(RECIPE.splitlines()))
        print(f"| {row['engine']} | {row['kept']:,} | {rates} | {row['peak_mb']:.0f} | {code} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("curation-speed"))
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--engines", default="native,ray,serial,pool,datasets")
    parser.add_argument("--memory", default="")
    parser.add_argument("--driver", default="")
    parser.add_argument("--hashes", default="")
    parser.add_argument("--engine")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    if options.engine:
        print(engine(options.engine, options.pictures, options.store))
        return
    if options.hashes:
        hashes([int(word) for word in options.hashes.split(",")])
        return
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}")
    stamp = time.strftime("%H%M%S")
    if options.memory or options.driver:
        peaks = []
        for count in map(int, (options.memory or options.driver).split(",")):
            if options.memory:
                folder, name = make(options.output / f"pictures-{count}", count), "memory"
            else:
                folder, name = options.output, f"driver{count}"
            row = measure(name, folder, options.output / f"{name}-{count}-{stamp}")
            peaks.append(row["peak_mb"])
            print(json.dumps({"records": count, **row}), flush=True)
        print(f"the largest peak is {max(peaks) / min(peaks):.2f} times the smallest")
        return
    folder = make(options.output / f"pictures-{options.records}", options.records)
    rows = []
    for name in options.engines.split(","):
        if name == "datasets" and importlib.util.find_spec("datasets") is None:
            print("datasets is not installed: datasets.map is not measured")
            continue
        rows.append(measure(name, folder, options.output / f"{name}-{stamp}"))
        print(json.dumps(rows[-1]), flush=True)
    stores = [options.output / f"{row['engine']}-{stamp}" for row in rows if row["engine"] not in PEERS]
    for other in stores[1:]:
        print(
            f"{other.name}: {'the same store' if identical(stores[0], other) else 'ANOTHER STORE'} as {stores[0].name}"
        )
    table(rows, options.records)


if __name__ == "__main__":
    main()
