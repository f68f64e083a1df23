"""What the mixture of scenes is worth for unseen colours of shapes: one short training by each, all else the same.

    python scripts/mixture_trial.py first runs/mixture      (the mixture of the embedded model's first run; 20 minutes)
    python scripts/mixture_trial.py further runs/mixture    (that of its second, in which most captions name colours)

The start is `--start`, a checkpoint that draws, whose text stream is re-initialised: following captions is then learned
anew, from 10,000 scenes of 64 px. docs/proving-ground.md has the outcome, from the weights of the first run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_loop import Cache, Step, TextStore, draw
from embedded_scenes import MIXTURES, Group, caption_tokens
from lens_flow.matching import FlowMatching
from lens_shapes import splits
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.captions import caption
from lens_shapes.render import render
from lens_shapes.scoring import score_images
from torch import nn
from train_embedded import BRIEF, FLOW

from lens_core import LensPipeline

ASKED = ("colours", "two", "counting", "position", "attribution")
PART = 50  # scenes rendered and encoded at once


def scenes(pipeline: Any, tasks: dict[str, float], count: int, seed: int) -> Cache:
    """`count` scenes of the split `train` at 64 px, encoded."""
    encoder, vae, cpu = pipeline.text_encoder, pipeline.vae, torch.device("cpu")
    store = TextStore(encoder.layers, encoder.width, BRIEF, count, cpu)
    cache = Cache(Group("64", (64, 64), 1, False, BRIEF, count), vae.channels, vae.downscale, store, cpu)
    rng = np.random.default_rng(seed)
    for start in range(0, count, PART):
        part = min(PART, count - start)
        drawn = [splits.sample(rng, "train", tasks=tasks, largest=True) for _ in range(part)]
        images = torch.from_numpy(np.stack([render(scene, 64, 64) for scene in drawn]))
        rows = store.add(encoder, caption_tokens(encoder, [caption(scene, rng) for scene in drawn]))
        cache.add(vae, images, torch.tensor(rows))
    return cache


def forget(net: nn.Module, seed: int) -> None:
    """Re-initialise the weights of the text stream."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if "txt" not in name and "add_" not in name:
            continue
        if p.ndim > 1:
            nn.init.normal_(p, 0, 0.02 if "mod" in name else p[0].numel() ** -0.5)
        else:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def score(pipeline: Any, tasks: Sequence[str], guidance: float) -> dict[str, float]:
    """The share of 40 prompts of `select` that are drawn right, by task."""
    shares = {}
    for task in tasks:
        config = ShapesBenchmark.Config(prompts=40, split="select", tasks=(task,), seed=3)
        prompts = ShapesBenchmark(config).prompts()
        text = pipeline.encode([p.text for p in prompts])
        images = draw(pipeline, text, range(len(prompts)), 64, 12, guidance)
        values = [float(s.value or 0) for s in score_images(images, prompts)]
        shares[task] = round(sum(values) / len(values), 3)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", choices=MIXTURES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--start", default="tiny:")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pipeline: Any = LensPipeline.from_pretrained(options.start, dtype=torch.float32, device="cpu")
    cache = scenes(pipeline, MIXTURES[options.mixture], options.scenes, options.seed)
    net = pipeline.backbone
    forget(net, options.seed)
    step = Step(FlowMatching(FlowMatching.Config(**FLOW), pipeline), net, "eager", 0.99)  # type: ignore[arg-type]
    rng, begun = torch.Generator().manual_seed(options.seed), time.monotonic()
    for n in range(1, options.steps + 1):
        step.lr.fill_(options.lr * min(1, n / 30, (1 - n / options.steps) / 0.5))
        step("64", *cache.draw(32, 0.1, rng))
        if n == 50:
            step.copy(step.average, step.parameters)  # a young average would remember the first weights
    step.copy(step.parameters, step.average)
    net.eval()
    result = {
        "mixture": options.mixture, "start": pipeline.version, "steps": options.steps, "seed": options.seed,
        "loss": step.take_losses()["64"], "guidance 3": score(pipeline, ASKED, 3.0),
        "guidance 1": score(pipeline, ("colours",), 1.0), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    (options.output / f"{options.mixture}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
