"""A dataset of your own, here PNGs named by their captions, and a LoRA on it: `own_dataset.py PICTURES [steps] [run]`.

Batches follow from the seed and their number, so that a run that is stopped goes on exactly.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from PIL import Image

from lens_core import Batch, Catalog, Recipe, Trainer, structure
from lens_core.testing import check_dataset

pictures = sys.argv[1] if len(sys.argv) > 1 else "pictures"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
folder = Path(sys.argv[3] if len(sys.argv) > 3 else "runs/own_dataset")


class Named:
    kind = "dataset"  # so that Catalog.installed(extra=…) offers it as `named`

    @frozen
    class Config:
        path: str
        batch: int = 4  # samples a step, all processes together
        seed: int = 0

    def __init__(self, config):
        self.config, self.handed_out = config, 0
        self.files = sorted(Path(config.path).glob("*.png"))

    def batches(self, rank, world):
        while True:
            rng = np.random.default_rng([self.config.seed, self.handed_out])
            files = [self.files[i] for i in rng.integers(len(self.files), size=self.config.batch)[rank::world]]
            images = [np.array(Image.open(file).convert("RGB").resize((64, 64))) for file in files]
            self.handed_out += 1
            yield Batch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), tuple(file.stem for file in files))

    def state_dict(self):
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state):
        self.handed_out = state["handed_out"]


check_dataset(lambda: Named(Named.Config(pictures)))
recipe = {
    "pipeline": {"start": "tiny:"},
    "method": "flow_matching",
    "dataset": {"use": "named", "path": pictures},
    "train": {"steps": steps, "lr": 1e-3, "lora": {"backbone": {"rank": 8}}},
}
catalog = Catalog.installed(extra=[sys.modules[__name__]])
print(Trainer(structure(Recipe, recipe), catalog, folder).train().model)
