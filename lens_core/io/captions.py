"""Captions as sources have them: which of several counts, and what cannot be one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_CAPTION = 2**16  # characters of a caption
EMPTY = "empty caption"
_SHOWN = 200  # characters of a name


def read_captions(candidates: Iterable[Mapping[str, Any]], kind: str) -> tuple[str, str, str]:
    """The brief and the dense caption; or why there is none. The first of each that is sound counts: one that is null,
    blank or damaged hides no other."""
    faults: list[str] = []

    def first(*keys: str) -> str:
        for captions in candidates:
            for key in keys:
                text, fault = clean_caption(captions.get(key))
                if text:
                    return text
                if fault:
                    faults.append(fault)
        return ""

    candidates = tuple(candidates)
    brief, dense, plain = first("brief"), first("dense"), first("caption", "text")
    brief, dense = (brief or plain, dense) if kind == "brief" else (brief, dense or plain)
    if brief or dense:
        return brief, dense, ""
    faults += [captions["fault"] for captions in candidates if "fault" in captions]
    # "empty" is the weakest of the reasons, for another says more of what is there.
    return "", "", next((f for f in faults if f != EMPTY), faults[0] if faults else "missing caption")


def clean_caption(value: Any) -> tuple[str, str]:
    """A caption without blanks around it; or why it cannot be used; neither, if it is no text at all."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return "", "caption is not UTF-8"
    if not isinstance(value, str):
        return "", ""
    text = value.removeprefix("\ufeff").strip()
    if not text:
        return "", EMPTY
    if len(text) > LONGEST_CAPTION:
        return "", f"caption longer than {LONGEST_CAPTION} characters"
    if re.search("[\ud800-\udfff]", text):
        return "", "caption with half a character (a lone surrogate)"
    if re.search("[\x00-\x08\x0e-\x1b\x7f]", text):  # of UTF-16 without a mark, every other byte is one
        return "", "caption with control characters (UTF-16?)"
    return text, ""


def printable(name: str) -> str:
    """A name for a line of text: of bytes that are no UTF-8, of control characters and line ends, their codes."""
    short = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
