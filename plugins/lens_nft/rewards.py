"""The rewards of a rollout: their scores, and what happens when one of them fails. Nothing becomes a zero.

What happens, in this order: a reward tries again by itself (an LLM's client does), its fallback scores the whole group,
the picture is absent, so is its group, if fewer than half are left (`objective.advantages`), the rollout is discarded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.attribution import calling, checked_scores
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, Score
from lens_nft.rollout import Picture, group_by


@frozen
class WeightedReward:
    """A reward, the name it is logged under, its weight, and what scores a whole group instead if it fails there."""

    name: str
    reward: Any
    weight: float = 1.0
    fallback: Any = None


@frozen
class RewardScores:
    """`scores`: by name, one a picture, None where it did not score; a fallback is called NAME.fallback, for its scale
    is another. `weights`: one a name. `replaced`: pictures on which a fallback decided."""

    scores: Mapping[str, Sequence[Score | None]]
    weights: Sequence[float]
    replaced: int = 0

    def values(self) -> Tensor:
        """float64 [J,N], NaN where a reward gave none."""
        rows = [
            [math.nan if s is None or s.value is None else float(s.value) for s in row] for row in self.scores.values()
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def failed(self) -> Tensor:
        """bool [N]: whether a reward that counts failed on the picture."""
        rows = [[s is not None and s.status == "failed" for s in row] for row in self.scores.values()]
        return torch.tensor(rows).any(0)

    def first_missing(self) -> str:
        """A reward that gave no value, its status, and why: `NAME says failed (the endpoint is away)`."""
        missing = [
            (score.status, name, score.evidence)
            for name, row in self.scores.items()
            for score in row
            if score is not None and score.value is None
        ]
        status, name, evidence = max(missing)  # "failed" comes after "abstain"
        return f"{name} says {status} ({evidence or 'no reason given'})"

    def metrics(self) -> dict[str, float]:
        """Means by reward and component, and the shares of abstentions and of pictures that a fallback decided."""
        metrics: dict[str, float] = {}
        for name, row in self.scores.items():
            present = [s for s in row if s is not None]
            means = [
                {name: float(s.value), **{f"{name}/{k}": float(v) for k, v in s.components.items() if _finite(v)}}
                for s in present
                if s.value is not None
            ]
            for key in sorted({k for h in means for k in h}):
                values = [h[key] for h in means if key in h]
                metrics[f"reward/{key}"] = sum(values) / len(values)
            if present:
                metrics[f"abstained/{name}"] = sum(s.status == "abstain" for s in present) / len(present)
        if any(name.endswith(FALLBACK) for name in self.scores):
            metrics["fallback"] = self.replaced / len(next(iter(self.scores.values())))
        return metrics


FALLBACK = ".fallback"


def weighted_rewards(
    specs: Sequence[ComponentSpec], parts: Mapping[str, tuple[str, type[Any], Any]]
) -> list[WeightedReward]:
    """The rewards, each under the name it is logged by. `parts`: (name, class, config) by path, as `rewards[0]` and
    `rewards[0].fallback`. `weight` and `fallback` are the method's options, the rest are the reward's own."""
    rewards: list[WeightedReward] = []
    for i, spec in enumerate(specs):
        name, reward, options = parts[f"rewards[{i}]"]
        short = name.partition(":")[2]
        short = f"{short}_{i}" if short in {r.name for r in rewards} else short
        _, fallback, others = parts.get(f"rewards[{i}].fallback", ("", None, None))
        weight = float(spec.options.get("weight", 1.0))
        rewards.append(WeightedReward(short, reward(options), weight, fallback(others) if fallback else None))
    return rewards


@torch.no_grad()
def score_pictures(rewards: Sequence[WeightedReward], pictures: Sequence[Picture]) -> RewardScores:
    """Every reward's scores, in the order of the pictures.

    A group on which a reward failed is scored again by its fallback, as a whole: two scales in one group would look
    like a difference. The fallback's scores count if there are more of them than the reward gave.
    """
    scores: dict[str, list[Score | None]] = {}
    weights: list[float] = []
    replaced: set[int] = set()
    for one in rewards:
        first: list[Score | None] = [*_scores_of(one.reward, pictures)]
        scores[one.name] = first
        weights.append(one.weight)
        if one.fallback is None:
            continue
        name = f"{one.name}{FALLBACK}"
        second: list[Score | None] = [None] * len(pictures)
        scores[name] = second
        weights.append(one.weight)
        spoiled = {p.prompt.id for p, s in zip(pictures, first, strict=True) if s is not None and s.status == "failed"}
        again = [i for i, p in enumerate(pictures) if p.prompt.id in spoiled]
        answers = dict(zip(again, _scores_of(one.fallback, [pictures[i] for i in again]), strict=True))
        for key in spoiled:
            group = [i for i in again if pictures[i].prompt.id == key]
            before = sum(s is not None and s.value is not None for s in (first[i] for i in group))
            if sum(answers[i].value is not None for i in group) > before:
                replaced.update(group)
                for i in group:
                    first[i], second[i] = None, answers[i]
    return RewardScores(scores, weights, len(replaced))


def total_spend(rewards: Sequence[WeightedReward]) -> dict[str, float]:
    """What the rewards have cost since this process began, added up over those that tell it as `spend`."""
    metrics: dict[str, float] = {}
    for one in rewards:
        spend = getattr(one.reward, "spend", {})
        known = spend.items() if isinstance(spend, Mapping) else ()
        for name, value in ((n, v) for n, v in known if _finite(v)):
            metrics[f"spend/{name}"] = metrics.get(f"spend/{name}", 0.0) + float(value)
    return metrics


def _scores_of(reward: Any, pictures: Sequence[Picture]) -> list[Score]:
    """One score a picture. Whatever a reward raises is a failure, whose evidence is the message: an endpoint that is
    away must not end a run that a fallback can save.

    Pictures of one size are scored in one call, and a group has one size, so a reward can look at whole groups, or ask
    in parallel. Raises LensError where a reward does not give one Score a picture, ConfigError as it comes.
    """
    by_index: dict[int, Score] = {}
    for rows in group_by(pictures, lambda p: p.image.shape, len(pictures)):
        images = torch.stack([pictures[i].image for i in rows])
        try:
            with calling(reward, "score"):
                scores = reward.score(images, [pictures[i].prompt for i in rows])
        except ConfigError:
            raise
        except LensError as error:
            scores = [Score("failed", evidence=str(error))] * len(rows)
        by_index.update(zip(rows, checked_scores(reward, scores, len(rows)), strict=True))
    return [by_index[i] for i in range(len(pictures))]


def _finite(value: Any) -> bool:
    """Whether a value is a number that can be averaged."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # text, None, 10**400, a tensor of several numbers
        return False
