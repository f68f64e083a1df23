"""Distil the embedded checkpoint into a student of four steps without guidance: `examples/distil.py [steps] [runs]`.

A few steps show the calls; examples/recipes/tiny/5_distill_turbo.yaml is the recipe that gives a good student.
"""

import sys
from pathlib import Path

from diffusers.utils import make_image_grid

from lens_core import Catalog, LensPipeline, Recipe, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")

recipe = {
    "pipeline": {"start": "tiny:"},
    "method": {"use": "dmd2", "fake_score_updates": 2},
    "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 8, "dense_caption_ratio": 0.0},
    "train": {"steps": steps, "lr": 2e-4, "betas": [0.0, 0.99]},
}
model = Trainer(structure(Recipe, recipe), Catalog.installed(), runs / "distil").train().model

teacher, student = LensPipeline.from_pretrained("tiny:"), LensPipeline.from_pretrained(model)
settings = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 1.0}
pictures = [pipeline(["a red circle"] * 3, **settings).images for pipeline in (teacher, student)]
make_image_grid([*pictures[0], *pictures[1]], 2, 3).save(runs / "student.png")  # the teacher above
print(f"{runs / 'student.png'}: {student.presets['steps']} steps at guidance {student.presets['guidance_scale']:g}")
