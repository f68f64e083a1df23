"""What is logged of a rollout: rewards, what is missing, how far the pictures of a prompt differ, costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_nft.objective import Advantages, optimality
from lens_nft.rewards import RewardScores
from lens_nft.rollout import Picture

BINS = ("0.0", "0.2", "0.4", "0.6", "0.8")  # where the fifths of r's range begin, for its histogram


def rollout_metrics(
    pictures: Sequence[Picture], scores: RewardScores, advantage: Advantages, advantage_clip: float
) -> dict[str, float]:
    """Means by reward and component; shares of failed and masked pictures, masked and zero-variance groups; quantiles
    and histogram of r; diversity."""
    valid = advantage.valid
    scored = {p.prompt.id for p, ok in zip(pictures, valid.tolist(), strict=True) if ok}
    r = optimality(advantage.value[valid], advantage_clip)
    shares = r.histc(len(BINS), 0, 1) / len(r)
    return {
        **scores.metrics(),
        "failed": float(scores.failed().double().mean()),
        "masked": float((~valid).double().mean()),
        "masked_groups": 1 - len(scored) / len({p.prompt.id for p in pictures}),
        "zero_variance": float(advantage.zero_variance.double().sum() / valid.double().sum()),
        **{f"r_{q}": float(r.quantile(q / 100)) for q in (10, 50, 90)},
        **{f"r_in/{name}": float(share) for name, share in zip(BINS, shares, strict=True)},
        "diversity": diversity(pictures),
    }


def diversity(pictures: Sequence[Picture]) -> float:
    """The mean variance of latents among the pictures of one prompt; 0 where all are one picture."""
    groups: dict[int, list[Tensor]] = {}
    for picture in pictures:
        groups.setdefault(picture.prompt.id, []).append(picture.z)
    return sum(float(torch.stack(g).var(0, correction=0).mean()) for g in groups.values()) / len(groups)
