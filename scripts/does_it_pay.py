"""Does curation pay? Small trainings on a dirty web, on its curated form, and on as many pictures drawn at random; and
on the curated form with brief, dense and mixed captions. docs/does-it-pay.md has the outcome.

    python scripts/does_it_pay.py runs/pay                 (hours; killed and run again, it goes on)
    python scripts/does_it_pay.py runs/pay --report        (tables and figures of the runs that are there)

All runs go on from one checkpoint, `tiny:rl`; a seed decides the order of pictures, and the noise. The first seed of
every arm comes first, so that something complete is there early.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ARMS = {  # the store, and the share of samples with the dense caption
    "dirty": ("dirty", 0.0),
    "curated": ("curated", 0.0),
    "random": ("random", 0.0),
    "dense": ("curated", 1.0),
    "mixed": ("curated", 0.5),
}
SEEDS = (1, 2, 3)
MAIN, CAPTION_ARMS = ("dirty", "curated", "random"), ("curated", "dense", "mixed")
QUEUE = [(arm, 1) for arm in ARMS] + [
    (arm, seed) for arms in (MAIN, ("dense", "mixed")) for seed in SEEDS[1:] for arm in arms
]
WEB = {"pictures": 12_000, "share": 0.75, "seed": 11, "side": 160}
TASKS = {"single": 0.3, "two": 0.3, "colours": 0.4}
QUESTIONS = "{{use: shapes, split: {split}, tasks: [single, two, colours], prompts: {prompts}, largest: true{more}}}"
CURATION = Path("examples/curation/dirty-web.yaml")
CACHE = "pay"


def lens(*words: str | Path) -> None:
    """A `lens` command in a process of its own; what it prints is in the log of this script."""
    print(f"{time.strftime('%H:%M:%S')} lens {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "lens_core", *map(str, words)], check=True)


def question(split: str, prompts: int, dense: bool) -> dict[str, Any]:
    text = QUESTIONS.format(split=split, prompts=prompts, more=", dense_prompts: true" if dense else "")
    made: dict[str, Any] = yaml.safe_load(text)
    return made


# ---- what is trained on ---------------------------------------------------------------------------------------------


def prepare(root: Path, start: str) -> None:
    """The web, and three stores of it with their caches. What is there is kept."""
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
    for store in ("dirty", "curated", "random"):
        share = 0.5 if store == "curated" else 0.0  # the cache has both captions of the curated pictures
        lens("data", "cache", written(root / f"cache-{store}.yaml", recipe_of(root, start, store, share, 1, 1)))


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


# ---- the queue ------------------------------------------------------------------------------------------------------


def recipe_of(
    root: Path, start: str, store: str, dense: float, seed: int, steps: int, both: bool = False
) -> dict[str, Any]:
    """The recipe of one run: `listen.yaml` of docs/proofs.md, over a store, with a smaller learning rate."""
    return {
        "seed": seed,
        "pipeline": {"start": start},
        "method": {"use": "flow_matching", "caption_dropout": 0.1, "base_shift": 0.9, "max_shift": 1.15},
        "dataset": {
            "use": "store", "store": str(root / "stores" / store), "cache": CACHE, "batch": 32,
            "buckets": [[[64, 64]]], "dense_caption_ratio": dense, "seed": 70 + seed, "prefetch_workers": 1,
        },
        "train": {
            "steps": steps, "lr": 8e-4, "warmup": min(30, steps // 4), "lr_decay_fraction": 0.5, "ema_decay": 0.99,
            "precision": "bf16", "export_dtype": "bf16", "save_every": 200, "keep_checkpoints": 1, "log_every": 20,
        },
        "evaluation": {
            "every": max(1, steps // 3), "steps": 10,
            "benchmarks": [question("select", 60, dense) for dense in ((False, True) if both else (False,))],
        },
    }  # fmt: skip


def written(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def train(root: Path, start: str, arm: str, seed: int, steps: int) -> None:
    """One run, and its scores on other prompts than those of its curve. A run that is there is skipped."""
    name, out = f"{arm}-{seed}", root / "runs" / f"{arm}-{seed}"
    (root / "runs").mkdir(exist_ok=True)
    store, dense = ARMS[arm]
    if not (out / "model" / "lens.json").is_file():
        recipe = recipe_of(root, start, store, dense, seed, steps, arm in CAPTION_ARMS)
        begun = time.monotonic()
        lens("train", written(root / "runs" / f"{name}.yaml", recipe), "--output", out)
        with (root / "minutes.jsonl").open("a", encoding="utf-8") as file:
            load = round(os.getloadavg()[1], 1)
            file.write(json.dumps({"run": name, "minutes": (time.monotonic() - begun) / 60, "load": load}) + "\n")
    for kind in ("brief", "dense") if arm in CAPTION_ARMS else ("brief",):
        bench(out / "model", root / "bench" / f"{name}-{kind}", kind)


def bench(model: str | Path, out: Path, kind: str) -> None:
    if not (out / "result.json").is_file():
        benchmark = json.dumps(question("test", 180, kind == "dense"))
        lens("bench", benchmark, "--model", model, "--steps", "10", "--output", out)


# ---- what came of it ------------------------------------------------------------------------------------------------


def report(root: Path) -> None:
    """Two figures, and tables on standard output: score over steps, and paired differences at the end."""
    folder = root / "report"
    folder.mkdir(exist_ok=True)
    for name, arms, kinds in (
        ("curated", ("dirty", "random", "curated"), ("shapes", "shapes/*")),
        ("captions", ("curated", "dense", "mixed"), ("shapes", "shapes_1")),
    ):
        runs = {arm: [root / "runs" / f"{arm}-{seed}" for seed in SEEDS] for arm in arms}
        joined = [",".join(str(run) for run in some if (run / "model").is_dir()) for some in runs.values()]
        if any(joined):
            show = [word for kind in kinds for word in ("--show", kind)]
            lens("curves", *filter(None, joined), *show, "--table", "--output", folder / f"{name}.png")
    for kind, arms in (("brief", tuple(ARMS)), ("dense", CAPTION_ARMS)):
        benches = {"start": [root / "bench" / f"start-{kind}"]}
        benches |= {arm: [root / "bench" / f"{arm}-{seed}-{kind}" for seed in SEEDS] for arm in arms}
        groups = [",".join(str(b) for b in some if (b / "result.json").is_file()) for some in benches.values()]
        if len(list(filter(None, groups))) > 1:
            lens("compare", *filter(None, groups), "--output", folder / f"{kind}.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--start", default="tiny:rl", help="the checkpoint that all runs go on from")
    parser.add_argument("--arms", default=",".join(ARMS), help="those that are trained here")
    parser.add_argument("--prepare", action="store_true", help="make what is trained on, and stop")
    parser.add_argument("--report", action="store_true", help="only what came of the runs that are there")
    options = parser.parse_args()
    root = options.root.resolve()
    if not options.report:
        root.mkdir(parents=True, exist_ok=True)
        prepare(root, options.start)
    if options.prepare:
        return
    for arm, seed in () if options.report else QUEUE:
        if arm in options.arms.split(","):
            train(root, options.start, arm, seed, options.steps)
    for kind in () if options.report else ("brief", "dense"):
        bench(options.start, root / "bench" / f"start-{kind}", kind)
    report(root)


if __name__ == "__main__":
    main()
