"""Distil the embedded checkpoint into a student of four steps without guidance: `examples/distil.py [steps] [runs]`.

A few steps show the calls; examples/recipes/tiny/5_distill_turbo.yaml is the recipe that gives a good student.
"""

import sys
from pathlib import Path

from lens_core import Catalog, LensPipeline, Recipe, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")

recipe = structure(
    Recipe,
    {
        "pipeline": {"start": "tiny:"},
        "method": {"use": "dmd2", "fake_score_updates": 2},
        "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 8, "dense_caption_ratio": 0.0},
        "train": {"steps": steps, "lr": 2e-4, "betas": [0.0, 0.99]},
    },
)
report = Trainer(recipe, Catalog.installed(), runs / "distil").train()

student = LensPipeline.from_pretrained(report.model)
student("a red circle", seed=3).images[0].save(runs / "student.png")
print(f"{runs / 'student.png'}: {student.presets['steps']} steps at guidance {student.presets['guidance_scale']:g}")
