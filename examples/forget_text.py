"""Make a checkpoint that can draw but ignores its prompt: `python examples/forget_text.py [tiny:] [runs/deaf] [seed]`.

The picture stream of its backbone is kept, and all weights of its text stream are re-initialised. Learning to follow
captions again takes minutes, where learning to draw takes hours: docs/proofs.md compares captions and encoders so.
"""

import sys

import torch
from lens_mmdit.model import LensTransformer2DModel

from lens_core import Catalog, LensPipeline, structure
from lens_core.checkpoints.manifest import read_manifest, resolve_uri

TEXT = ("txt_", "norm_added", "to_add_out")  # in the names of the text stream's weights

source, out, seed = (*sys.argv[1:], *("tiny:", "runs/deaf", "0")[len(sys.argv) - 1 :])
catalog = Catalog.installed()
config = read_manifest(resolve_uri(source, catalog), catalog)["components"]["backbone"]["config"]
pipeline = LensPipeline.from_pretrained(source, catalog=catalog)

torch.manual_seed(int(seed))
fresh = LensTransformer2DModel(structure(LensTransformer2DModel.Config, config))
learnt = {name: t for name, t in pipeline.backbone.state_dict().items() if not any(word in name for word in TEXT)}
new = fresh.load_state_dict(learnt, strict=False).missing_keys
pipeline.put("backbone", fresh, pipeline.specs["backbone"])  # built from the same config
pipeline.save_pretrained(out)
print(f"{out}: {len(learnt)} tensors kept, {len(new)} drawn anew")
