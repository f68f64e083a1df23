"""A dataset that makes its pictures: squares of one colour, with the colour's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import field, frozen

from lens_core import Batch, ConfigError
from lens_core.validators import SEED, integer

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


class Example:
    """Endless batches of plain squares. Every batch follows from the seed and its number, so that a run can resume."""

    @frozen
    class Config:
        size: int = field(default=64, validator=integer(at_least=1))  # px
        batch: int = field(default=8, validator=integer(at_least=1))  # samples a step, all ranks together
        seed: int = field(default=0, validator=SEED)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.handed_out = 0  # batches

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Rank's slice of each batch."""
        if self.config.batch % world:
            raise ConfigError(f"batch is {self.config.batch}; it must be a multiple of the {world} processes")
        while True:
            rng = torch.Generator().manual_seed((self.config.seed + self.handed_out) % 2**63)
            names = list(COLOURS)
            picks = torch.randint(len(names), (self.config.batch,), generator=rng).tolist()[rank::world]
            colours = torch.tensor([COLOURS[names[i]] for i in picks], dtype=torch.uint8)
            self.handed_out += 1
            images = colours[:, :, None, None].expand(-1, -1, self.config.size, self.config.size)
            yield Batch(images.contiguous(), tuple(f"a {names[i]} square" for i in picks))

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.handed_out = state["handed_out"]
