"""One process of a run of several: `python rank_worker.py FOLDER` under a launcher's environment. See test_ranks.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lens_data
import lens_dmd2
import lens_flow
import lens_shapes
import torch
import toy

from lens_core.catalog import Catalog
from lens_core.config import Recipe, structure
from lens_core.loop import Run

torch.set_num_threads(1)
SHAPES = {"use": "shapes", "sizes": [[64, 64], [64, 80]], "batch": 8, "dense": 0.0}
PARTS = {"vae": "blocks", "text_encoder": "letters", "backbone": {"use": "mixer", "width": 8}, "sampler": "euler"}
TRAIN = {"steps": 20, "lr": 2e-3, "ema": 0.9, "save_every": 10, "keep": 9, "log_every": 10, "parts": 2}
METHODS = {
    "one": {"method": "flow_matching", "dataset": SHAPES},
    "packed": {
        "method": "flow_matching",
        "dataset": {
            "use": "packed",
            "store": os.environ.get("RANKS_STORE", ""),
            "budget": 80.0,
            "table": [[[16, 16], [16, 24], [24, 16]], [[32, 32]]],
        },
    },
    "two": {
        "method": {"use": "dmd2", "critic_steps": 2, "real": 0.3, "ida": 0.9},
        "dataset": SHAPES,
        "pipeline": {**PARTS, "guidance_scale": 3.0, "steps": 4},
    },
}


def recipe(name: str, **train: int) -> Recipe:
    return structure(Recipe, {"seed": 3, "pipeline": PARTS, **METHODS[name], "train": {**TRAIN, **train}})


def run(name: str, out: Path, **train: int) -> None:
    said: list[str] = []
    catalog = Catalog.of(toy, lens_data, lens_flow, lens_shapes, lens_dmd2)
    going = Run(recipe(name, **train), catalog, out, say=said.append)
    report = going.train()
    rank = going.ranks.rank
    told = {"steps": report.steps, "said": said, "world": going.ranks.world, "mine": list(going.ranks.mine)}
    (out / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in METHODS:
        run(name, root / name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
