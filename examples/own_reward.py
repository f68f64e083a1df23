"""A reward of your own, and reinforcement learning by it: `python examples/own_reward.py [steps] [folder]`.

The reward is for blue pictures, and few steps show that they turn blue: a real one should be harder to please.
"""

import sys
from pathlib import Path

from attrs import frozen

from lens_core import Catalog, LensPipeline, Recipe, Score, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/own_reward")


class Blueness:
    """Share of blue in a picture's colours, 0 to 1."""

    kind = "reward"  # so that Catalog.installed(extra=…) offers it as `blueness`

    @frozen
    class Config:
        pass

    def __init__(self, config):
        pass

    def score(self, images, prompts):
        colours = images.float().mean((2, 3)) + 1  # [B,3]; above 0
        return [Score("ok", float(share)) for share in colours[:, 2] / colours.sum(1)]


catalog = Catalog.installed(extra=[sys.modules[__name__]])
recipe = structure(
    Recipe,
    {
        "seed": 1,
        "pipeline": {"start": "tiny:"},
        "method": {
            "use": "diffusion_nft",
            "prompts": {"use": "shapes", "split": "train", "prompts": 40},
            "rewards": [{"use": "blueness"}],
            "prompts_per_rollout": 2,
            "pictures_per_prompt": 4,
            "sizes": [[64, 64]],
            "rollout_steps": 4,
            "rollout_guidance": 5.0,
            "timesteps_per_image": 2,
        },
        "train": {"steps": steps, "lr": 2e-4, "betas": [0.9, 0.999]},
    },
)
report = Trainer(recipe, catalog, folder).train()

reward = Blueness(Blueness.Config())
for name in ("tiny:", report.model):
    pipeline = LensPipeline.from_pretrained(name)
    images = pipeline(
        ["a red circle"] * 4, num_inference_steps=8, height=64, width=64, seed=100, output_type="pt"
    ).images
    values = [score.value for score in reward.score(images, [])]
    print(f"{name}: blueness {sum(values) / len(values):.3f}")
