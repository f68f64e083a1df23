"""Another text encoder, of your own, and a small new backbone on it: `another_encoder.py [steps] [folder]`.

Each byte of a prompt is one token. A backbone reads the features of one encoder, so a new one needs a new backbone.
"""

import sys
from pathlib import Path

import torch
from attrs import frozen

from lens_core import Catalog, Recipe, TextFeatures, Trainer, structure
from lens_core.checkpoints.tensor_files import load_module, save_module

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/another_encoder")


class Bytes(torch.nn.Module):
    kind, layers = "text_encoder", 1  # so that Catalog.installed(extra=…) offers it as `bytes`

    @frozen
    class Config:
        width: int = 32  # channels of a token

    def __init__(self, config):
        super().__init__()
        self.width, self.table = config.width, torch.nn.Embedding(256, config.width)

    def encode(self, prompts):
        rows = [torch.tensor([*p.encode()], dtype=torch.long, device=self.table.weight.device) for p in prompts]
        return TextFeatures.cat([TextFeatures(self.table(r)[None, None], (r >= 0)[None]) for r in rows])

    def save(self, folder):
        save_module(self, folder / "text_encoder", "model")

    @classmethod
    def load(cls, folder, config, dtype=None):
        load_module(encoder := cls(config), folder / "text_encoder", "model", dtype)
        return encoder


parts = {"text_encoder": {"use": "bytes", "width": 32}, "backbone": {"use": "mmdit", "like": "start", "num_layers": 2}}
recipe = {
    "pipeline": {"start": "tiny:", **parts},  # its VAE and sampler; the sizes of the backbone follow the encoder
    "method": "flow_matching",
    "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 16},
    "train": {"steps": steps, "lr": 1e-3},
}
catalog = Catalog.installed(extra=[sys.modules[__name__]])
print(Trainer(structure(Recipe, recipe), catalog, folder).train().model)
