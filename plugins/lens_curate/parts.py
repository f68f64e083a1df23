"""Parts of sources: the units that are listed without opening a picture, and read one at a time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen


@frozen
class Part:
    """What is read at once. `payload` is what JSON can hold; `count` is its pictures, 0 where that is not known."""

    key: str
    stamp: str = ""
    count: int = 1
    payload: Mapping[str, Any] = field(factory=dict)
    fault: str = ""  # why it cannot be read
    retry: bool = False  # the fault may pass, see `SourceItem`
    run: str = ""  # what names this run: what failed in it before need not be tried again


def text_digest(*words: str) -> str:
    """32 hexadecimal digits for some texts; they may hold half characters, as names of files do."""
    data = "\0".join(words).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


SHORT = 16
"""Digits of an id in a task. Of two ids that begin alike both are read, and what was not asked for is left out."""


@functools.lru_cache(2)  # of a task, for each of its batches
def short_ids(digits: str) -> frozenset[str]:
    """The beginnings of ids that a task has as one text: as whole ids they would take most of the memory of a plan."""
    return frozenset(digits[at : at + SHORT] for at in range(0, len(digits), SHORT))
