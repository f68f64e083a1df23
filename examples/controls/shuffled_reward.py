"""A control for reinforcement learning: the exact reward of shapes, handed to the wrong pictures.

    lens --plugin examples/controls/shuffled_reward.py train examples/recipes/tiny/4b_rl_nft.yaml \
        --set "method.rewards=[{use: shuffled_shapes, processes: 12}]" --output runs/rl-shuffled

The rewards of each rollout are the same numbers, in another order: whatever a run gains by them is not learned from the
pictures.
"""

import numpy as np
from attrs import evolve
from lens_shapes.benchmark import ShapesReward


class ShuffledShapes:
    """The scores of `shapes`, partial credit included, in an order that follows from the pictures alone."""

    kind = "reward"
    Config = ShapesReward.Config

    def __init__(self, config):
        self.reward = ShapesReward(evolve(config, partial=True))

    def score(self, images, prompts):
        scores = self.reward.score(images, prompts)
        order = np.random.default_rng(int(images.sum())).permutation(len(scores))
        return [scores[i] for i in order]
