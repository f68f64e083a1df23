"""Draw one prompt with the embedded checkpoint and with its four-step student: `side_by_side.py [prompt] [file.png]`.

The picture on the left takes forty passes of the backbone, the one on the right four.
"""

import sys
import time

from PIL import Image

from lens_core import LensPipeline

SCALE = 4  # pixels of the picture for each that was drawn

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red circles left of a blue star"
file = sys.argv[2] if len(sys.argv) > 2 else "demo.png"

print(prompt)
drawn = []
for model in ("tiny:", "tiny:turbo"):
    pipeline = LensPipeline.from_pretrained(model)
    pipeline("a warm-up", seed=0, num_inference_steps=1)
    begun = time.perf_counter()
    result = pipeline(prompt, seed=7)
    seconds = time.perf_counter() - begun
    drawn.append(result.images[0])
    settings = f"{result.settings['steps']} steps at guidance {result.settings['guidance_scale']:g}"
    print(f"  {model:11} {settings:26} {seconds:.2f} s")

width, height = drawn[0].size
sheet = Image.new("RGB", (2 * SCALE * width + 8, SCALE * height), "white")
for place, picture in enumerate(drawn):
    large = picture.resize((SCALE * width, SCALE * height), Image.Resampling.LANCZOS)
    sheet.paste(large, (place * (large.width + 8), 0))
sheet.save(file)
print(f"  {file}")
