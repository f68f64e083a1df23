"""Mix two LoRAs by weight, and take them out again: `python examples/two_loras.py A.safetensors B.safetensors [file]`.

Without files, two random ones are made: they show the calls, not an art.
"""

import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from lens_core import LensPipeline
from lens_core.checkpoints.tensor_files import save_tensors

files = [Path(word) for word in sys.argv[1:3]] or [Path("a.safetensors"), Path("b.safetensors")]
output = sys.argv[3] if len(sys.argv) > 3 else "two_loras.png"

pipeline = LensPipeline.from_pretrained("tiny:")
for seed, file in enumerate(files):
    if not file.exists():
        rng = torch.Generator().manual_seed(seed)
        name = "transformer.transformer_blocks.0.attn.img_qkv"
        rows, columns = pipeline.backbone.transformer_blocks[0].attn.img_qkv.weight.shape
        down, up = torch.randn(4, columns, generator=rng) / 4, torch.randn(rows, 4, generator=rng) / 4
        save_tensors(file, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})

pictures = [pipeline("a red circle", num_inference_steps=8, seed=3).images[0]]
for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
    for file, weight in zip(files, weights, strict=True):
        pipeline.load_lora_weights(file, weight)
    pictures.append(pipeline("a red circle", num_inference_steps=8, seed=3).images[0])
    pipeline.unload_lora_weights()  # the weights are bit for bit what they were

assert pipeline("a red circle", num_inference_steps=8, seed=3).images[0].tobytes() == pictures[0].tobytes()
make_image_grid(pictures, 1, 4).save(output)
print(f"{output}: without, the first, the second, half of each")
