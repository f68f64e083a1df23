"""Another text encoder, of your own, with a new backbone on it: `another_encoder.py [steps] [folder]`.

Each byte of a prompt is one token, with a learned vector. A backbone reads features of one encoder, so that a new
encoder needs a new backbone, or training of the old one: here a small new one learns for a few steps.
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
    """Encode byte t of a prompt as a learned vector; one layer."""

    kind, layers = "text_encoder", 1

    @frozen
    class Config:
        width: int = 32  # D

    def __init__(self, config):
        super().__init__()
        self.width = config.width
        self.table = torch.nn.Embedding(256, config.width)

    def encode(self, prompts):
        rows = [torch.tensor(list(p.encode()), dtype=torch.long, device=self.table.weight.device) for p in prompts]
        masks = [torch.ones(1, len(row), dtype=torch.bool, device=row.device) for row in rows]
        return TextFeatures.cat(
            [TextFeatures(self.table(row)[None, None], mask) for row, mask in zip(rows, masks, strict=True)]
        )

    def save(self, folder):
        save_module(self, folder / "text_encoder", "model")

    @classmethod
    def load(cls, folder, config, dtype=None):
        encoder = cls(config)
        load_module(encoder, folder / "text_encoder", "model", dtype)
        return encoder


recipe = structure(
    Recipe,
    {
        "pipeline": {
            "start": "tiny:",  # its VAE and sampler
            "text_encoder": {"use": "bytes", "width": 32},
            "backbone": {
                "use": "mmdit", "in_channels": 32, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2,
                "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12], "enc_hidden_dim": 32,
                "selected_layer_index": [0],
            },
        },
        "method": {"use": "flow_matching"},
        "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 16},
        "train": {"steps": steps, "lr": 1e-3},
    },
)  # fmt: skip
report = Trainer(recipe, Catalog.installed(extra=[sys.modules[__name__]]), folder).train()
print(report.model)
