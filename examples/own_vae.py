"""A VAE of your own, and a small new backbone on it: `own_vae.py [steps] [folder]`.

This one rearranges pixels, so it needs no training. The channels of the backbone follow it.
"""

import sys
from pathlib import Path

import torch
from attrs import frozen

from lens_core import Catalog, Recipe, Trainer, structure
from lens_core.checkpoints.tensor_files import load_module, save_module
from lens_core.testing import check_vae

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/own_vae")


class Fold(torch.nn.Module):
    kind, channels, downscale = "vae", 192, 8  # so that Catalog.installed(extra=…) offers it as `fold`

    @frozen
    class Config:
        std: float = 0.5  # of pixels in [-1, 1]

    def __init__(self, config):
        super().__init__()
        self.std = torch.nn.Parameter(torch.tensor(config.std))

    def encode(self, pixels):
        return torch.nn.functional.pixel_unshuffle(pixels, 8) / self.std

    def decode(self, z):
        return torch.nn.functional.pixel_shuffle(z * self.std, 8)

    def save(self, folder):
        save_module(self, folder / "vae")

    @classmethod
    def load(cls, folder, config, dtype=None):
        load_module(vae := cls(config), folder / "vae", dtype=dtype)
        return vae


check_vae(Fold(Fold.Config()), Fold.Config())
recipe = {
    "pipeline": {"start": "tiny:", "vae": "fold", "backbone": {"use": "mmdit", "like": "start", "num_layers": 2}},
    "method": "flow_matching",
    "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 8},
    "train": {"steps": steps, "lr": 1e-3},
}
catalog = Catalog.installed(extra=[sys.modules[__name__]])
print(Trainer(structure(Recipe, recipe), catalog, folder).train().model)
