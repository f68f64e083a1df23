"""Files with a JSON object a line, and the fields of such objects. Whatever is wrong names its line and its field.

The checks take any value and return it, or raise FieldError with the field's path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_core.io import readers
from lens_core.types import ConfigError, did_you_mean

LONGEST_TEXT = 2**16  # characters of one text: edit distance takes quadratic time


class FieldError(ValueError):
    """What is wrong with one field of a line; `field` is its path, as "detections.dog[3]"."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")


def numbered(path: Path, whole: bool = False) -> Iterator[tuple[int, dict[str, Any] | FieldError]]:
    """(number from 1, object) of every line that is not blank; a line that is no JSON object comes as what is wrong.

    `whole`: leave out a last line without its line end, which an interruption may have torn.
    Raises ConfigError where the file cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            for number, line in readers.bounded_lines(file):
                if line is None:
                    yield number, FieldError("line", f"is longer than {readers.LARGEST_LINE >> 20} MiB")
                elif line.strip() and (line.endswith(b"\n") or not whole):
                    yield number, _parsed(line)
    except OSError as error:
        reason = error.strerror or readers.one_line(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); check the path") from error


def _parsed(line: bytes) -> dict[str, Any] | FieldError:
    try:
        value = readers.parse_json(line)
    except ValueError as error:
        return FieldError("line", f"is not JSON ({readers.one_line(error)})")
    if not isinstance(value, dict):
        return FieldError("line", f"must be a JSON object, not {readers.shown(value)}")
    return value


# ---- fields -------------------------------------------------------------------------------------------------------


def field(line: Mapping[str, Any], name: str, within: str = "") -> Any:
    """The value of a field that must be there. Raises FieldError, which names a field with a similar name."""
    if name not in line:
        close = did_you_mean(name, line)
        raise FieldError(within + name, f"is missing.{close}" if close.startswith(" Did") else "is missing")
    return line[name]


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"must be a text, not {readers.shown(value)}")
    if len(value) > LONGEST_TEXT:
        raise FieldError(name, f"has {len(value)} characters; at most {LONGEST_TEXT} are read")
    return value


def line(value: Any, name: str) -> str:
    """A text that is one line, without control characters, as a row of a table has it."""
    if not readers.is_line(text(value, name)):
        raise FieldError(name, f"must be one line without control characters, not {readers.shown(value)}")
    return str(value)


def texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise FieldError(name, f"must be a list of texts, not {readers.shown(value)}")
    items = [text(item, f"{name}[{i}]") for i, item in enumerate(value)]
    text("".join(items), name)  # the bound is for all of them
    return items


def mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(name, f"must be an object, not {readers.shown(value)}")
    return value


def items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise FieldError(name, f"must be a list, not {readers.shown(value)}")
    return value


def number(value: Any, name: str, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(name, f"must be a finite number, not {readers.shown(value)}")
    if abs(value) > most:
        raise FieldError(name, f"must be at most {most:g} in size, not {readers.shown(value)}")
    return value


def whole(value: Any, name: str, low: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        most = "" if low is None else f" of at least {low}"
        raise FieldError(name, f"must be a whole number{most}, not {readers.shown(value)}")
    return value


def choice(value: Any, name: str, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        close = did_you_mean(value, known) if isinstance(value, str) else f" Known: {', '.join(known)}."
        if len(known) > 20 and not close.startswith(" Did"):
            close = f" {len(known)} are known."
        raise FieldError(name, f"{readers.shown(value)} is unknown.{close}")
    return value
