"""From scored pictures to micro-batches: which pictures are learned together, at which times, under which noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.training.distributed import seed_of
from lens_nft.objective import Advantages, optimality
from lens_nft.rollout import Picture, group_by


@frozen
class ScoredPicture:
    """A picture to learn from. `r`: its optimality in [0, 1], see `objective.optimality`. `seed`: of its times and
    noises."""

    picture: Picture
    r: float
    seed: int


@frozen
class MicroBatch:
    """Pictures of one size, each at one time of the schedule's part `interval`.

    `share` turns sums over its pictures into parts of the step's mean. `metrics` are logged.
    """

    samples: tuple[ScoredPicture, ...]
    interval: int
    share: float
    metrics: Mapping[str, Tensor]


def micro_batches(
    pictures: Sequence[Picture], advantage: Advantages, metrics: Mapping[str, Tensor], config: Any
) -> list[list[MicroBatch]]:
    """The micro-batches of each update. Pictures of zero-variance groups teach nothing, but count in the mean.

    `config` is the method's.
    """
    r = optimality(advantage.value, config.advantage_clip).tolist()
    first = {p.prompt.id: p.seed for p in reversed(pictures)}
    seeds = [first[p.prompt.id] if config.common_noise else p.seed for p in pictures]
    rows = zip(pictures, r, seeds, advantage.valid & ~advantage.zero_variance, strict=True)
    # In the order of their seeds: a shuffle that an absent picture leaves alone.
    samples = sorted((ScoredPicture(p, q, s) for p, q, s, learn in rows if learn), key=lambda s: s.picture.seed)
    # Divided by all valid pictures, not by those that are learned: a rollout in which most groups are decided takes a
    # smaller step, as it would if their zero gradients had been computed.
    mean_count = int(advantage.valid.sum()) * config.timesteps_per_image / config.updates_per_rollout
    updates = []
    for part in range(config.updates_per_rollout):
        members = samples[part :: config.updates_per_rollout]
        sizes = group_by(members, lambda s: s.picture.z.shape, config.micro_batch_size)
        blocks = [tuple(members[i] for i in rows) for rows in sizes]
        # The loop averages over a step's micro-batches; times their number, that is the sum.
        share = len(blocks) * config.timesteps_per_image / mean_count
        batches = [
            MicroBatch(block, interval, share, metrics)
            for block in blocks
            for interval in range(config.timesteps_per_image)
        ]
        # Where nothing differs there is nothing to learn: a step of zero gradient, whose metrics are logged.
        updates.append(batches or [MicroBatch((ScoredPicture(pictures[0], 0.5, seeds[0]),), 0, 0.0, metrics)])
    return updates


def times_and_noise(batch: MicroBatch, schedule: Tensor, intervals: int) -> tuple[Tensor, Tensor]:
    """(t [B], noise [B,C,h,w]) of a micro-batch, each row from its picture's seed, so that neither depends on what else
    is in the batch. The sampler's `schedule` [S + 1] is divided into `intervals` of equal numbers of steps."""
    shape = batch.samples[0].picture.z.shape
    times, noises = [], []
    for sample in batch.samples:
        rng = torch.Generator().manual_seed(seed_of(sample.seed, batch.interval))
        # One time in each interval: stratified, the gradient's variance over t is less than that of even draws.
        times.append((batch.interval + torch.rand((), generator=rng)) / intervals)
        noises.append(torch.randn(shape, generator=rng))
    return interpolate(schedule.cpu(), torch.stack(times)), torch.stack(noises)


def interpolate(schedule: Tensor, u: Tensor) -> Tensor:
    """Times at the shares `u` [B] in [0, 1] of a schedule [S + 1], straight between its points."""
    place = u * (len(schedule) - 1)
    left = place.floor().long().clamp(max=len(schedule) - 2)
    return torch.lerp(schedule[left], schedule[left + 1], place - left)
