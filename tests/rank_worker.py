"""One process of a run of several: `python rank_worker.py FOLDER` under a launcher's environment (test_distributed)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens_data
import lens_dmd2
import lens_flow
import lens_flux2
import lens_mmdit
import lens_nft
import lens_shapes
import torch
import toy
from attrs import frozen

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.recipe import Recipe, structure
from lens_core.training.trainer import Trainer
from lens_core.types import Prompt, Score

torch.set_num_threads(1)


class Redness:
    """Reward: the share of red, of the brightest."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float(image[0].float().mean()) / 255) for image in images]


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    return {"redness": Redness}


SHAPES = {"use": "shapes", "sizes": [[64, 64], [64, 80]], "batch": 8, "dense_caption_ratio": 0.0}
PARTS = {"vae": "blocks", "text_encoder": "letters", "backbone": {"use": "mixer", "width": 8}, "sampler": "euler"}
TRAIN = {
    "steps": 20,
    "lr": 2e-3,
    "ema_decay": 0.9,
    "save_every": 10,
    "keep_checkpoints": 9,
    "log_every": 10,
    "micro_batches": 2,
}
BLOCKS = {
    "use": "mmdit",
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "axes_dims_rope": [4, 4, 4],
    "enc_hidden_dim": 8,
    "selected_layer_index": [0],
}
VAE = {
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "one": {"method": "flow_matching", "dataset": SHAPES},
    "blocks": {  # a network of several blocks, each of which is divided by itself
        "method": "flow_matching",
        "dataset": SHAPES,
        "pipeline": {**PARTS, "backbone": BLOCKS},
    },
    "dropped": {  # one sample a process, often without a caption: then it runs no text stream, and the other does
        "method": {"use": "flow_matching", "caption_dropout": 0.5},
        "dataset": {**SHAPES, "batch": 2},
        "pipeline": {**PARTS, "backbone": BLOCKS},
    },
    "watched": {
        "method": "flow_matching",
        "train": {"ema_decay": 0.0},  # so that nothing but the optimizer changes weights between two evaluations
        "dataset": SHAPES,
        "pipeline": {**PARTS, "backbone": BLOCKS},
        "evaluation": {
            "every": 10,
            "prompts": ["a red circle", "two blue squares"],
            "benchmarks": [{"use": "shapes", "prompts": 7, "tasks": ["words"]}],
            "validation": {**SHAPES, "seed": 9},
            "validation_batches": 2,
            "keep_best": "shapes",
            "size": [64, 64],
            "steps": 2,
        },
    },
    "packed": {
        "method": "flow_matching",
        "pipeline": {**PARTS, "backbone": BLOCKS},
        "dataset": {
            "use": "packed",
            "store": os.environ.get("RANKS_STORE", ""),
            "budget": 80.0,
            "buckets": [[[16, 16], [16, 32], [32, 16]], [[32, 32]]],
        },
    },
    "two": {
        "method": {"use": "dmd2", "fake_score_updates": 2, "real_data_ratio": 0.3, "ida": 0.9},
        "dataset": SHAPES,
        "pipeline": {**PARTS, "guidance_scale": 3.0, "steps": 4},
    },
    "regressed": {  # the four captions of a part, one for each step of the student
        "method": {"use": "trajectory_regression", "teacher_steps": 2},
        "dataset": SHAPES,
        "pipeline": {**PARTS, "guidance_scale": 3.0},
    },
    "encoded": {  # its latent statistics are those of both processes
        "method": "autoencode",
        "dataset": SHAPES,
        "pipeline": {"vae": {"use": "flux2", **VAE}},
    },
    "rewarded": {
        "method": {
            "use": "diffusion_nft",
            "prompts": {"use": "shapes", "split": "train", "prompts": 14},
            "rewards": ["redness", {"use": "shapes", "partial": True, "weight": 0.5}],
            "prompts_per_rollout": 4,
            "pictures_per_prompt": 3,
            "sizes": [[64, 64], [64, 80]],
            "rollout_steps": 2,
            "timesteps_per_image": 2,
            "std_scope": "rollout",  # what processes must tell each other
            "micro_batch_size": 4,
            "kl": 0.1,
        },
    },
}
DIVIDED = [name for name in METHODS if name not in ("encoded", "rewarded")]
"""Those whose weights can be divided among processes."""


def recipe(name: str, **train: int) -> Recipe:
    train_options: dict[str, Any] = METHODS[name].get("train", {})
    return structure(
        Recipe, {"seed": 3, "pipeline": PARTS, **METHODS[name], "train": {**TRAIN, **train_options, **train}}
    )


def installed() -> Catalog:
    return Catalog.of(
        toy, lens_data, lens_flow, lens_flux2, lens_mmdit, lens_shapes, lens_dmd2, lens_nft, sys.modules[__name__]
    )


def run(name: str, out: Path, **train: int) -> None:
    said: list[str] = []
    going = Trainer(recipe(name, **train), installed(), out, log=said.append)
    report = going.train()
    rank = going.ranks.rank
    result = {
        "steps": report.steps,
        "said": said,
        "world": going.ranks.world,
        "mine": list(going.ranks.local_micro_batches),
    }
    if torch.distributed.is_initialized():
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # nothing public tells it
        result["patience"] = backend.options._timeout.total_seconds()
    (out / f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    root, shards = Path(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:]:
        run(name, root / name, fsdp_shards=shards)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
