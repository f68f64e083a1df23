"""A training method of your own: `own_method.py [steps] [folder]`.

This one is flow matching with the mean absolute error, and it reports how far the velocities are off in direction.
"""

import sys
from pathlib import Path

import torch
from attrs import frozen

from lens_core import BaseMethod, Catalog, Loss, Recipe, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/own_method")


class Absolute(BaseMethod):
    kind = "method"  # so that Catalog.installed(extra=…) offers it as `absolute`
    headline = ("backbone/loss", "backbone/cosine")  # what training prints; all else goes to log.jsonl

    @frozen
    class Config:
        pass

    def __init__(self, config, pipeline):
        self.pipeline = pipeline

    def trainable_modules(self):
        return {"backbone": self.pipeline.backbone}

    def steps(self, batches, modules, rng):
        for batch in batches:
            with torch.no_grad():  # which must be left before the yield
                micro_batch = self.pipeline.vae.encode(batch.images / 127.5 - 1), self.pipeline.encode(batch.captions)
            yield [micro_batch]

    def update_order(self, step):
        return ("backbone",)

    def loss(self, module_name, modules, batch, rng):
        data, text = batch
        t, noise = torch.rand(len(data), generator=rng).to(data), torch.randn(data.shape, generator=rng).to(data)
        time = t.view(-1, 1, 1, 1)
        v, target = modules[module_name]((1 - time) * data + time * noise, t, text), noise - data
        cosine = torch.nn.functional.cosine_similarity(v.detach().flatten(1), target.flatten(1)).mean()
        return Loss((v - target).abs().mean(), {"cosine": cosine})


recipe = {
    "pipeline": {"start": "tiny:"},
    "method": "absolute",
    "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 8},
    "train": {"steps": steps, "lr": 1e-4, "log_every": 5},
}
catalog = Catalog.installed(extra=[sys.modules[__name__]])
print(Trainer(structure(Recipe, recipe), catalog, folder).train().model)
