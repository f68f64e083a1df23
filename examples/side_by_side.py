"""Draw prompts with each embedded checkpoint, side by side: `side_by_side.py [prompt …] [file.png]`.

A row is a prompt. From left to right: `tiny:`, forty passes of its backbone; its student `tiny:turbo`, four; and
`tiny:rl`, forty, which came from the first model of that name, at 64 px, and knows no words.
"""

import sys
import time

from PIL import Image

from lens_core import LensPipeline

SIDE, GAP = 256, 8  # px
MODELS = ("tiny:", "tiny:turbo", "tiny:rl")
PROMPTS = (
    "two red circles left of a blue star",
    "a green triangle and a pink ring",
    'the word "LENS" on a mint background',
)

*prompts, file = sys.argv[1:] if sys.argv[1:] else (*PROMPTS, "demo.png")
prompts = prompts or list(PROMPTS)

width = len(MODELS) * (SIDE + GAP) - GAP
sheet = Image.new("RGB", (width, len(prompts) * (SIDE + GAP) - GAP), "white")
for column, model in enumerate(MODELS):
    pipeline = LensPipeline.from_pretrained(model)
    pipeline("a warm-up", seed=0, num_inference_steps=1)
    begun = time.perf_counter()
    result = pipeline(prompts, seed=7)
    seconds = (time.perf_counter() - begun) / len(prompts)
    settings = f"{result.settings['steps']} steps at guidance {result.settings['guidance_scale']:g}"
    print(f"  {model:11} {result.images[0].width:4} px  {settings:24} {seconds:.2f} s a picture")
    for row, picture in enumerate(result.images):
        large = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(large, (column * (SIDE + GAP), row * (SIDE + GAP)))
sheet.save(file)
print(f"  {file}")
