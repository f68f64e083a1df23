"""Conversations in which shapes and colours go by words that the world does not have.

A small language model that sees the same eight shapes and colours throughout learns which of them go together in
training, and writes nothing else: held-out combinations come out as trained ones. Where the words are new in every
conversation, all that helps is to copy them from the request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from lens_shapes.captions import FORM, plural
from lens_shapes.scenes import COLOURS, SHAPES

NOUNS = (
    "boat", "lamp", "tree", "clock", "bottle", "chair", "kite", "drum", "shell", "mug", "bell", "key", "apple", "egg",
    "hat", "cup", "car", "bird", "flower", "cloud", "button", "ladder", "table", "owl", "spoon", "guitar", "pillow",
    "candle", "rocket", "turtle",
)  # fmt: skip
COLOUR_WORDS = (
    "crimson", "teal", "golden", "brown", "maroon", "violet", "turquoise", "silver", "coral", "navy", "olive", "indigo",
    "salmon", "amber", "emerald", "scarlet", "bronze", "magenta", "ivory", "azure",
)  # fmt: skip


def renaming(rng: np.random.Generator) -> dict[str, str]:
    """About half of the shapes and half of the colours -> another word, different ones."""
    words: dict[str, str] = {}
    for names, others in ((SHAPES, NOUNS), (tuple(COLOURS), COLOUR_WORDS)):
        chosen = [name for name in names if rng.random() < 0.5]
        words.update(zip(chosen, (others[n] for n in rng.permutation(len(others))), strict=False))
    return words


def rename(text: str, words: Mapping[str, str]) -> str:
    """An English text with those words for its shapes, singular or plural, and colours. Sentences about the form of a
    shape ("every star is made of five points") are left out where it is called something else."""
    for shape, form in FORM.items():
        if shape in words:
            text = re.sub(rf"[^.]*{re.escape(form)}\.", "", text)
    words = {**words, **{plural(shape): f"{words[shape]}s" for shape in SHAPES if shape in words}}
    if words:
        text = re.sub(rf"\b({'|'.join(words)})\b", lambda match: words[match[0]], text)
    return re.sub(r"\b(a|A)n? (?=([a-z]))", lambda m: f"{m[1]}n " if m[2] in "aeiou" else f"{m[1]} ", text).strip()
