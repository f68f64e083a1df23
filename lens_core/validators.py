"""Ranges of config fields, declared beside each field: `lr: float = field(default=1e-4, validator=real(at_least=0))`.

A config that breaks several rules raises one RangeError, which lists all of them. Every number must be finite, and a
bool is no number. `optional(rule)` is for a field that may be None, `each(rule)` for the items of a list or mapping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs

from lens_core.io.readers import shown
from lens_core.types import ConfigError, did_you_mean

COUNT = 2**31 - 1
"""The largest integer that a field takes unless it declares another."""
LISTED = 5  # of so many words all are named in a message


class RangeError(ConfigError):
    """Fields of one config that are out of range: `problems` are `field: what it must be, not what it is`."""


class Rule:
    """What values a field may have. attrs calls it as a validator; it then checks all other fields of the config too,
    so that all problems are raised at once."""

    def problems(self, value: Any, place: str) -> Iterator[str]:
        """`place: must be …, not value`, for each fault of `value`, which stands at `place`."""
        raise NotImplementedError

    def allows(self, value: Any) -> bool:
        return next(self.problems(value, ""), None) is None

    def words(self) -> str:
        """The allowed values in words, for documentation."""
        return ""

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        for _ in self.problems(value, attribute.name):
            raise RangeError(list(problems(instance)))


def problems(config: Any) -> Iterator[str]:
    """Every problem of the fields of a config that have rules."""
    for a in attrs.fields(type(config)):
        if isinstance(a.validator, Rule):
            yield from a.validator.problems(getattr(config, a.name), a.name)


def _negative_zero(value: float) -> bool:
    """-0.0, which compares as 0 and divides as a negative number."""
    return value == 0 and math.copysign(1, value) < 0


class _Number(Rule):
    def __init__(
        self, whole: bool, at_least: float | None, above: float | None, at_most: float | None, below: float | None,
        zero: bool,
    ) -> None:  # fmt: skip
        self.whole, self.zero = whole, zero
        self.at_least, self.above, self.at_most, self.below = at_least, above, at_most, below

    def range(self, value: Any) -> str:
        """The allowed range in words."""
        limits = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        words = [] if self.whole or math.isfinite(value) else ["finite"]
        words += [f"{word} {limit}" for word, limit in limits if limit is not None]
        if self.whole and self.at_most is None and self.below is None and abs(value) > COUNT:
            words.append(f"at most {COUNT}")
        return (" and ".join(words) or "finite") + (", or 0" if self.zero else "")

    def words(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            most = "2^63 - 1" if self.at_most == 2**63 - 1 else self.at_most
            return f"{self.at_least} to {most}" + (", or 0" if self.zero else "")
        limits = self.range(0).removeprefix("finite").removeprefix(" and ")
        return limits if limits != ", or 0" else ""

    def fits(self, value: Any) -> bool:
        low = -COUNT if self.whole and self.at_least is None and self.above is None else -math.inf
        high = COUNT if self.whole and self.at_most is None and self.below is None else math.inf
        return (
            (math.isfinite(value) if not self.whole else low <= value <= high)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and not (self.at_least == 0 and _negative_zero(value))
        )

    def problems(self, value: Any, place: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            yield f"{place}: must be a {'whole ' if self.whole else ''}number, not {shown(value)}"
            return
        try:
            fits = self.fits(value) or (self.zero and value == 0 and not _negative_zero(value))
        except OverflowError:  # an int beyond what a float can hold
            yield f"{place}: must be a number of at most 1e308, not {shown(value)}"
            return
        if not fits:
            yield f"{place}: must be {self.range(value)}, not {shown(value)}"


def listed(value: Any) -> Any:
    """The converter of a field that is a tuple: lists, as files and callers have them, are taken too."""
    return tuple(value) if isinstance(value, list) else value


def integer(*, at_least: int | None = None, at_most: int | None = None, zero: bool = False) -> Rule:
    """A whole number in this range, `zero`: or 0; of magnitude up to 2^31 - 1 where there is no other limit."""
    return _Number(True, at_least, None, at_most, None, zero)


def real(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    zero: bool = False,
) -> Rule:
    """A finite number in this range; `zero`: or 0."""
    return _Number(False, at_least, above, at_most, below, zero)


SEED = integer(at_least=0, at_most=2**63 - 1)
"""What a generator may be seeded with. Numbers of pictures are added to it, and torch takes what is below 2^64."""

STEPS = integer(at_least=1, at_most=2**16)
"""Steps of a sampler."""
PIXELS = integer(at_least=1, at_most=2**16)
"""A side of a picture, px."""
GUIDANCE = real(above=-(2**16), below=2**16)
"""A guidance scale."""
WEIGHT = real(at_least=0)
"""What a term of a loss is multiplied by."""
CHANNELS = integer(at_least=1, at_most=2**20)
"""A width of a network, or a number of heads or experts."""
LAYERS = integer(at_least=1, at_most=1024)
"""A depth of a network."""


def within(low: float, high: float) -> Rule:
    """A finite number from `low` to `high`, both included: a share is `within(0, 1)`."""
    return real(at_least=low, at_most=high)


class _OneOf(Rule):
    def __init__(self, words: Collection[str]) -> None:
        self.options = tuple(words)

    def words(self) -> str:
        *some, last = self.options
        return f"{', '.join(some)} or {last}" if some else last

    def problems(self, value: Any, place: str) -> Iterator[str]:
        if not isinstance(value, str) or value not in self.options:
            hint = did_you_mean(value[:80] if isinstance(value, str) else "", self.options)
            if len(self.options) <= LISTED:
                hint = hint if hint.startswith(" Did") else ""
                yield f"{place}: must be {self.words()}, not {shown(value)}.{hint}".removesuffix(".")
            else:
                yield f"{place}: {shown(value)} is not known.{hint}"


def one_of(*words: str) -> Rule:
    """One of these words."""
    return _OneOf(words)


class _Text(Rule):
    def __init__(self, pattern: str, words: str) -> None:
        self.pattern, self.description = re.compile(pattern), words

    def words(self) -> str:
        return self.description

    def problems(self, value: Any, place: str) -> Iterator[str]:
        if not isinstance(value, str) or not self.pattern.fullmatch(value):
            yield f"{place}: must be {self.description}, not {shown(value)}"


def matching(pattern: str, words: str) -> Rule:
    """Text that `pattern` matches as a whole; `words` say what that is."""
    return _Text(pattern, words)


def text() -> Rule:
    """Text that is not blank."""
    return _Text(r"(?s).*\S.*", "text that is not blank")


class _Optional(Rule):
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def words(self) -> str:
        return self.rule.words()

    def problems(self, value: Any, place: str) -> Iterator[str]:
        if value is not None:
            yield from self.rule.problems(value, place)


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows."""
    return _Optional(rule)


