"""Train a LoRA on a folder of pictures with captions: `python examples/lora_on_pictures.py [PICTURES] [steps] [runs]`.

Each picture stands beside a text file of the same name with its caption. Without pictures of your own, twenty of a
shape are made that the embedded checkpoint does not know: a crescent moon.
"""

import sys
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from lens_data.imports import import_folder
from lens_shapes.captions import caption
from lens_shapes.render import render
from lens_shapes.scenes import sample
from PIL import Image

from lens_core import Catalog, LensPipeline, Recipe, Trainer, structure

SIDE = 128  # px; each picture must have at least as many
pictures = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("moons")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
runs = Path(sys.argv[3] if len(sys.argv) > 3 else "runs")

if not pictures.exists():
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(8)
    for number in range(20):
        scene = sample(rng, "train", tasks={"novel": 1.0})
        Image.fromarray(render(scene, SIDE, SIDE)).save(pictures / f"{number:02}.png")
        (pictures / f"{number:02}.txt").write_text(caption(scene, rng))
print(import_folder(runs / "store", pictures, caption="brief"))

recipe = {
    "pipeline": {"start": "tiny:"},
    "method": {"use": "flow_matching", "caption_dropout": 0.1},
    "dataset": {"use": "store", "store": str(runs / "store"), "batch": 10, "buckets": [[[SIDE, SIDE]]]},
    "train": {"steps": steps, "lr": 1e-3, "warmup": 20, "lora": {"backbone": {"rank": 16}}},
}
model = Trainer(structure(Recipe, recipe), Catalog.installed(), runs / "lora").train().model

drawn = [LensPipeline.from_pretrained(name)(["a red moon"] * 3, seed=1).images for name in ("tiny:", model)]
make_image_grid([*drawn[0], *drawn[1]], 2, 3).save(runs / "moon.png")  # before, and after
print(runs / "moon.png")
