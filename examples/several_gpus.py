"""Draw a list of prompts on every GPU of a machine: `accelerate launch examples/several_gpus.py PROMPTS.txt [folder]`.

Each process draws its share of the prompts. Picture i has the seed i, whatever the number of processes.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from lens_core import LensPipeline

prompts = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "pictures")
folder.mkdir(parents=True, exist_ok=True)

state = PartialState()
pipeline = LensPipeline.from_pretrained("tiny:", device=state.device)
with state.split_between_processes(list(enumerate(prompts))) as mine:
    for number, prompt in mine:
        pipeline(prompt, seed=number).images[0].save(folder / f"{number:04}.png")
print(f"process {state.process_index} of {state.num_processes}: {len(mine)} pictures")
state.destroy_process_group()
