"""One prompt and one seed over numbers of steps and guidance scales: `steps_and_guidance.py [prompt] [file.png]`."""

import sys

from PIL import Image

from lens_core import LensPipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red circles left of a blue star"
file = sys.argv[2] if len(sys.argv) > 2 else "steps_and_guidance.png"
STEPS, GUIDANCE = (2, 4, 8, 20), (1.0, 2.5, 5.0, 8.0)

pipeline = LensPipeline.from_pretrained("tiny:")
rows = [[pipeline(prompt, num_inference_steps=n, guidance_scale=g, seed=7).images[0] for g in GUIDANCE] for n in STEPS]
width, height = rows[0][0].size
sheet = Image.new("RGB", (len(GUIDANCE) * width, len(STEPS) * height))
for y, row in enumerate(rows):
    for x, picture in enumerate(row):
        sheet.paste(picture, (x * width, y * height))
sheet.save(file)
print(f"{file}: steps {STEPS} from top to bottom, guidance {GUIDANCE} from left to right")
