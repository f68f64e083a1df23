"""A language model of rules: it answers from a table. Useful for tests, and as a start for a real client."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen

from lens_core import LensError
from lens_core.types import Message


class Example:
    """Answer the last message from `answers`; a message that is not there gets `default`."""

    @frozen
    class Config:
        answers: dict[str, str] = field(factory=dict)  # message -> answer
        default: str | None = None  # None: an error

    def __init__(self, config: Config) -> None:
        self.config = config

    def chat(self, messages: Sequence[Message]) -> str:
        """The answer to the last message. Raises LensError where there is none."""
        answer = self.config.answers.get(messages[-1].text, self.config.default)
        if answer is None:
            raise LensError(f"no answer to {messages[-1].text!r}; add it to answers, or set default")
        return answer
