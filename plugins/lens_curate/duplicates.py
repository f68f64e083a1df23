"""Duplicates among many pictures, in time linear in their number: equal keys, and hashes a few bits apart.

Similar hashes are looked for in bands (locality-sensitive hashing): hashes that are equal in all bits of some band are
candidates, and their distance decides. Bands are drawn from the bits of low frequencies, which a crop changes least. A
band has so many bits that few pictures share it by chance, however many there are: `band_bits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_curate.hashes import colour_distances, distances

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

_AT_ONCE = 2048  # pairs whose colours are compared at once
_CHUNK = 16_384  # hashes that are looked at together

Hashes = NDArray[np.uint64]
Colours = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def band_bits(count: int) -> int:
    """Bits of a band for so many hashes: by chance, a random hash then shares one with a sixteenth of another."""
    return int(np.clip(math.ceil(math.log2(max(count, 2))) + 4, 14, 40))


@frozen
class _Rows:
    """Hashes of the pictures at some places, and after them those of their mirror images; what is not asked for is not
    copied."""

    hashes: Hashes
    mirrored: Hashes | None
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places) * (1 if self.mirrored is None else 2)

    def at(self, numbers: NDArray[np.int64]) -> Hashes:
        """Hashes [n,4] with these numbers."""
        if self.mirrored is None:
            return self.hashes[self.places[numbers]]
        count = len(self.places)
        rows = self.hashes[self.places[numbers % max(count, 1)]]
        flipped = numbers >= count
        rows[flipped] = self.mirrored[self.places[numbers[flipped] - count]]
        return rows

    def chunks(self) -> Iterator[tuple[slice, Hashes]]:
        """All hashes, some thousand at a time."""
        for start in range(0, len(self), _CHUNK):
            numbers = np.arange(start, min(start + _CHUNK, len(self)))
            yield slice(start, start + len(numbers)), self.at(numbers)


def near_pairs(
    hashes: Hashes, distance: int, mirrored: Hashes | None = None, places: NDArray[np.int64] | None = None
) -> Pairs:
    """Pairs (i, j, bits between them) of hashes [N,4] at most `distance` bits apart; i < j, each pair once.

    With `mirrored`, the hashes of the mirror images: pairs of a picture and the mirror image of another instead.
    `places`: those that are compared, instead of all; i and j are their numbers in it.
    """
    rows = _Rows(hashes, mirrored, np.arange(len(hashes)) if places is None else places)
    count = len(rows.places)
    first = np.empty(len(rows), np.uint64)
    for part, some in rows.chunks():
        first[part] = some[:, 0]
    # A pair may share many bands: it is held once, as i * count + j.
    codes, bits = np.zeros(0, np.int64), np.zeros(0, np.int16)
    for keys in _band_keys(rows, band_bits(count)):
        order = np.lexsort((first, keys))
        new = list(_close(rows, order, keys[order], distance, count if mirrored is not None else None))
        if new:
            both = np.concatenate([codes, *(pairs[0] * count + pairs[1] for pairs in new)])
            codes, unique = np.unique(both, return_index=True)
            bits = np.concatenate([bits, *(pairs[2].astype(np.int16) for pairs in new)])[unique]
    i, j = np.divmod(codes, max(count, 1))
    if mirrored is not None:
        # i and the mirror of j is the same pair as j and the mirror of i; the smaller distance counts.
        i, j = np.minimum(i, j), np.maximum(i, j)
        by = np.lexsort((bits, j, i))
        i, j, bits = i[by], j[by], bits[by]
        one = np.r_[True, (i[1:] != i[:-1]) | (j[1:] != j[:-1])] if len(i) else np.zeros(0, bool)
        i, j, bits = i[one], j[one], bits[one]
    return i, j, bits.astype(np.int64)


def _band_keys(rows: _Rows, width: int) -> Iterator[NDArray[np.uint64]]:
    """For each band, its bits of every hash as a number."""
    rng = np.random.default_rng(_SEED)
    key = np.empty(len(rows), np.uint64)
    for _ in range(BANDS):
        bits = [_STABLE[bit] for bit in rng.permutation(len(_STABLE))[:width]]
        for part, some in rows.chunks():
            words = np.ascontiguousarray(some.T)
            made = np.zeros(words.shape[1], np.uint64)
            for bit in bits:
                # Bit n of a hash is the highest but n % 8 of its byte n // 8, and words are little-endian.
                word, byte = bit // 64, bit % 64 // 8
                shift = np.uint64(8 * byte + 7 - bit % 8)
                made = (made << np.uint64(1)) | ((words[word] >> shift) & np.uint64(1))
            key[part] = made
        yield key


def _close(
    rows: _Rows, order: NDArray[np.int64], keys: NDArray[np.uint64], distance: int, split: int | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(i, j, bits) of neighbours in `order` with equal `keys`; `split`: i below it and j from it on, less it."""
    for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
        same = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(same):
            return
        for start in range(0, len(same), _CHUNK):
            some = same[start : start + _CHUNK]
            i, j = order[some], order[some + step]
            i, j = np.minimum(i, j), np.maximum(i, j)
            if split is not None:
                other = (i < split) & (j >= split) & (i != j - split)
                i, j = i[other], j[other]
            one, two = rows.at(i), rows.at(j)
            apart = distances(one, two)
            set_bits = np.maximum(np.bitwise_count(one).sum(axis=1), np.bitwise_count(two).sum(axis=1))
            close = apart <= np.minimum(distance, SPARSE * set_bits)
            if close.any():
                yield i[close], j[close] - (split or 0), apart[close]


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
    places: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """For each picture the kept one that it nearly duplicates, or -1; the bits between them; whether it is mirrored.

    Without `mirrored`, mirror images count as different pictures. `colours` gives the grids of pictures by their places
    and is asked for candidates alone; near ones differ in no cell by more than `colour_distance`. `places`: those
    that are compared, instead of all; `rank`, `colours` and the answer are about these, by their numbers in it.
    """
    check = _Check(colours, colour_distance)
    places = np.arange(len(hashes)) if places is None else places
    members = _representatives(hashes, rank, places)  # of each picture, the best one with the same hash
    led = np.flatnonzero(members != np.arange(len(members)))
    apart = led[~check.near(members[led], led, np.zeros(len(led), bool))]
    members[apart] = apart  # equal hashes, other colours
    alone = np.flatnonzero(members == np.arange(len(members)))
    i, j, bits = near_pairs(hashes, distance, places=places[alone])
    flipped = np.zeros(len(i), bool)
    if mirrored is not None:
        mi, mj, mbits = near_pairs(hashes, distance, mirrored, places[alone])
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
    kept_instead, apart_by = np.full(len(places), -1, np.int64), np.zeros(len(places), np.int64)
    is_mirrored = np.zeros(len(places), bool)
    duplicate = np.flatnonzero(instead >= 0)
    leader = instead[duplicate]
    kept_instead[alone[duplicate]], apart_by[alone[duplicate]] = alone[leader], between[duplicate]
    # Pairs are sorted, so that of a duplicate and its leader is found by their numbers.
    wanted = np.minimum(duplicate, leader) * len(alone) + np.maximum(duplicate, leader)
    is_mirrored[alone[duplicate]] = flipped[np.searchsorted(i * len(alone) + j, wanted)]
    others = np.flatnonzero(members != np.arange(len(members)))
    led_by = kept_instead[members[others]]
    kept_instead[others] = np.where(led_by >= 0, led_by, members[others])
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


def _representatives(hashes: Hashes, rank: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each picture the best one of equal hash, perhaps itself."""
    order = np.lexsort((rank, *(hashes[places, word] for word in range(hashes.shape[1]))))
    starts = np.ones(len(order), bool)
    starts[1:] = False
    for word in range(hashes.shape[1]):
        ordered = hashes[places[order], word]
        starts[1:] |= ordered[1:] != ordered[:-1]
    best = np.empty(len(order), np.int64)
    best[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return best
