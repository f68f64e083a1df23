"""Repaint the left half of a picture; the right half stays, pixel for pixel. `examples/inpaint.py [file.png]`."""

import sys

from diffusers.utils import make_image_grid
from PIL import Image

from lens_core import LensPipeline

file = sys.argv[1] if len(sys.argv) > 1 else "inpaint.png"

pipeline = LensPipeline.from_pretrained("tiny:")
picture = pipeline("a red circle right of a green square", num_inference_steps=8, seed=3).images[0]
width, height = picture.size

mask = Image.new("L", picture.size)  # black: everything stays
mask.paste(255, (0, 0, width // 2, height))  # white: repainted
repainted = pipeline(
    "a red circle right of a blue star", image=picture, mask_image=mask, num_inference_steps=8, seed=4
).images[0]

right = (width // 2, 0, width, height)
assert repainted.crop(right).tobytes() == picture.crop(right).tobytes()
make_image_grid([picture, mask, repainted], 1, 3).save(file)
print(f"{file}: the picture, the mask, the result")
