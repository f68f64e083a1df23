"""Sets of digests in little memory: what a store of millions of pictures is known by while it is open."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.bytes_]


def position(ids: Digests, digest: bytes) -> int | None:
    """Where a digest stands in a sorted array of digests of its length; None if it does not."""
    wanted = np.array([digest], ids.dtype)  # as an array: a scalar loses the NULs at its end
    place = int(np.searchsorted(ids, wanted)[0])
    return place if (ids[place : place + 1] == wanted).any() else None


def of_ids(ids: Iterable[str]) -> Digests:
    """The 32 bytes that pictures' ids are the hexadecimal digits of; of other ids, a digest of their own."""

    def one(text: str) -> bytes:
        try:
            made = bytes.fromhex(text)
        except ValueError:
            made = b""
        return made if len(made) == 32 else hashlib.sha256(text.encode()).digest()

    return np.array([one(text) for text in ids], "S32")


def of_keys(keys: Iterable[str]) -> Digests:
    """16 bytes for each key of a cache."""
    return np.array([hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys], "S16")


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class Ids:
    """A set of digests of 32 bytes, in about 40 bytes each: a sorted array, and a set of those that came last."""

    def __init__(self) -> None:
        self._sorted: Digests = np.empty(0, "S32")
        self._last: set[bytes] = set()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._last or position(self._sorted, digest) is not None

    def add(self, digest: bytes) -> None:
        self._last.add(digest)
        if len(self._last) > max(4096, len(self._sorted) // 8):
            self._sorted = np.concatenate([self._sorted, np.array(list(self._last), "S32")])
            self._sorted.sort()
            self._last.clear()
