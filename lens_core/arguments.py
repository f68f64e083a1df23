"""Checks what Python callers pass: numbers, texts and generators, each refused by the argument's name.

numpy's integers and floats are numbers; a bool is none. Every function raises ConfigError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lens_core.io.readers import shown
from lens_core.types import ConfigError


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    try:
        if isinstance(value, bool) or type(value).__name__.startswith("bool"):  # numpy's
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError) as error:  # RuntimeError: a tensor of several numbers
        raise ConfigError(f"{name} must be a whole number, not {shown(value)}") from error
    return int(_within(name, number, low, high))


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> float:
    """A number from `low` to `high`. Without `finite` the caller deals with NaN and infinity, which pass."""
    try:
        if isinstance(value, bool | str | bytes) or type(value).__name__.startswith("bool"):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{name} must be a number, not {shown(value)}") from error
    if not math.isfinite(result):
        if not finite:
            return result
        raise ConfigError(f"{name} must be a finite number, not {result}")
    return float(_within(name, result, low, high))


def _within(name: str, value: float, low: float, high: float) -> float:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, not {shown(value)}")
    if value > high:
        raise ConfigError(f"{name} must be at most {high}, not {shown(value)}")
    return value


def texts(name: str, value: Any) -> list[str]:
    """One text, or a sequence of them, as a list."""
    several = [value] if isinstance(value, str) else value
    if isinstance(several, bytes) or not isinstance(several, Sequence):
        raise ConfigError(f"{name} must be a text, or a list of texts, not {shown(value)}")
    for text in several:
        if not isinstance(text, str):
            raise ConfigError(f"{name} must be a text, or a list of texts, but {shown(text)} is among them")
    return list(several)


def wrong_ending(path: Path, ending: str, what: str) -> ConfigError:
    """The error for an output that does not end in `ending`; `what` says what is written so."""
    if path.is_dir() or path.name in ("", ".."):
        return ConfigError(f"{path}: is a folder; name a {ending} file in it")
    return ConfigError(f"{path}: {what} written as {ending}; use {path.with_suffix(ending)}")


def refuse_existing(paths: Iterable[Path], name: str = "--output") -> None:
    """Raise ConfigError for a file that is there already; `name` is the argument that names another."""
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path}: is there already; use --overwrite, or another {name}")


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT, of a file or folder that is there."""
    path, colon, weight = text.rpartition(":")
    try:
        place, factor = (Path(path), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        place, factor = Path(text), 1.0
    if not place.exists():
        raise ConfigError(f"{place}: there is no such LoRA; give a .safetensors file or its folder, then :WEIGHT")
    return place, factor


def checked_interval(value: Any) -> tuple[float, float]:
    """The two times of a guidance interval. Raises ConfigError."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"guidance_interval is two times, 0 <= low < high <= 1, not {shown(value)}")
    low, high = (number("guidance_interval", time, finite=False) for time in value)
    if not 0 <= low < high <= 1:
        raise ConfigError(f"guidance_interval is two times, 0 <= low < high <= 1, not {low:g} and {high:g}")
    return low, high
