"""The processes of a benchmark run, as `accelerate launch` and torchrun start them: shares of work, and waiting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from attrs import frozen

from lens_core.types import ConfigError

T = TypeVar("T")
PATIENCE = timedelta(days=14)  # processes finish at different times, hours apart


@frozen
class Processes:
    """This process's number and how many there are; alone, nothing is waited for."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """What RANK and WORLD_SIZE say, which the launchers set. Joins the other processes."""
        numbers = []
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
            text = os.environ.get(name, "") or default
            if not (text.isdecimal() and len(text) < 7):
                raise ConfigError(f"the environment variable {name} is {text[:40]!r}, not a number; unset it")
            numbers.append(int(text))
        rank, world = numbers
        if world < 1 or rank >= world:
            raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world}; unset both, or use accelerate launch")
        if world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(rank, world)

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of `work`, every world-th item."""
        return list(work[self.rank :: self.world])

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()
