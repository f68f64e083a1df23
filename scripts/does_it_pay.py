"""Does curation pay? Small trainings on a dirty web, on its curated form, and on as many pictures drawn at random; and
on the curated form with brief, dense and mixed captions. docs/does-it-pay.md has the outcome.

    python scripts/does_it_pay.py runs/pay --prepare                   (stores, and a bundle of 23 MB)
    python scripts/does_it_pay.py runs/pay/bundle --train --device cuda --jobs 4 --output runs/pay/results
    python scripts/does_it_pay.py --report runs/pay/results            (figures and tables of the runs that are there)

Training needs the bundle alone. All runs go on from `tiny:`, whose text stream is drawn anew from the run's seed. The
first seed of every arm comes first, so that something complete is there early; killed and run again, it goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes that read pictures are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before that

from lens_core.types import LensError

ARMS = ("dirty", "random", "curated", "dense", "mixed", "shuffled")  # pay_training.ARMS says what each is
STORES = ("dirty", "curated", "random")
WEB: dict[str, Any] = {"pictures": 12_000, "share": 0.75, "seed": 11, "side": 160}
TASKS = {"single": 0.3, "two": 0.3, "colours": 0.4}
CURATION = Path("examples/curation/dirty-web.yaml")


def lens(*words: str | Path) -> None:
    """A `lens` command in a process of its own; what it prints is in the log of this script."""
    print(f"{time.strftime('%H:%M:%S')} lens {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "lens_core", *map(str, words)], check=True)


# ---- what is trained on ---------------------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """The web, three stores of it, and their bundle. What is there is kept."""
    import yaml
    from lens_shapes.dirty_web import Scenes, write

    if not (root / "web" / "truth.jsonl").is_file():  # written last
        shutil.rmtree(root / "web", ignore_errors=True)
        scenes = Scenes(TASKS, largest=True, sizes=((WEB["side"], WEB["side"]),), both_captions=True)
        write(root / "web", WEB["pictures"], WEB["share"], WEB["seed"], scenes)
    stores = root / "stores"
    if not (stores / "curated" / "report.json").is_file():
        recipe = yaml.safe_load(CURATION.read_text(encoding="utf-8"))
        recipe["sources"][0]["path"] = str(root / "web" / "pictures")
        (root / "curation.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        lens("data", "curate", root / "curation.yaml", "--output", stores / "curated")
    lens("data", "import", stores / "dirty", root / "web" / "pictures")
    draw_at_random(stores)
    bundle(stores, root / "bundle")


def draw_at_random(stores: Path) -> None:
    """The control: the dirty web with pictures dropped at random, until as few are left as curation keeps."""
    from lens_data.store import Store

    dirty, curated = Store(str(stores / "dirty")), Store(str(stores / "curated"))
    rows = dirty.columns("id").sort_by("id")["_rowid"].to_numpy()
    some = np.random.default_rng(WEB["seed"]).permutation(rows)[: len(curated)]
    columns = ("id", "image", "height", "width", "brief", "dense", "source")
    drawn = [{name: row[name] for name in columns} for row in dirty.rows(some.tolist(), *columns).values()]
    random = Store(str(stores / "random"), create=True)
    if not len(random):
        random.insert(drawn)


# ---- the bundle -----------------------------------------------------------------------------------------------------


def bundle(stores: Path, folder: Path) -> None:
    """Write what training needs of the stores, to carry it to a machine with a GPU: each picture that training would
    see, as it would see it at 64 x 64, its captions, and which stores hold it. A bundle that is there is kept."""
    import torch
    from safetensors.torch import save_file

    from lens_core.io.atomic_files import write_atomic, write_text

    if (folder / "pictures.jsonl").is_file():  # written last
        return
    members = {name: dict(seen(stores / name)) for name in STORES}
    files, lines = list[bytes](), list[str]()
    for key, (image, brief, dense) in members["dirty"].items():
        for name, others in members.items():
            if others.get(key, (image, brief, dense)) != (image, brief, dense):
                raise LensError(f"{stores / name}: {key} is not as in dirty; make the stores again")
        files.append(image)
        names = [name for name, others in members.items() if key in others]
        lines.append(json.dumps({"id": key, "brief": brief, "dense": dense, "stores": names}))
    stray = set().union(*members.values()) - set(members["dirty"])
    if stray:
        raise LensError(f"{stores}: {len(stray)} pictures, {min(stray)} one of them, are not in dirty; make it again")
    ends = torch.tensor([len(data) for data in files]).cumsum(0)
    tensors = {"files": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8), "ends": ends}
    write_atomic(folder / "pictures.safetensors", lambda path: save_file(tensors, path))
    write_text(folder / "pictures.jsonl", "\n".join(lines) + "\n")
    print(f"{folder}: {len(files)} pictures", flush=True)


def seen(store: Path) -> Iterator[tuple[str, tuple[bytes, str, str]]]:
    """The pictures that a training at 64 px sees of a store, by its dataset's own rules: id, then file and captions."""
    from lens_data import pictures
    from lens_data.caching import Latent
    from lens_data.dataset import ROWS, StoreDataset
    from PIL import Image

    dataset = StoreDataset(StoreDataset.Config(str(store), buckets=(((64, 64),),), batch=1))
    places = [entry.row for _, entry in dataset.encodings() if isinstance(entry, Latent)]
    for start in range(0, len(places), ROWS):
        rows = dataset.store.rows(places[start : start + ROWS], "id", "image", "brief", "dense")
        for row in rows.values():
            try:
                pixels = pictures.fit(pictures.read(row["image"]), (64, 64))
            except pictures.PictureError:
                continue
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "WEBP", lossless=True)
            yield row["id"], (file.getvalue(), row["brief"] or row["dense"], row["dense"] or row["brief"])


