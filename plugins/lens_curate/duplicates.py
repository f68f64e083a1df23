"""Duplicates among many pictures, in time linear in their number: equal keys, and hashes a few bits apart.

Similar hashes are looked for in bands (locality-sensitive hashing): hashes that are equal in all bits of some band are
candidates, and their distance decides. Bands are drawn from the bits of low frequencies, which a crop changes least. A
band has so many bits that few pictures share it by chance, however many there are: `band_bits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lens_curate.hashes import BITS, colour_distances, distances

BANDS = 32
NEIGHBOURS = 32
"""Comparisons of a picture in a band at most. More share it only where many pictures are alike, and then these find
enough of each other."""
SPARSE = 0.4
"""Share of the bits set in the fuller of two hashes in which they differ at most. A picture with little in it, such as
a word on an even ground, sets few bits, and shares those that are not set with every other such picture. A usual one
sets about 107, of which the default distance is less."""
# Bits of the lowest frequencies, see `hashes`: both signs of 24 of brightness and of 14 of each colour.
_STABLE = tuple(start + n for start, count in ((0, 24), (76, 24), (152, 14), (178, 14), (204, 14), (230, 14))
                for n in range(count))  # fmt: skip
_SEED = 20_261_126

_AT_ONCE = 8192  # pairs whose colours are compared at once

Hashes = NDArray[np.uint64]
Colours = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def band_bits(count: int) -> int:
    """Bits of a band for so many hashes: by chance, a random hash then shares one with a sixteenth of another."""
    return int(np.clip(math.ceil(math.log2(max(count, 2))) + 4, 14, 40))


def near_pairs(hashes: Hashes, distance: int, mirrored: Hashes | None = None) -> Pairs:
    """Pairs (i, j, bits between them) of hashes [N,4] at most `distance` bits apart; i < j, each pair once.

    With `mirrored`, the hashes of the mirror images: pairs of a picture and the mirror image of another instead.
    """
    everything = hashes if mirrored is None else np.concatenate([hashes, mirrored])
    count = len(hashes)
    pairs: list[NDArray[np.int64]] = []
    for keys in _band_keys(everything, band_bits(count)):
        order = np.lexsort((everything[:, 0], keys))
        pairs.extend(_close(everything, order, keys[order], distance, count if mirrored is not None else None))
    if not pairs:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    rows = np.unique(np.concatenate(pairs), axis=0)
    if mirrored is not None:
        # i and the mirror of j is the same pair as j and the mirror of i; the smaller distance counts.
        low, high = np.minimum(rows[:, 0], rows[:, 1]), np.maximum(rows[:, 0], rows[:, 1])
        rows = np.stack([low, high, rows[:, 2]], axis=1)[np.lexsort((rows[:, 2], high, low))]
        rows = rows[np.r_[True, (rows[1:, :2] != rows[:-1, :2]).any(axis=1)]]
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _band_keys(hashes: Hashes, width: int) -> Iterator[NDArray[np.uint64]]:
    """For each band, its bits of every hash as a number."""
    rng = np.random.default_rng(_SEED)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, BITS // 8), axis=1)[:, _STABLE]
    packed = np.ascontiguousarray(bits.T)  # a bit of all hashes lies together
    for _ in range(BANDS):
        key = np.zeros(len(hashes), np.uint64)
        for bit in rng.permutation(len(_STABLE))[:width]:
            key = (key << np.uint64(1)) | packed[bit]
        yield key


def _close(
    hashes: Hashes, order: NDArray[np.int64], keys: NDArray[np.uint64], distance: int, split: int | None
) -> Iterator[NDArray[np.int64]]:
    """Rows (i, j, bits) of neighbours in `order` with equal `keys`; `split`: i below it and j from it on, less it."""
    for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
        same = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(same):
            return
        i, j = order[same], order[same + step]
        if split is not None:
            i, j = np.minimum(i, j), np.maximum(i, j)
            other = (i < split) & (j >= split) & (i != j - split)
            i, j = i[other], j[other]
        apart = distances(hashes[i], hashes[j])
        set_bits = np.maximum(np.bitwise_count(hashes[i]).sum(axis=1), np.bitwise_count(hashes[j]).sum(axis=1))
        close = apart <= np.minimum(distance, SPARSE * set_bits)
        if close.any():
            i, j = i[close], j[close] - (split or 0)
            low, high = (np.minimum(i, j), np.maximum(i, j)) if split is None else (i, j)
            yield np.stack([low, high, apart[close]], axis=1)


def leaders(rank: NDArray[np.int64], pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each picture the one that is kept in its stead, or -1, and how many bits apart they are.

    `rank`: 0 for the picture that is best, no rank twice. From the best on, a picture is kept unless a kept one is
    near; so every picture that is not kept is near the one that is. The order of the pairs does not matter.
    """
    first, second, bits = pairs
    swap = rank[first] > rank[second]
    better, worse = np.where(swap, second, first), np.where(swap, first, second)
    kept_instead = np.full(len(rank), -1, np.int64)
    apart = np.zeros(len(rank), np.int64)
    dropped = np.zeros(len(rank), bool)
    # By the worse one, the best first; for it, the nearest of the better ones first.
    for row in np.lexsort((rank[better], bits, rank[worse])).tolist():
        b, w = better[row], worse[row]
        if not dropped[b] and not dropped[w]:
            dropped[w], kept_instead[w], apart[w] = True, b, bits[row]
    return kept_instead, apart


