"""Training batches of rendered scenes. Batch i is a pure function of (seed, i), so any run can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from numpy.typing import NDArray

from lens_core.types import Batch, ConfigError
from lens_core.validators import SEED, each, integer, one_of, optional, real, within
from lens_shapes import splits
from lens_shapes.captions import brief, caption, dense
from lens_shapes.render import render
from lens_shapes.scenes import TASKS, Scene, sample

_SCENE, _CAPTION, _ORDER, _STYLE = range(4)  # separate streams of randomness


def rows_of_rank(batch: int, rank: int, world: int) -> range:
    """The rows of a batch of all ranks together that are this rank's. Raises ConfigError where shares are not equal."""
    if batch % world:
        raise ConfigError(f"a batch of {batch} has no equal shares for {world} ranks; use a multiple of {world}")
    share = batch // world
    return range(rank * share, (rank + 1) * share)


class ShapesDataset:
    """Rendered scenes of coloured shapes with captions, of the train split.

    See `Config` for what a batch holds.
    """

    @frozen
    class Config:
        # Height, width px.
        sizes: tuple[tuple[int, int], ...] = field(
            default=((128, 128), (96, 160), (160, 96), (112, 144), (144, 112)),
            validator=each(each(integer(at_least=64, at_most=4096)), at_least=1),
        )
        batch: int = field(default=64, validator=integer(at_least=1))  # samples a step, all ranks together
        # Scenes in the pool, drawn again in shuffled epochs; 0: every scene is new.
        pool_size: int = field(default=0, validator=integer(at_least=0))
        # Share of batches with dense captions; the others are brief.
        dense_caption_ratio: float = field(default=0.2, validator=within(0, 1))
        seed: int = field(default=0, validator=SEED)
        images: bool = True  # False: captions only
        largest: bool = False  # things as large as their number allows, instead of any size
        # Weight of each kind of scene; None: the usual mixture.
        tasks: dict[str, float] | None = field(
            default=None, validator=optional(each(real(at_least=0), at_least=1, keys=one_of(*TASKS)))
        )
        # Which scenes are kept from training: 2, as `splits` says; 1, as for the embedded checkpoints.
        rules: int = field(default=2, validator=integer(at_least=1, at_most=2))

        def __attrs_post_init__(self) -> None:
            if any(max(size) > 2 * min(size) for size in self.sizes):
                raise ConfigError(f"sizes must be at most 2:1, not {self.sizes}; use (128, 128), say")
            if self.pool_size and self.pool_size < self.batch * len(self.sizes):
                raise ConfigError(
                    f"pool_size is {self.pool_size}, too few to fill a batch of each size; "
                    f"use 0 or at least {self.batch * len(self.sizes)} (batch x sizes)"
                )
            if self.tasks is not None and not sum(self.tasks.values()) > 0:
                raise ConfigError("tasks has no positive weight; give one kind a weight above 0, or leave tasks out")

    def __init__(self, config: Config) -> None:
        self.config = config
        self._handed = 0
        self._pool: dict[int, tuple[Scene, NDArray[np.uint8] | None]] = {}

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Endless. Every rank sees the same size and its own slice of the same global batch."""
        rows = rows_of_rank(self.config.batch, rank, world)
        while True:
            batch = self._batch(self._handed, slice(rows.start, rows.stop))
            self._handed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._handed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._handed = int(state["batch"])

    def _rng(self, stream: int, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, stream, *place])

    def _batch(self, number: int, rows: slice) -> Batch:
        config = self.config
        size, members = self._members(number)
        short = caption if config.rules == 2 else brief
        describe = dense if self._rng(_STYLE, number).random() < config.dense_caption_ratio else short
        captions: list[str] = []
        images: list[NDArray[np.uint8]] = []
        for row in range(rows.start, rows.stop):
            scene, image = self._sample(int(members[row]), size)
            captions.append(describe(scene, self._rng(_CAPTION, number, row)))
            if image is not None:
                images.append(image)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() if config.images else None
        keys = tuple(int(member) for member in members[rows]) if config.pool_size else ()
        return Batch(pixels, tuple(captions), keys)

    def _members(self, number: int) -> tuple[tuple[int, int], NDArray[np.int64]]:
        """The size and the scene indices of global batch `number`."""
        config = self.config
        if not config.pool_size:
            size = config.sizes[int(self._rng(_ORDER, number).integers(len(config.sizes)))]
            return size, np.arange(number * config.batch, (number + 1) * config.batch)
        # scene n has size n mod len(sizes) for ever; an epoch is every full batch of every size, shuffled
        pools = [np.arange(kind, config.pool_size, len(config.sizes)) for kind in range(len(config.sizes))]
        slots = [(kind, turn) for kind, pool in enumerate(pools) for turn in range(len(pool) // config.batch)]
        epoch, step = divmod(number, len(slots))
        kind, turn = slots[int(self._rng(_ORDER, epoch).permutation(len(slots))[step])]
        shuffled = self._rng(_ORDER, epoch, kind).permutation(pools[kind])
        return config.sizes[kind], shuffled[turn * config.batch : (turn + 1) * config.batch]

    def _sample(self, index: int, size: tuple[int, int]) -> tuple[Scene, NDArray[np.uint8] | None]:
        if index in self._pool:
            return self._pool[index]
        sample_scene = splits.sample if self.config.rules == 2 else sample
        scene = sample_scene(
            self._rng(_SCENE, index), "train", tasks=self.config.tasks or TASKS, largest=self.config.largest
        )
        image = render(scene, *size) if self.config.images else None
        if self.config.pool_size:
            self._pool[index] = scene, image
        return scene, image
