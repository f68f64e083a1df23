"""Put a pipeline together from its parts by hand, and draw with it: `python examples/assemble.py [file.png]`.

This is what `LensPipeline.from_pretrained` does by name. Do it yourself to replace a part, or to look inside one.
"""

import sys

from lens_flow.euler import Euler
from lens_flux2.vae import Flux2VAE
from lens_gpt_oss.encoder import GptOssEncoder
from lens_mmdit.model import LensTransformer2DModel

from lens_core import Catalog, LensPipeline, structure
from lens_core.checkpoints.manifest import read_manifest, resolve_uri

file = sys.argv[1] if len(sys.argv) > 1 else "assemble.png"

catalog = Catalog.installed()
folder = resolve_uri("tiny:", catalog)
description = read_manifest(folder, catalog)
configs = {kind: part["config"] for kind, part in description["components"].items()}

# Parts with weights are read from sub-folders of the checkpoint; `structure` validates each config.
vae = Flux2VAE.load(folder, structure(Flux2VAE.Config, configs["vae"]))
text_encoder = GptOssEncoder.load(folder, structure(GptOssEncoder.Config, configs["text_encoder"]))
backbone = LensTransformer2DModel.load(folder, structure(LensTransformer2DModel.Config, configs["backbone"]))
sampler = Euler(structure(Euler.Config, configs["sampler"]))

pipeline = LensPipeline(vae.eval(), text_encoder.eval(), backbone.eval(), sampler, presets=description["presets"])
text = pipeline.encode(["a green square"])
print(f"text features: {list(text.features.shape)} = [prompt, tapped layer, token, channel]")
print(f"latents: {vae.channels} channels, one cell for {vae.downscale} x {vae.downscale} px")

pipeline("a green square", seed=3).images[0].save(file)
print(file)
