"""LongText-Bench's decision (X-Omni, Geng et al., 2025, arXiv:2507.22058): recall of words that a model reads.

The rules are those of textbench/ at github.com/X-Omni-Team/X-Omni, revision 2b8237b. Rules that surprise:
- The prompt of the OCR model asks for `No text recognized`, without a full stop; only the sentence with one is removed.
  A second sentinel, `addCriterion`, is meant to be removed too, but the removal starts again from the raw text.
- Punctuation is deleted, not replaced: `well-known` is the word `wellknown`.
- Order and extra words are free. The score pools words of all pictures, so long references weigh more.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from lens_bench.text import kept_characters, overlap, without_sentinel


@frozen
class Verdict:
    """Counts are of words, of characters in Chinese. `text_accuracy` is the share of the reference that was read, 0
    where the reference is empty (the official code fails there)."""

    ocr_cleaned: str
    ocr_normalised: str
    gt_normalised: str
    match_word_count: int
    gt_word_count: int
    text_accuracy: float


def clean(ocr_raw: str) -> str:
    """The answer of the OCR model without `No text recognized.`; what else it says stays."""
    return without_sentinel(ocr_raw, "No text recognized.")


def normalise(text: str, chinese: bool = False) -> str:
    """The characters that count: in English in lower case, one space between words; in Chinese without any space."""
    kept = kept_characters(text)
    return kept.replace(" ", "") if chinese else kept.lower()


def decide(text: Sequence[str], ocr_raw: str, chinese: bool = False) -> Verdict:
    """The verdict on what a model read in a picture that should show each of the texts in `text`."""
    cleaned = clean(ocr_raw)
    prediction, reference = normalise(cleaned, chinese), normalise(" ".join(text), chinese)
    words = list(reference) if chinese else reference.split()
    matched = overlap(words, list(prediction) if chinese else prediction.split())
    accuracy = matched / len(words) if words else 0.0
    return Verdict(cleaned, prediction, reference, matched, len(words), accuracy)
