"""The llm `shapes_editor`: stands in for the language model that proposes system prompts, in a search on the shapes.

It knows the sentences of `styles` and nothing about the benchmark: it reads a system prompt with examples, and adds,
removes or replaces a sentence. Where the examples show short descriptions and low scores, it takes out what asks for
shortness and asks for one part more; where they show long ones, it asks for less. Without examples its edits are
random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from lens_core.types import LensError, Message
from lens_core.validators import SEED
from lens_shapes.captions import pick
from lens_shapes.styles import LEAVE_OUT, NEUTRAL, PARTS, WORDINGS

SHORT = 70  # words: a description with fewer leaves something out
LOW = 0.9  # a mean score below which there is something to gain


class ShapesEditor:
    """A scripted model that proposes edits of a prompt, to test `lens reason search`.

    Answers a question of the search with one edit; the same question gets the same answer.
    """

    @frozen
    class Config:
        seed: int = field(default=0, validator=SEED)

    def __init__(self, config: Config) -> None:
        self.config = config

    def chat(self, messages: Sequence[Message]) -> str:
        """The answer to a system prompt with examples, as JSON in the last message."""
        question = messages[-1].text
        try:
            request = json.loads(question)
            system, examples = str(request["system_prompt"]), list(request["examples"])
        except (ValueError, KeyError, TypeError) as error:
            raise LensError("shapes_editor: reads the questions of lens reason search alone") from error
        digest = hashlib.sha256(f"{self.config.seed} {question}".encode()).digest()
        reason, edited = self._edit(system, examples, np.random.default_rng(list(digest[:16])))
        return f"<reason>{reason}</reason>\n<prompt>{edited}</prompt>"

    def _edit(self, system: str, examples: list[Any], rng: np.random.Generator) -> tuple[str, str]:
        brief = [w for name in ("phrase", "sentence") for w in WORDINGS[name] if w in system]
        missing = [name for name in PARTS if not any(w in system for w in WORDINGS[name])]
        unsaid = [w for ways in LEAVE_OUT.values() for w in ways if w in system]
        if examples and _short(examples) and _low(examples):
            for sentence in (*brief, *unsaid):
                system = _without(system, sentence)
            if missing:
                name = pick(rng, tuple(missing))
                return f"short descriptions score low: ask for {name}", f"{system} {pick(rng, WORDINGS[name])}"
            reason, edited = self._random(system, rng)
            return f"short descriptions score low: without {brief + unsaid}; {reason}", edited
        present = [w for name in PARTS for w in WORDINGS[name] if w in system]
        if examples and _low(examples) and not _short(examples):
            if present and rng.random() < 0.5:
                sentence = pick(rng, tuple(present))
                return f"long descriptions score low: try without {sentence!r}", _without(system, sentence)
            sentence = pick(rng, (*WORDINGS["phrase"], *WORDINGS["sentence"]))
            return f"long descriptions score low: {sentence!r}", f"{system} {sentence}"
        return self._random(system, rng)

    def _random(self, system: str, rng: np.random.Generator) -> tuple[str, str]:
        every = [w for ways in (*WORDINGS.values(), *LEAVE_OUT.values(), NEUTRAL) for w in ways]
        present = tuple(w for w in every if w in system)
        absent = tuple(w for w in every if w not in system)
        kind = rng.random()
        if present and kind < 0.35:
            sentence = pick(rng, present)
            return f"try without {sentence!r}", _without(system, sentence)
        sentence = pick(rng, absent)
        if present and kind < 0.6:
            old = pick(rng, present)
            return f"try {sentence!r} instead of {old!r}", _without(system, old, sentence)
        return f"try {sentence!r}", f"{system} {sentence}"


def _without(system: str, sentence: str, instead: str = "") -> str:
    """The system prompt without a sentence; never empty."""
    return " ".join(system.replace(sentence, instead).split()) or NEUTRAL[2]


def _short(examples: list[Any]) -> bool:
    lengths = [len(str(e.get("drawn", "")).split()) for e in examples if isinstance(e, dict)]
    return bool(lengths) and sum(lengths) / len(lengths) < SHORT


def _low(examples: list[Any]) -> bool:
    scores = [e["score"] for e in examples if isinstance(e, dict) and isinstance(e.get("score"), int | float)]
    return not scores or sum(scores) / len(scores) < LOW