def equal_groups(keys: NDArray[np.generic], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each picture the best one with an equal key, or -1 where it is the best itself."""
    order = np.lexsort((rank, keys))
    ordered = keys[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]] if len(order) else np.zeros(0, bool)
    best = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    kept_instead = np.full(len(rank), -1, np.int64)
    kept_instead[order] = np.where(best == order, -1, best)
    return kept_instead


def near_duplicates(
    hashes: Hashes,
    mirrored: Hashes | None,
    rank: NDArray[np.int64],
    distance: int,
    colours: Colours | None = None,
    colour_distance: int = 255,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """For each picture the kept one that it nearly duplicates, or -1; the bits between them; whether it is mirrored.

    Without `mirrored`, mirror images count as different pictures. `colours` gives the grids of pictures by their places
    and is asked for candidates alone; near ones differ in no cell by more than `colour_distance`.
    """
    check = _Check(colours, colour_distance)
    members = _representatives(hashes, rank)  # of each picture, the best one with the same hash
    places = np.flatnonzero(members != np.arange(len(members)))
    apart = places[~check.near(members[places], places, np.zeros(len(places), bool))]
    members[apart] = apart  # equal hashes, other colours
    alone = np.flatnonzero(members == np.arange(len(members)))
    i, j, bits = near_pairs(hashes[alone], distance)
    flipped = np.zeros(len(i), bool)
    if mirrored is not None:
        mi, mj, mbits = near_pairs(hashes[alone], distance, mirrored[alone])
        i, j, bits = np.r_[i, mi], np.r_[j, mj], np.r_[bits, mbits]
        flipped = np.r_[flipped, np.ones(len(mi), bool)]
    close = check.near(alone[i], alone[j], flipped)
    i, j, bits, flipped = i[close], j[close], bits[close], flipped[close]
    # One entry a pair: straight where it is at least as near that way.
    order = np.lexsort((flipped, bits, j, i))
    i, j, bits, flipped = i[order], j[order], bits[order], flipped[order]
    one = np.r_[True, (i[1:] != i[:-1]) | (j[1:] != j[:-1])] if len(i) else np.zeros(0, bool)
    i, j, bits, flipped = i[one], j[one], bits[one], flipped[one]
    instead, between = leaders(rank[alone], (i, j, bits))
    turned = set(zip(i[flipped].tolist(), j[flipped].tolist(), strict=True))
    kept_instead, apart_by = np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.int64)
    is_mirrored = np.zeros(len(hashes), bool)
    for place in np.flatnonzero(instead >= 0).tolist():
        leader = int(instead[place])
        kept_instead[alone[place]], apart_by[alone[place]] = alone[leader], between[place]
        is_mirrored[alone[place]] = (min(place, leader), max(place, leader)) in turned
    others = np.flatnonzero(members != np.arange(len(hashes)))
    led = kept_instead[members[others]]
    kept_instead[others] = np.where(led >= 0, led, members[others])
    apart_by[others], is_mirrored[others] = apart_by[members[others]], is_mirrored[members[others]]
    return kept_instead, apart_by, is_mirrored


class _Check:
    """Whether the colours of candidates are near, some thousand at a time."""

    def __init__(self, colours: Colours | None, most: int) -> None:
        self.colours, self.most = colours, most

    def near(
        self, first: NDArray[np.int64], second: NDArray[np.int64], flipped: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        close = np.ones(len(first), bool)
        for start in range(0, len(first) if self.colours is not None else 0, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            places, inverse = np.unique(np.r_[first[part], second[part]], return_inverse=True)
            grids = self.colours(places)[inverse]  # type: ignore[misc]  # it is there
            one, other = np.split(grids, 2)
            other = np.where(flipped[part, None, None, None], other[:, :, ::-1], other)
            close[part] = colour_distances(one, other) <= self.most
        return close


def _representatives(hashes: Hashes, rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each picture the best one of equal hash, perhaps itself."""
    order = np.lexsort((rank, *hashes.T))
    starts = np.r_[True, (hashes[order][1:] != hashes[order][:-1]).any(axis=1)] if len(order) else np.zeros(0, bool)
    best = np.empty(len(order), np.int64)
    best[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return best