def bundle_of(path: Path) -> Path:
    """The bundle that a path is, or holds."""
    for folder in (path, path / "bundle"):
        if (folder / "pictures.jsonl").is_file():
            return folder
    raise LensError(f"{path}: holds no bundle; make one with `does_it_pay.py ROOT --prepare`")


# ---- the command ----------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train what is missing; how many runs have no result then."""
    from pay_training import Options, queue, train_all

    shared = Options(
        device=options.device,
        mode=options.mode or ("graph" if options.device.startswith("cuda") else "eager"),
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        select_prompts=options.select_prompts,
        test_prompts=options.test_prompts,
        readers=options.readers or max(1, (os.cpu_count() or 2) // options.jobs - 1),
        until=time.time() + 60 * options.minutes,
    )
    runs = queue(options.arms.split(","), [int(seed) for seed in options.seeds.split(",")])
    return train_all(bundle_of(options.root), options.output, shared, runs, options.jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("root", type=Path, nargs="?", default=Path("runs/pay"), help="where all is prepared; or a bundle alone")
    add("--prepare", action="store_true", help="make what is trained on, and its bundle")
    add("--train", action="store_true", help="train from the bundle")
    add("--report", type=Path, default=None, metavar="OUT", help="figures and tables of the runs in OUT")
    add("--output", type=Path, default=Path("runs/pay/results"), help="where --train puts results")
    add("--arms", default=",".join(ARMS))
    add("--seeds", default="1,2,3")
    add("--steps", type=int, default=1200)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3)
    add("--device", default="cuda")
    add("--mode", default="", choices=["", "eager", "graph"], help="how a step is launched; graph on a GPU")
    add("--jobs", type=int, default=1, help="processes that train side by side")
    add("--readers", type=int, default=0, help="processes of each job that read pictures; 0: the processors, shared")
    add("--minutes", type=float, default=600.0, help="no run begins that would not end in time")
    add("--select-prompts", type=int, default=60)
    add("--test-prompts", type=int, default=180)
    options = parser.parse_args()
    unknown = set(options.arms.split(",")) - set(ARMS)
    if unknown:
        parser.error(f"no arm is called {min(unknown)!r}; the arms are {', '.join(ARMS)}")
    if min(options.steps, options.batch, options.jobs, options.select_prompts, options.test_prompts) < 1:
        parser.error("--steps, --batch, --jobs and the numbers of prompts must be 1 or more")
    if not (options.prepare or options.train or options.report):
        parser.error("give --prepare, --train or --report OUT")
    try:
        if options.prepare:
            options.root.mkdir(parents=True, exist_ok=True)
            prepare(options.root.resolve())
        lacking = train(options) if options.train else 0
        if options.report:
            from pay_report import report

            report(options.report)
    except LensError as error:
        sys.exit(f"does_it_pay.py: {error}")
    if lacking:
        sys.exit(f"does_it_pay.py: {lacking} runs have no result; the same command goes on with them")


if __name__ == "__main__":
    main()
