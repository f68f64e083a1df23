"""The dataset `packed`: batches of mixed sizes from a training store, each of as much work as the others.

All pictures of all buckets are one endless stream, in a new order in every epoch. A step takes as many of the next
samples as its budget pays for, so which samples it holds does not depend on the number of ranks. They share it by work.
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
from lens_data.dataset import ROWS, StoreDataset, StoreOptions
from lens_data.packing import block_flops, fill, share, text_tokens, words_of
from lens_data.schedule import CAPTION, ORDER, BatchContents, generator


@frozen
class Epoch:
    """One pass over all pictures, in its order: for each its bucket, its index, whether its dense caption is read, its
    tokens, and the cost of all before it (`until` has one entry more: the cost of the whole)."""

    buckets: NDArray[np.int64]
    members: NDArray[np.int64]
    dense: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    until: NDArray[np.float64]


class PackedDataset(StoreDataset):
    """Pictures of a training store, packed: mixed sizes in every batch.

    In shuffled epochs; see `Config`.

    Tokens of captions are estimated from their words. The weight of a batch is its number of samples over that of a
    mean rank, so that the mean over ranks of weighted mean losses is the mean over all samples of the step.
    """

    @frozen
    class Config(StoreOptions):
        # Work of a step, all ranks together, in pictures of the largest bucket's size without text.
        budget: float = field(default=64.0, validator=real(above=0))
        # Channels of the backbone: its linears cost width^2, its attention width.
        backbone_width: int = field(default=1536, validator=integer(at_least=1))
        patch_size: int = field(default=16, validator=PIXELS)  # px that a token of a picture is wide and high
        # Tokens of a caption at most: what the text encoder cuts off costs nothing.
        max_text_tokens: int = field(default=512, validator=integer(at_least=1))

    @classmethod
    def estimate(cls, config: Any) -> str:
        """What a step costs, as text for a dry run. Opens no store."""
        tokens = max(h * w for group in config.buckets for h, w in group) / config.patch_size**2
        return f"dataset: all ranks have about equal work; a step is {config.budget:g} pictures of {tokens:.0f} tokens"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._progress = {"batch": 0, "samples": 0}

    def _make_schedule(self) -> None:
        config, buckets = self.config, self._buckets
        # Entry i of these is the i-th picture of all buckets together: one picture may stand in several.
        self._bucket_of = np.repeat(np.arange(len(buckets.sizes)), self._counts)
        self._all = np.concatenate(buckets.members)
        self._image_tokens = np.array([h * w / config.patch_size**2 for h, w in buckets.sizes])
        brief, dense = np.zeros(len(self._rows)), np.zeros(len(self._rows))
        for start in range(0, len(self._rows), ROWS):
            part = self._rows[start : start + ROWS].tolist()
            rows = self.store.rows(part, "brief", "dense")
            for words, name in ((brief, "brief"), (dense, "dense")):
                words[start : start + len(part)] = [words_of(rows[number][name]) for number in part]
        # As with the captions themselves: the other one, where a picture has none of the kind.
        self._words = np.where(brief > 0, brief, dense), np.where(dense > 0, dense, brief)
        self._epoch = lru_cache(2)(self._shuffle_epoch)

    def _least(self) -> int:
        return 1

    @property
    def largest(self) -> float:
        """Tokens of a picture of the largest bucket's size, the unit of the budget."""
        return float(self._image_tokens.max())

    def _work(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        width = self.config.backbone_width
        return block_flops(tokens, width) / block_flops(np.array([self.largest]), width)

    def _shuffle_epoch(self, number: int) -> Epoch:
        config = self.config
        order = generator(config.seed, ORDER, number).permutation(len(self._all))
        buckets, members = self._bucket_of[order], self._all[order]
        dense = generator(config.seed, CAPTION, number).random(len(order)) < config.dense_caption_ratio
        brief_words, dense_words = (words[members] for words in self._words)
        texts = text_tokens(np.where(dense, dense_words, brief_words)).clip(max=config.max_text_tokens)
        tokens = self._image_tokens[buckets] + texts
        costs = self._work(tokens)
        if costs.max() > config.budget:
            raise ConfigError(
                f"{config.store}: a sample of {tokens.max():.0f} tokens costs {costs.max():.2f} pictures of the "
                f"largest size, more than the budget of {config.budget}; raise budget"
            )
        return Epoch(buckets, members, dense, tokens, np.concatenate([[0.0], np.cumsum(costs)]))

    def _slices_from(self, start: int) -> list[tuple[Epoch, slice]]:
        """What the step that begins at sample `start` of the stream takes of each epoch: what its budget pays for."""
        slices, budget = list[tuple[Epoch, slice]](), self.config.budget
        while True:
            number, first = divmod(start, len(self._all))
            epoch = self._epoch(number)
            stop = fill(epoch.until, first, max(budget, 0.0))
            slices.append((epoch, slice(first, stop)))
            if stop < len(self._all):
                return slices
            start += stop - first
            budget -= float(epoch.until[stop] - epoch.until[first])

    def _steps(self, world: int) -> Iterator[BatchContents]:
        step, start = self._progress["batch"], self._progress["samples"]
        while True:
            slices = self._slices_from(start)
            buckets, members, dense, tokens = (
                np.concatenate([getattr(epoch, name)[part] for epoch, part in slices])
                for name in ("buckets", "members", "dense", "tokens")
            )
            count = len(members)
            if count < world:
                raise ConfigError(
                    f"a step of {count} samples has no share for each of {world} ranks; raise budget "
                    f"({self.config.budget})"
                )
            numbers, positions = np.full(count, step), np.arange(count)
            step, start = step + 1, start + count
            state = {"batch": step, "samples": start}
            yield BatchContents(numbers, positions, buckets, members, dense, state, self._work(tokens))

    def _rank_share(self, contents: BatchContents, rank: int, world: int) -> Sequence[int]:
        assert contents.costs is not None
        return share(contents.costs, world)[rank]

    def tokens(self, count: int) -> NDArray[np.float64]:
        """Of the next samples, picture and text together."""
        epochs = range(-(-count // len(self._all)))
        return np.concatenate([self._epoch(number).tokens for number in epochs])[:count]
