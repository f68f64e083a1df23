"""OneIG's text dimension (Chang et al., 2025, arXiv:2506.07977): what a model reads, against the text asked for.

The rules are those of scripts/text/ at github.com/OneIG-Bench/OneIG-Benchmark, revision 41b4983. Rules that surprise:
- The reference is a stringified Python list, used as it stands: brackets and quotes vanish with the punctuation, and
  the `n` of a literal backslash-n stays as a letter.
- Case counts. A text with a Chinese character loses its spaces, and a Chinese reference is compared by characters.
- Pictures that are missing or purely black are left out of the means, so that a refusal raises the score.
"""

from __future__ import annotations

import re

from attrs import frozen

from lens_bench.text import edit_distance, kept_characters, overlap, without_sentinel

WORST_DISTANCE = {"en": 100.0, "zh": 50.0}  # edits, from which on a text is as wrong as can be
_CHINESE = re.compile("[\u4e00-\u9fff]")


@frozen
class Verdict:
    """`edit_distance` is of the normalised texts, in characters; `completed` is 1 where it is 0, else 0; `wac` is the
    share of the reference's words that were read, 0 where it has none."""

    ocr_normalised: str
    gt_normalised: str
    edit_distance: float
    completed: int
    match_word_count: int
    gt_word_count: int
    wac: float


def normalise(text: str) -> str:
    """The characters that count, one space between words; no space where one of them is Chinese."""
    kept = kept_characters(text)
    return kept.replace(" ", "") if _CHINESE.search(kept) else kept


def decide(text_content: str, ocr_raw: str) -> Verdict:
    """The verdict on what a model read in one picture (one tile of a grid)."""
    cleaned = without_sentinel(without_sentinel(ocr_raw, "addCriterion"), "No text recognized.")
    prediction, reference = normalise(cleaned), normalise(text_content)
    distance = edit_distance(prediction, reference)
    chinese = _CHINESE.search(reference)
    words = list(reference) if chinese else reference.split()
    matched = overlap(words, list(prediction) if chinese else prediction.split())
    share = matched / len(words) if words else 0.0
    return Verdict(prediction, reference, float(distance), int(distance == 0), matched, len(words), share)


def text_score(distance: float, completed: float, word_accuracy: float, worst: float = 100.0) -> float:
    """The score of a system, from the mean distance, the share of completed pictures and the pooled word accuracy."""
    return 1 - min(worst, distance) * (1 - completed) * (1 - word_accuracy) / worst
