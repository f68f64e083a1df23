"""One prompt and one seed over numbers of steps and guidance scales: `steps_and_guidance.py [prompt] [file.png]`."""

import sys

from diffusers.utils import make_image_grid

from lens_core import LensPipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red circles left of a blue star"
file = sys.argv[2] if len(sys.argv) > 2 else "steps_and_guidance.png"
STEPS, GUIDANCE = (2, 4, 12), (1.0, 2.5, 5.0, 8.0)

pipeline = LensPipeline.from_pretrained("tiny:")
settings = [{"num_inference_steps": n, "guidance_scale": g} for n in STEPS for g in GUIDANCE]
pictures = [pipeline(prompt, seed=7, **setting).images[0] for setting in settings]
make_image_grid(pictures, len(STEPS), len(GUIDANCE)).save(file)
print(f"{file}: steps {STEPS} from top to bottom, guidance {GUIDANCE} from left to right")
