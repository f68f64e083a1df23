"""Save a pipeline as a checkpoint, and put it on the Hub: `python examples/push_to_hub.py [folder] [org/name]`.

Without a repository, only the folder is written. Log in first: `hf auth login`.
"""

import sys
from pathlib import Path

from lens_core import LensPipeline

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "my-model")
repository = sys.argv[2] if len(sys.argv) > 2 else None

pipeline = LensPipeline.from_pretrained("tiny:")
pipeline.use_sampler("heun")
pipeline.presets |= {"steps": 10}
pipeline.save_pretrained(folder)
again = LensPipeline.from_pretrained(folder)  # the sampler and the number of steps are the checkpoint's own now
print(f"{folder}: {again.specs['sampler'].use}, {again.presets['steps']} steps")

if repository:
    print(pipeline.push_to_hub(repository, private=True))
