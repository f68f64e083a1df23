"""What all reasoners share: a batch of requests becomes answers that may be drawn."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from attrs import field, frozen

from lens_core.io.readers import one_line
from lens_core.types import LensError, Message, Refinement, RefusedError
from lens_core.validators import integer, one_of, optional, text
from lens_reason.cache import AnswerFiles
from lens_reason.checks import flaw
from lens_reason.cleaning import clean
from lens_reason.harmony import HarmonyError
from lens_reason.policy import NAMES, REFUSE, hash_of, read_policy

_REFUSAL = re.compile(rf"""(?s)[\s.!*_]*{REFUSE}\b[\s.:,;!*_'"”–—-]*(.*)""")
"""An answer that begins with the word, whatever stands between it and the reason."""


@frozen(kw_only=True)
class RewritingConfig:
    """The options that every reasoner has."""

    system: str | None = field(default=None, validator=optional(text()))  # system prompt; None: the published rules
    system_file: str | None = field(default=None, validator=optional(text()))  # the same in a text file
    language: str = field(default="keep", validator=one_of("keep", *NAMES))  # of the answers; keep: the request's
    # When nobody answers: raise an error, or draw the request as it was asked, with a warning.
    on_failure: str = field(default="raise", validator=one_of("raise", "ask_raw"))
    max_characters: int = field(default=4000, validator=integer(at_least=1, at_most=100_000))  # of a refined prompt
    cache: str | None = field(default=None, validator=optional(text()))  # folder of answers

    def __attrs_post_init__(self) -> None:
        self.policy()

    def policy(self) -> str:
        """The system prompt. Raises ConfigError."""
        return read_policy(self.system, self.system_file, self.language)


class Rewriter(ABC):
    """A reasoner whose answers are kept, cleaned and checked. A subclass asks a model."""

    model: str
    """What answers, for caches and pictures."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.system: str = config.policy()
        self.files = AnswerFiles(config.cache)

    @abstractmethod
    def ask(self, chats: Sequence[tuple[Message, ...]]) -> list[str | LensError]:
        """The final text of the answer to each conversation, or why there is none."""

    def with_system(self, system: str) -> Self:
        """The same reasoner, its model and all, with another system prompt."""
        other = copy.copy(self)
        other.system = system
        return other

    def provenance(self) -> Mapping[str, str]:
        """What a picture records: the model and the hash of the system prompt."""
        return {"model": self.model, "system_hash": hash_of(self.system)}

    def chat_of(self, request: str) -> tuple[Message, ...]:
        """The conversation about a request. What could end it early, or open a channel, is broken up in it."""
        inside = re.sub(r"<(?=/?request>|\|)", "< ", request)
        return Message("system", self.system), Message("user", f"<request>{inside}</request>")

    def refine(self, prompts: Sequence[str]) -> list[Refinement]:
        """One for each request. Raises RefusedError, and LensError where nobody answers and `on_failure` is raise."""
        answers = self._answers(list(dict.fromkeys(prompts)))
        return [self._refinement(prompt, answers[prompt]) for prompt in prompts]

    def _answers(self, prompts: Sequence[str]) -> dict[str, str | LensError]:
        answers: dict[str, str | LensError] = {}
        for prompt in prompts:
            if (known := self.files.read(self._key(prompt))) is not None:
                answers[prompt] = known
        missing = [prompt for prompt in prompts if prompt not in answers]
        if missing:
            for prompt, answer in zip(missing, self.ask([self.chat_of(p) for p in missing]), strict=True):
                answers[prompt] = answer
                if isinstance(answer, str):
                    self.files.write(self._key(prompt), answer)
        return answers

    def _key(self, prompt: str) -> tuple[str, str, str]:
        return self.model, self.system, prompt

    def _refinement(self, request: str, answer: str | LensError) -> Refinement:
        if isinstance(answer, HarmonyError):  # somebody answered, and not with a prompt
            return Refinement(request, request, str(answer))
        if isinstance(answer, LensError):
            if self.config.on_failure == "raise":
                raise answer
            return Refinement(request, request, f"the reasoner failed: {one_line(answer)}")
        text = clean(answer)
        refused = _REFUSAL.match(text)
        if refused is not None:
            why = one_line(refused.group(1) or "no reason is given", 200)
            raise RefusedError(f"the reasoner's policy refuses to draw {request[:80]!r}: {why}")
        reason = flaw(request, text, self.config.language, self.config.max_characters)
        return Refinement(request, request, reason) if reason else Refinement(request, text)
