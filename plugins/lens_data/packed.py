"""The dataset `packed`: batches of mixed sizes from a training store, each of as much work as the others.

All pictures of all buckets are one endless stream, in a new order in every pass. A step takes the next of it, as many
as its budget pays for, so which samples it holds does not depend on the number of ranks. They share it by work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from lens_core.types import ConfigError
from lens_core.validators import PIXELS, integer, real
from lens_data.dataset import _CAPTION, _ORDER, _ROWS, Plan, Settings, StoreDataset
from lens_data.packing import fill, flops, share, text_tokens


@frozen
class Pass:
    """One pass over all pictures: for each, in order, its bucket, itself, whether its dense caption is told, its
    tokens, and the cost of all before it; the last cost is that of the whole."""

    buckets: NDArray[np.int64]
    members: NDArray[np.int64]
    dense: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    until: NDArray[np.float64]


class PackedDataset(StoreDataset):
    """Pictures of a store in shuffled passes, of mixed sizes in every batch; see `Config`.

    Tokens of captions are estimated from their words. The weight of a batch is its number of samples over that of a
    mean rank, so that the mean over ranks of weighted mean losses is the mean over all samples of the step.
    """

    @frozen
    class Config(Settings):
        # Work of a step, all ranks together, in pictures of the largest bucket's size without text.
        budget: float = field(default=64.0, validator=real(above=0))
        # Channels of the backbone, which tell what its linears cost beside its attention.
        backbone_width: int = field(default=1536, validator=integer(at_least=1))
        patch_size: int = field(default=16, validator=PIXELS)  # px that a token of a picture is wide and high

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._done = {"batch": 0, "samples": 0}

    def _read(self) -> None:
        super()._read()
        config, found = self.config, self._buckets
        self._owner = np.repeat(np.arange(len(found.sizes)), self._counts)
        self._all = np.concatenate(found.members)
        self._cells = np.array([h * w / config.patch_size**2 for h, w in found.sizes])
        brief, dense = np.zeros(len(self._rows)), np.zeros(len(self._rows))
        for start in range(0, len(self._rows), _ROWS):
            part = self._rows[start : start + _ROWS].tolist()
            rows = self.store.rows(part, "brief", "dense")
            for words, name in ((brief, "brief"), (dense, "dense")):
                words[start : start + len(part)] = [len(rows[number][name].split()) for number in part]
        # as the captions themselves: the other one, where a picture has none of the kind
        self._words = np.where(brief > 0, brief, dense), np.where(dense > 0, dense, brief)
        self._pass = lru_cache(2)(self._one_pass)

    def _least(self) -> int:
        return 1

    @property
    def largest(self) -> float:
        """Tokens of a picture of the largest bucket's size, the unit of the budget."""
        return float(self._cells.max())

    def _work(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        width = self.config.backbone_width
        return flops(tokens, width) / flops(np.array([self.largest]), width)

    def _one_pass(self, turn: int) -> Pass:
        order = self._rng(_ORDER, turn).permutation(len(self._all))
        buckets, members = self._owner[order], self._all[order]
        dense = self._rng(_CAPTION, turn).random(len(order)) < self.config.dense_caption_ratio
        brief_words, dense_words = (words[members] for words in self._words)
        tokens = self._cells[buckets] + text_tokens(np.where(dense, dense_words, brief_words))
        costs = self._work(tokens)
        if costs.max() > self.config.budget:
            raise ConfigError(
                f"{self.config.store}: a sample of {tokens.max():.0f} tokens costs {costs.max():.2f} pictures of the "
                f"largest size, more than the budget of {self.config.budget}; raise budget"
            )
        return Pass(buckets, members, dense, tokens, np.concatenate([[0.0], np.cumsum(costs)]))

    def _step(self, at: int) -> list[tuple[Pass, slice]]:
        """What the step that begins at sample `at` takes of each pass."""
        pieces, left = list[tuple[Pass, slice]](), self.config.budget
        while True:
            turn, start = divmod(at, len(self._all))
            one = self._pass(turn)
            stop = fill(one.until, start, max(left, 0.0))
            pieces.append((one, slice(start, stop)))
            if stop < len(self._all):
                return pieces
            at += stop - start
            left -= float(one.until[stop] - one.until[start])

    def _plans(self, world: int) -> Iterator[Plan]:
        number, at = self._done["batch"], self._done["samples"]
        while True:
            pieces = self._step(at)
            buckets, members, dense, tokens = (
                np.concatenate([getattr(one, name)[cut] for one, cut in pieces])
                for name in ("buckets", "members", "dense", "tokens")
            )
            if len(members) < world:
                raise ConfigError(
                    f"a step of {len(members)} samples has no share for each of {world} ranks; raise budget "
                    f"({self.config.budget})"
                )
            number, at = number + 1, at + len(members)
            after = {"batch": number, "samples": at}
            yield Plan(number - 1, buckets, members, dense, after, self._work(tokens))

    def _places(self, plan: Plan, rank: int, world: int) -> Sequence[int]:
        assert plan.costs is not None
        return share(plan.costs, world)[rank]

    def tokens(self, count: int) -> NDArray[np.float64]:
        """Of the next samples, picture and text together."""
        turns = range(-(-count // len(self._all)))
        return np.concatenate([self._pass(turn).tokens for turn in turns])[:count]
