"""Time GenEval's two models in full size, with random weights: `perceiver_speed.py [--device cuda] [--pictures 32]`.

Works from a clone without installing it. Prints a line for each model and batch: seconds a picture of 1024 x 1024 px,
from the picture in memory to detections or colours, and the peak of the GPU's memory. Then how far the detector's class
probabilities on that device are from those on the CPU in float32. Random weights cost what trained ones do, but for
the masks of detections, of which there are few. `--small` takes tiny models, to try the script.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests" / "plugins")]

import bench_models  # type: ignore[import-not-found]  # noqa: E402  # of the tests; the path comes first
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lens_bench.perceive import detection  # noqa: E402
from lens_bench.perceive.clip import ClipColors  # noqa: E402
from lens_bench.perceive.mask2former import Mask2Former  # noqa: E402
from PIL import Image  # noqa: E402


def pictures(count: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def report(name: str, perceiver: Any, images: list[Image.Image], question: Any, device: str) -> None:
    """Time `perceiver` on batches of its own size, after one to warm up."""
    batch = perceiver.batch_size
    cuda = device.startswith("cuda")
    perceiver.perceive(images[:batch], [question] * min(batch, len(images)))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        perceiver.perceive(some, [question] * len(some))
    seconds = (time.perf_counter() - start) / len(images)
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if cuda else ""
    print(f"{name}, batch {batch}: {seconds:.4f} s a picture{memory}", flush=True)


def probabilities(folder: Path, image: Image.Image, device: str) -> torch.Tensor:
    model = Mask2Former(Mask2Former.Config(model=str(folder), device=device))._loaded()
    pixels, _ = detection.preprocess(np.asarray(image))
    with torch.inference_mode():
        output = model(pixel_values=torch.from_numpy(pixels)[None].to(model.device))
    logits: torch.Tensor = output.class_queries_logits[0]
    return logits.softmax(-1).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{options.device} ({name}), torch {torch.__version__}", flush=True)
    images = pictures(options.pictures, 64 if options.small else 1024)
    side = images[0].width
    with tempfile.TemporaryDirectory() as folder:
        detector = bench_models.mask2former(Path(folder) / "mask2former", full=not options.small)
        clip = bench_models.clip(Path(folder) / "clip", full=not options.small)
        for batch in (1, 4, 8):
            config = Mask2Former.Config(model=str(detector), batch_size=batch, device=options.device)
            report("mask2former", Mask2Former(config), images, None, options.device)
        question = {"class": "car", "objects": [{"box": [0, 0, side, side], "mask": None}] * 2}
        colors = ClipColors(ClipColors.Config(model=str(clip), batch_size=16, device=options.device))
        report("clip_colors, 2 objects", colors, images, question, options.device)
        if options.device != "cpu":
            here, there = (probabilities(detector, images[0], device) for device in ("cpu", options.device))
            print(f"class probabilities differ by at most {(here - there).abs().max():.2e} from the CPU's", flush=True)


if __name__ == "__main__":
    main()
