"""Distil the embedded checkpoint into a student of four steps without guidance: `examples/distil.py [steps] [runs]`.

A few steps show the calls; examples/recipes/tiny/5c_distill_turbo.yaml is the recipe that gives a good student.
"""

import sys
from pathlib import Path

from diffusers.utils import make_image_grid

from lens_core import Catalog, LensPipeline, Recipe, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")

recipe = {
    "pipeline": {"start": "tiny:", "sampler": {"use": "euler", "mu": 1.0}},  # the times of the student's steps
    "method": {"use": "trajectory_regression", "teacher_steps": 2},
    "dataset": {"use": "shapes", "sizes": [[128, 128]], "batch": 16, "dense_caption_ratio": 0.0},
    "train": {"steps": steps, "optimizer": "muon", "lr": 6e-4, "warmup": 3, "lr_decay_fraction": 0.5},
}
model = Trainer(structure(Recipe, recipe), Catalog.installed(), runs / "distil").train().model

teacher = LensPipeline.from_pretrained("tiny:")
student = LensPipeline.from_pretrained(model)
settings = {"seed": 3, "num_inference_steps": 4, "guidance_scale": 1.0}
pictures = [pipeline(["three green squares"] * 4, **settings).images for pipeline in (teacher, student)]
make_image_grid([*pictures[0], *pictures[1]], 2, 4).save(runs / "student.png")  # the teacher above
print(f"{runs / 'student.png'}: {student.presets['steps']} steps at guidance {student.presets['guidance_scale']:g}")
