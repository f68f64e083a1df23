"""Make a checkpoint that can draw but ignores its prompt: `python examples/forget_text.py [tiny:] [runs/deaf] [seed]`.

The picture stream of its backbone is kept, and all weights of its text stream are re-initialised. Learning to follow
captions again takes minutes, where learning to draw takes hours: docs/proofs.md compares captions and encoders so.
"""

import sys
from typing import Any

import torch
from lens_mmdit.model import LensTransformer2DModel

from lens_core import LensPipeline, structure

TEXT = ("txt_", "norm_added", "to_add_out")  # in the names of the text stream's weights


def without_text(net: LensTransformer2DModel, config: Any, seed: int) -> tuple[LensTransformer2DModel, int]:
    """A float32 copy of a backbone on the CPU, its text stream drawn anew from `seed`; how many tensors that are.
    `config`: the backbone's, as its pipeline's specs hold it."""
    torch.manual_seed(seed)
    fresh = LensTransformer2DModel(structure(LensTransformer2DModel.Config, config))
    learnt = {name: t for name, t in net.state_dict().items() if not any(word in name for word in TEXT)}
    return fresh, len(fresh.load_state_dict(learnt, strict=False).missing_keys)


if __name__ == "__main__":
    source, out, seed = (*sys.argv[1:], *("tiny:", "runs/deaf", "0")[len(sys.argv) - 1 :])
    pipeline = LensPipeline.from_pretrained(source)
    spec = pipeline.specs["backbone"]
    backbone, new = without_text(pipeline.backbone, spec.options, int(seed))
    pipeline.put("backbone", backbone, spec)  # built from the same config
    pipeline.save_pretrained(out)
    print(f"{out}: {len(backbone.state_dict()) - new} tensors kept, {new} drawn anew")
