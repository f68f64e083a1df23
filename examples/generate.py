"""Draw one picture from the embedded checkpoint: `python examples/generate.py [prompt] [file.png]`."""

import sys

from lens_core import LensPipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red circles left of a blue star"
file = sys.argv[2] if len(sys.argv) > 2 else "generate.png"

pipeline = LensPipeline.from_pretrained("tiny:")
result = pipeline(prompt, seed=7)
result.images[0].save(file)
print(f"{prompt}\n  {file}  seed {result.seeds[0]}")