class _Each(Rule):
    def __init__(self, rule: Rule | None, at_least: int, keys: Rule | None) -> None:
        self.rule, self.at_least, self.keys = rule, at_least, keys

    def words(self) -> str:
        items = self.rule.words() if self.rule else ""
        keys = f"keys: {self.keys.words()}" if self.keys and self.keys.words() else ""
        count = f"at least {self.at_least} item{'s' * (self.at_least > 1)}" if self.at_least else ""
        return "; ".join(part for part in (count, keys, f"each {items.removeprefix('each ')}" if items else "") if part)

    def problems(self, value: Any, place: str) -> Iterator[str]:
        if isinstance(value, str) or not isinstance(value, Collection):
            yield f"{place}: must be a list or a mapping, not {shown(value)}"
            return
        if len(value) < self.at_least:
            yield f"{place}: must have at least {self.at_least} item{'s' * (self.at_least > 1)}, not {len(value)}"
        named = isinstance(value, Mapping)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            where = f"{place}.{shown(key).strip(chr(39))}" if named else f"{place}[{key}]"
            yield from self.keys.problems(key, where) if self.keys else ()
            yield from self.rule.problems(item, where) if self.rule else ()


def each(rule: Rule | None, *, at_least: int = 0, keys: Rule | None = None) -> Rule:
    """A list or a mapping of at least so many items, each of which `rule` allows; `keys`: the keys of a mapping."""
    return _Each(rule, at_least, keys)
