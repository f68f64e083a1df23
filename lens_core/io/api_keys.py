"""API keys: a config holds the name of an environment variable, and the key is read from it when it is needed."""

from __future__ import annotations

import os
import re
from typing import Any

from lens_core.types import LensError

A_NAME = "must be the name of an environment variable, such as OPENAI_API_KEY"


def is_variable_name(text: Any) -> bool:
    """Whether `text` is the name of a variable, and no key pasted in its place: upper case, in words, few digits."""
    if not isinstance(text, str):
        return False
    words = text.split("_")
    return (
        re.fullmatch(r"[A-Z_][A-Z0-9_]*", text) is not None
        and len(text) <= 64
        and all(len(w) <= 16 and sum(c.isdigit() for c in w) <= 4 for w in words)
    )


def read_key(variable: str) -> str | None:
    """The key as it stands in the environment, without blanks around it, such as the end of a line."""
    return os.environ.get(variable, "").strip() or None


def required_key(variable: str, user: str, error: type[LensError] = LensError) -> str:
    """The key, or `error`, which names its `user` and the variable, where there is none that could be sent."""
    key = read_key(variable)
    if key is None:
        raise error(f"{user}: the environment variable {variable} is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise error(
            f"{user}: the environment variable {variable} holds a space, a line's end or another "
            "character that no key has; set it to the key alone"
        )
    return key
