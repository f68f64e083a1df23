"""What the text benchmarks share: which characters count, sentinels to remove, and edit distance."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# What LongText-Bench and OneIG keep of a text, beside whitespace; everything else is deleted, not replaced by a space.
CHARACTERS = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_OTHERS = re.compile(rf"[^{CHARACTERS}\s]")


def kept_characters(text: str) -> str:
    """`text` without the characters that neither benchmark counts, each run of whitespace one space, ends stripped."""
    return " ".join(_OTHERS.sub("", text).split())


def without_sentinel(text: str, sentinel: str) -> str:
    """`text` without `sentinel`; then without one that the removal formed, if a line break stands beside it."""
    for form in (sentinel, f"\n{sentinel}", f"{sentinel}\n"):
        text = text.replace(form, "")
    return text


def overlap(reference: Iterable[str], prediction: Iterable[str]) -> int:
    """How many items of `reference` occur in `prediction`, each as often as it does there; order does not matter."""
    return sum((Counter(reference) & Counter(prediction)).values())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance of two texts in code points: the fewest insertions, deletions and replacements.

    Myers' bit vectors as Hyyrö (2003) has them: one column of the table is two integers of len(a) bits, whose bit i
    says whether the distance grows (`plus`) or falls (`minus`) from row i to row i + 1.
    """
    if not a or not b:
        return len(a) + len(b)
    rows: dict[str, int] = {}
    for i, character in enumerate(a):
        rows[character] = rows.get(character, 0) | 1 << i
    mask, last = (1 << len(a)) - 1, 1 << len(a) - 1
    plus, minus, distance = mask, 0, len(a)
    for character in b:
        equal = rows.get(character, 0)
        zero = (((equal & plus) + plus) ^ plus) | equal | minus  # where the diagonal does not grow
        right, left = minus | ~(zero | plus) & mask, plus & zero
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        plus, minus = (left | ~(zero | right)) & mask, right & zero & mask
    return distance
