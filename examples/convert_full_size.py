"""How much memory `lens convert` takes for the published backbone: `python examples/convert_full_size.py FOLDER`.

It makes a sparse file of the backbone's 1,264 tensors in bfloat16 (all zeros, which take no room on disk), converts it
to a diffusers folder of the same dtype, for which FOLDER needs 8.2 GB, and prints the seconds and the peak of memory.
"""

import json
import math
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from lens_tools.convert import convert

from lens_core import Catalog

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "full-size")
folder.mkdir(parents=True)
catalog = Catalog.installed()
backbone = catalog.find("backbone", "mmdit").cls
with torch.device("meta"):
    shapes = {name: list(t.shape) for name, t in backbone(backbone.Config()).state_dict().items()}

header, end = {}, 0
for name, shape in shapes.items():
    begin, end = end, end + 2 * math.prod(shape)
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
text = json.dumps(header).encode()
source = folder / "lens_bf16.safetensors"
with source.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
written = list(convert(source, folder / "out", "diffusers", None, catalog))
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(path.stat().st_size for path in written) / 1e9
print(f"{len(shapes)} tensors, {size:.2f} GB written in {seconds:.0f} s")
print(f"peak of the process {peak / 1e6:.2f} GB, {before / 1e6:.2f} of them before it began")
shutil.rmtree(folder)
