"""Reinforcement learning from rewards: DiffusionNFT (arXiv 2509.16117), a policy update without likelihoods.

objective  the arithmetic: advantages, the reflected velocities and their losses
rollout    which prompts, which seeds; pictures drawn with the old policy
policies   copies of the policy: the old one, and the reference of the KL penalty
micro_batches  which pictures are learned together, at which times, under which noise
metrics    what is logged of a rollout
rewards    the scores of those pictures, and what happens when one fails
estimate   what a run would need: memory by part, calls, dollars
method     method `diffusion_nft`
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_nft.method import DiffusionNFT

    return {"diffusion_nft": DiffusionNFT}
