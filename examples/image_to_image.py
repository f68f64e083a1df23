"""Change a picture: more of it goes the higher the strength. `python examples/image_to_image.py [file.png]`."""

import sys

from diffusers.utils import make_image_grid

from lens_core import LensPipeline

file = sys.argv[1] if len(sys.argv) > 1 else "image_to_image.png"

pipeline = LensPipeline.from_pretrained("tiny:")
first = pipeline("a red circle", num_inference_steps=8, seed=3).images[0]
pictures = [first]
for strength in (0.3, 0.6, 0.9):
    result = pipeline("a blue star", image=first, strength=strength, num_inference_steps=8, seed=4)
    pictures.append(result.images[0])

make_image_grid(pictures, 1, 4).save(file)
print(f"{file}: the picture, then strength 0.3, 0.6, 0.9")
