"""Conversations as token ids, in the Harmony format that GPT-OSS is trained on.

What people write is plain text there: a control token that is spelled in it stays letters, so it can open no turn and
no channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lens_core.io import readers
from lens_core.types import CheckpointError, LensError, Message
from lens_gpt_oss.template import END, LETTERS, guarded, render

FINAL = "<|channel|>final<|message|>"
"""What an answer begins with, after `<|start|>assistant`."""
_MARK = "\ue000{}\ue000"  # private-use characters: no template holds them


class ChatRenderer:
    """Writes conversations as a tokenizer's own chat template does, on a pinned date and with low reasoning effort."""

    def __init__(self, tokenizer: Any, date: str) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise CheckpointError("the tokenizer has no chat template; fetch tokenizer/chat_template.jinja too")
        self.tokenizer, self.date = tokenizer, date
        self._pieces: dict[tuple[str, ...], list[list[int]]] = {}  # by the roles of a conversation

    def ids(self, messages: Sequence[Message], longest: int) -> list[int]:
        """The conversation up to where the assistant's next turn begins. Raises LensError for more than `longest`."""
        pieces = self._literal([message.role for message in messages])
        row = list(pieces[0])
        for message, piece in zip(messages, pieces[1:], strict=True):
            row += [*self.content(message.text, longest), *piece]
        self.check_length(len(row), longest)
        return row

    def check_length(self, tokens: int, longest: int) -> None:
        if tokens > longest:
            raise LensError(
                f"the conversation has {tokens} tokens; at most {longest} (max_length) fit: shorten the request"
            )

    def answer(self, text: str) -> list[int]:
        """The assistant's turn that holds `text` and nothing else, as it follows `ids`."""
        return [*self.literal(FINAL), *self.content(text, len(text) + 1), *self.literal(END)]

    def content(self, text: str, longest: int) -> list[int]:
        """What somebody wrote, as plain text. Raises LensError for half a surrogate pair, or far too long a text."""
        try:
            readers.check_text(text)
        except ValueError as error:
            raise LensError(f"the message {error}") from error
        if len(text) > LETTERS * longest:
            raise LensError(f"the message has {len(text)} characters; at most {longest} tokens fit: shorten it")
        return guarded(
            lambda: self.tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
        )

    def literal(self, text: str) -> list[int]:
        """A part of the format itself, in which control tokens count."""
        return guarded(lambda: self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _literal(self, roles: Sequence[str]) -> list[list[int]]:
        """What stands before, between and after the texts of turns of these roles."""
        key = tuple(roles)
        if key not in self._pieces:
            turns = [{"role": role, "content": _MARK.format(n)} for n, role in enumerate(roles)]
            wanted = {"add_generation_prompt": True, "reasoning_effort": "low"}
            rest, pieces = render(self.tokenizer.chat_template, turns, self.date, wanted), []
            for number in range(len(roles)):
                piece, mark, rest = rest.partition(_MARK.format(number))
                if not mark:
                    raise CheckpointError(f"the chat template must show the turn of the {roles[number]}, in order")
                pieces.append(piece)
            if "\ue000" in rest:
                raise CheckpointError("the chat template must show every turn once")
            self._pieces[key] = [self.literal(piece) for piece in (*pieces, rest)]
        return self._pieces[key]
