"""Which pictures each batch from a store holds: numbers alone, computed without reading a picture.

Every bucket is an endless stream of its pictures, in a new order in every epoch, cut into batches of the bucket's batch
size. What does not fill a batch at the end of an epoch begins the next one, so no picture is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

ORDER, SLOTS, CAPTION, SUBSTITUTE = range(4)
"""Purposes that randomness is drawn for. Each has a generator of its own, so that none shifts the draws of another."""


def generator(seed: int, purpose: int, *position: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *position])


@frozen
class BatchContents:
    """The samples of one step, of all ranks: arrays with one entry a sample.

    `members` index the store's pictures, sorted by id; `dense` says whose dense caption is read. `numbers` and
    `positions` say where a sample stands in the dataset's stream (batch, place in the batch): what replaces a corrupt
    picture follows from these, and so not from the number of ranks. `state` is the dataset's once the step is handed
    out. `costs` is the work of each sample, where ranks share by work; `rank_sizes` the samples of each rank, where
    each has a number of its own.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.int64]
    buckets: NDArray[np.int64]
    members: NDArray[np.int64]
    dense: NDArray[np.bool_]
    state: Mapping[str, int]
    costs: NDArray[np.float64] | None = None
    rank_sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.members)


class BucketSchedule:
    """Batch n of buckets with the pictures `members`, each bucket with its own batch size; a pure function of n.

    In every epoch each bucket gives as many batches as its pictures fill, in a random order among all buckets. A bucket
    with few pictures has its turn too, only more seldom.
    """

    def __init__(self, members: Sequence[NDArray[np.int64]], batch_sizes: Sequence[int], seed: int) -> None:
        self._members, self._seed = members, seed
        self._counts = np.array([len(m) for m in members], np.int64)
        self._sizes = np.array(batch_sizes, np.int64)
        # One batch may need two epochs of a bucket, and the epochs of all buckets are in use at once.
        self._order = lru_cache(2 * len(members) + 2)(self._shuffle_pictures)
        self._slots = lru_cache(2)(self._shuffle_slots)

    def batch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """The bucket of batch `number`, and its pictures."""
        epoch, slot = self._locate(number)
        bucket, turn = (int(n) for n in self._slots(epoch)[slot])
        size, count = int(self._sizes[bucket]), int(self._counts[bucket])
        # A batch may lie across the end of an epoch: its last pictures are then the first of the next order.
        stream = range(turn * size, (turn + 1) * size)
        return bucket, np.array([self._order(bucket, at // count)[at % count] for at in stream])

    def _locate(self, number: int) -> tuple[int, int]:
        """The epoch of batch `number`, and its place in the epoch. Epochs differ by a few batches in length."""
        largest = int(self._sizes.max())
        low, high = 0, number * largest // int(self._counts.sum()) + len(self._counts) * largest + 1
        while high - low > 1:  # the last epoch that begins at or before `number`
            middle = (low + high) // 2
            low, high = (middle, high) if self._given_before(middle).sum() <= number else (low, middle)
        return low, number - int(self._given_before(low).sum())

    def _given_before(self, epoch: int) -> NDArray[np.int64]:
        """How many batches each bucket has given when `epoch` begins."""
        return epoch * self._counts // self._sizes

    def _shuffle_slots(self, epoch: int) -> NDArray[np.int64]:
        """(bucket, how many batches it gave before) of every batch of the epoch."""
        first, last = self._given_before(epoch), self._given_before(epoch + 1)
        slots = [(bucket, turn) for bucket in range(len(first)) for turn in range(first[bucket], last[bucket])]
        return generator(self._seed, SLOTS, epoch).permutation(np.array(slots, np.int64).reshape(-1, 2))

    def _shuffle_pictures(self, bucket: int, epoch: int) -> NDArray[np.int64]:
        return generator(self._seed, ORDER, bucket, epoch).permutation(self._members[bucket])
