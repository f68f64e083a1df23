"""CVTG-2K's decision (TextCrafter, Du et al., 2025, arXiv:2503.23461): which words of a prompt an OCR engine reads.

The rules are those of TextCrafter_Eval at github.com/NJU-PCALab/TextCrafter. Rules that surprise:
- Reference words stand between ASCII apostrophes of one line of the prompt. An apostrophe within a word opens or closes
  a quotation too, so that parts of the prompt become reference text.
- A predicted word serves every repeat of a reference word; extra words cost nothing; punctuation and accents count.
- "NED" is a similarity, 1 for equal words. The partner of a word is difflib's closest match, ties going to the larger
  text, which is not always the one of the smallest edit distance. 1e-5 in the denominator keeps it off 0.
- No line at all is one empty prediction. An engine that fails is zeros, without a sign in the total.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from attrs import frozen

from lens_bench.text import edit_distance


@frozen
class Verdict:
    """`word_ned` is a similarity from 0 to 1 for each of `gt_words`; `word_accuracy` and `ned` are 0 without words."""

    gt_words: list[str]
    total_words: int
    correct_words: int
    word_ned: list[float]
    word_accuracy: float
    ned: float


def reference_words(prompt: str) -> list[str]:
    """The words between pairs of ASCII apostrophes, in lower case, split at whitespace. No quotation spans lines."""
    return [word for quoted in re.findall(r"'([^'\n]*)'", prompt) for word in quoted.lower().split()]


def similarity(a: str, b: str) -> float:
    """1 - edit distance / length of the longer text, 1e-5 added to that length."""
    return 1 - edit_distance(a, b) / (max(len(a), len(b)) + 1e-5)


def decide(prompt: str, ocr_lines: Sequence[str] | None, failed: bool = False) -> Verdict:
    """The verdict on the lines that an OCR engine read in a picture, None or none where it read nothing; `failed`: the
    engine raised an error, which the official code scores as zeros."""
    words = reference_words(prompt)
    if failed:
        return Verdict(words, len(words), 0, [0.0] * len(words), 0.0, 0.0)
    predictions = [word for line in ocr_lines or () for word in line.lower().split()] or [""]
    known = set(predictions)
    similarities = {word: similarity(word, _closest(word, predictions)) for word in set(words)}
    correct, ned = sum(word in known for word in words), [similarities[word] for word in words]
    most = max(len(words), 1)
    return Verdict(words, len(words), correct, ned, correct / most, sum(ned) / most)


def _closest(word: str, predictions: Sequence[str]) -> str:
    return difflib.get_close_matches(word, predictions, n=1, cutoff=0)[0]  # cutoff 0: there is always one


def clip_score(cosine: float) -> float:
    """CLIPScore (Hessel et al., 2021, arXiv:2104.08718) from the cosine of a picture and its prompt."""
    return 2.5 * max(cosine, 0.0)
