"""Near-duplicates among prompts, in time that grows with their number and not with its square.

Texts are compared as sets of words, without their order. MinHash with bands (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3) says which earlier texts are worth a comparison.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

MISS_PROBABILITY = 1e-6  # probability that a pair exactly at the threshold is not compared
BUCKET_SIZE = 16  # texts that a bucket holds; in a set of near copies, more would make the search quadratic again
MAX_COMPARISONS = 64  # comparisons of one text with earlier ones, the most promising first

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # kana, Thai, Lao, Burmese, Khmer
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufe00-\ufe0f\ufeff]")


@lru_cache(1)
def _pattern() -> re.Pattern[str]:
    marks = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)).startswith("M"))
    letters = rf"\w{re.escape(marks)}"
    return re.compile(rf"([{_HAN}])|([{_UNSPACED}]+)|((?:(?![{_HAN}{_UNSPACED}])[{letters}])+)")


def words(text: str) -> list[str]:
    """The words of a text in their order, whatever its case, punctuation, width (NFKC) and composition (NFC or NFD).

    Where a script has no spaces, a Chinese character counts as a word, and so does every pair of neighbours in a run
    of kana, Thai, Lao, Burmese or Khmer. A text without any word, such as one of emoji, is a word itself.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold())
    parts: list[str] = []
    for han, run, word in _pattern().findall(text):
        if run:
            parts += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        else:
            parts.append(han or word)
    bare = text.strip()
    return parts or ([bare] if bare else [])


class Nearest:
    """Compare texts one by one with the earlier ones: which of them does each nearly repeat?

    `similarity_threshold`: near-duplicates have at least this share of their words in common (Jaccard); 1: equal sets
    of words; None: equal words in equal order. A text that repeats another is not kept, so whatever
    comes later is compared with the texts that would stay. `comparisons` counts those of two sets of words: at most 64
    a text. Nothing is missed, but once in a million, unless a text has hundreds of neighbours near the threshold.
    """

    def __init__(self, similarity_threshold: float | None) -> None:
        self.similarity_threshold, self.comparisons = similarity_threshold, 0
        self._equal: dict[object, int] = {}
        self._sets: dict[int, frozenset[str]] = {}
        self._count = 0
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        if similarity_threshold is not None and similarity_threshold < 1:
            self._rows = min(16, max(1, round(math.log(0.25) / math.log(similarity_threshold))))
            self._bands = min(
                256, math.ceil(math.log(MISS_PROBABILITY) / math.log1p(-(similarity_threshold**self._rows)))
            )
            rng = np.random.default_rng(0)
            self._factors = rng.integers(0, 2**63, self._rows * self._bands, dtype=np.uint64) * np.uint64(
                2
            ) + np.uint64(1)
            self._shifts = rng.integers(0, 2**63, self._rows * self._bands, dtype=np.uint64)
            self._numbers: dict[str, np.ndarray] = {}  # the hashes of a word

    def add(self, text: str) -> int | None:
        """The number, from 0 on, of the earlier text that this one nearly repeats, or None where it is new."""
        number, self._count = self._count, self._count + 1
        ordered = words(text)
        vocabulary = frozenset(ordered)
        key: object = tuple(ordered) if self.similarity_threshold is None else vocabulary
        same = self._equal.setdefault(key, number)
        if same != number:
            return same
        if self.similarity_threshold is None or self.similarity_threshold >= 1 or not vocabulary:
            return None
        keys = self._keys(vocabulary)
        seen = Counter(i for key in keys for i in self._buckets.get(key, ()))
        for earlier, _ in seen.most_common(MAX_COMPARISONS):
            self.comparisons += 1
            both = len(vocabulary & self._sets[earlier])
            if both >= self.similarity_threshold * (len(vocabulary) + len(self._sets[earlier]) - both) - 1e-9:
                self._equal[vocabulary] = earlier  # copies of this text repeat the same one
                return earlier
        self._sets[number] = vocabulary
        for bucket in keys:
            members = self._buckets.setdefault(bucket, [])
            if len(members) < BUCKET_SIZE:
                members.append(number)
        return None

    def _keys(self, vocabulary: Iterable[str]) -> list[tuple[int, bytes]]:
        """The buckets of a set of words: one a band, which a set of Jaccard similarity s shares with probability
        s ** rows."""
        lowest = np.minimum.reduce([self._hashes(word) for word in vocabulary]).reshape(self._bands, self._rows)
        return [(band, row.tobytes()) for band, row in enumerate(lowest)]

    def _hashes(self, word: str) -> np.ndarray:
        if word not in self._numbers:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            with np.errstate(over="ignore"):
                mixed = np.uint64(int.from_bytes(digest, "little")) * self._factors + self._shifts
            self._numbers[word] = (mixed >> np.uint64(32)).astype(np.uint32)
        return self._numbers[word]


def near_duplicates(texts: Sequence[str], similarity_threshold: float | None) -> list[tuple[int, int]]:
    """(earlier, later) for each text that nearly repeats an earlier one, which itself repeats none."""
    nearest = Nearest(similarity_threshold)
    pairs = ((nearest.add(text), later) for later, text in enumerate(texts))
    return [(earlier, later) for earlier, later in pairs if earlier is not None]
