"""GPT-OSS's answers, parsed: turns with a role, a channel, perhaps a recipient, and an end.

The format is OpenAI's Harmony: `<|start|>ROLE<|channel|>CHANNEL to=TOOL <|constrain|>json<|message|>TEXT<|end|>`. An
answer begins inside the header of the assistant's turn. `openai-harmony` reads it too, but fetches its vocabulary from
the network when it is first used, and reads token ids of that vocabulary alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from attrs import frozen

from lens_core.types import LensError

START, MESSAGE, CHANNEL, CONSTRAIN = "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
CONTROL = re.compile(r"<\|(?:start|message|channel|constrain|end|return|call)\|>")


class HarmonyError(LensError):
    """An answer from which no final text can be taken; the message says why."""


@frozen
class Turn:
    """One turn. `end` is the control token that closed it, "" for one that was never closed."""

    role: str
    channel: str
    recipient: str
    text: str
    end: str


def pieces_of(text: str) -> Iterator[tuple[bool, str]]:
    """A text with control tokens spelled in it -> (is a control token, its name or text)."""
    place = 0
    for match in CONTROL.finditer(text):
        if match.start() > place:
            yield False, text[place : match.start()]
        yield True, match.group()
        place = match.end()
    if place < len(text):
        yield False, text[place:]


def parse(pieces: Iterable[tuple[bool, str]]) -> list[Turn]:
    """The turns of an answer. Whatever a model writes has some: text without a control token is one without a channel.

    In a header `<|channel|>` is followed by the channel's name, and `to=` names a recipient wherever it stands. A
    control token that cannot stand where it does ends the turn before it.
    """
    turns: list[Turn] = []
    header, body = "", None  # of the turn that is being read; no body: its header has not ended
    tokens = list(pieces)
    if not any(control for control, _ in tokens):
        return [Turn("assistant", "", "", "".join(text for _, text in tokens), "")]
    in_first = True  # the answer continues the header that the question ended with
    for control, text in tokens:
        if not control:
            if body is None:
                header += text
            else:
                body += text
        elif text in (CHANNEL, CONSTRAIN) and body is None:
            header += f" {text} "
        elif text == MESSAGE and body is None:
            body = ""
        else:
            if body is not None or header.strip():
                turns.append(_turn(header, body, text if text in (END, RETURN, CALL) else "", first=in_first))
                in_first = False
            header, body = "", None
            if text == CHANNEL:  # a turn without a start, as the first one has none
                header = f"assistant {text} "
    if body is not None or header.strip():
        turns.append(_turn(header, body, "", first=in_first))
    return turns


def _turn(header: str, body: str | None, end: str, *, first: bool) -> Turn:
    recipient = re.search(r"\bto=(\S+)", header)
    before, mark, after = re.sub(r"\bto=\S+", "", header).partition(CHANNEL)
    channel = after.partition(CONSTRAIN)[0].split()
    role = before.partition(CONSTRAIN)[0].split()
    # A header that has not ended holds no text; text before any header, and without one, belongs to no channel.
    if body is None and not mark:
        return Turn("assistant" if first else "", "", recipient[1] if recipient else "", header.strip(), end)
    return Turn(
        role[0] if role else "assistant", channel[0] if channel else "", recipient[1] if recipient else "",
        body or "", end if body is not None else "",
    )  # fmt: skip


def final_text(pieces: Iterable[tuple[bool, str]], finished: bool = True) -> str:
    """The text that is meant for the user: that of the last whole turn in the channel `final`, or of an answer without
    channels. Raises HarmonyError for a tool call, an answer that was cut off, and one that never comes to an end."""
    turns = parse(pieces)
    if not any(turn.text.strip() or turn.channel or turn.recipient for turn in turns):
        raise HarmonyError("the answer is empty")
    plain = [turn for turn in turns if not turn.channel and turn.role == "assistant"]
    finals = [turn for turn in turns if turn.channel == "final" and turn.role == "assistant" and turn.text.strip()]
    last = turns[-1]
    if last.recipient or last.end == CALL:
        raise HarmonyError("the answer calls a tool, and there is none")
    if finals:
        if finals[-1] is last and not last.end and not finished:
            raise HarmonyError("the answer was cut off at its longest")
        return finals[-1].text
    if len(turns) == len(plain) == 1:
        if not finished:
            raise HarmonyError("the answer was cut off at its longest")
        return plain[0].text
    raise HarmonyError("the answer has no final part" + ("" if finished else ": it was cut off before"))
