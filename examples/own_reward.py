"""A reward of your own, and ten steps of reinforcement learning by it: `own_reward.py [steps] [folder]`.

The reward is for blue pictures, and few steps show that they turn blue: a real one should be harder to please.
"""

import sys
from pathlib import Path

from attrs import frozen
from diffusers.utils import make_image_grid

from lens_core import Catalog, LensPipeline, Recipe, Score, Trainer, structure

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/own_reward")


class Blueness:
    kind = "reward"  # so that Catalog.installed(extra=…) offers it as `blueness`

    @frozen
    class Config:
        pass

    def __init__(self, config):
        pass

    def score(self, images, prompts):
        colours = images.float().mean((2, 3)) + 1  # [B,3]; above 0
        return [Score("ok", float(share)) for share in colours[:, 2] / colours.sum(1)]


prompts = {"use": "shapes", "split": "train", "prompts": 40}
rollouts = {"prompts_per_rollout": 2, "pictures_per_prompt": 4, "sizes": [[64, 64]], "rollout_steps": 4}
learning = {"rollout_guidance": 5.0, "timesteps_per_image": 2}
recipe = {
    "seed": 1,
    "pipeline": {"start": "tiny:"},
    "method": {"use": "diffusion_nft", "prompts": prompts, "rewards": ["blueness"], **rollouts, **learning},
    "train": {"steps": steps, "lr": 2e-4, "betas": [0.9, 0.999]},
}
catalog = Catalog.installed(extra=[sys.modules[__name__]])
model = Trainer(structure(Recipe, recipe), catalog, folder).train().model
pictures = []
for name in ("tiny:", model):
    pictures += LensPipeline.from_pretrained(name)(["a red circle"] * 3, num_inference_steps=8, seed=100).images
make_image_grid(pictures, 2, 3).save(folder / "before_and_after.png")
print(folder / "before_and_after.png")
