"""Read files that a stranger may have written: every size has a bound, and whatever is wrong is one line.

Functions on text raise ValueError with the reason alone; functions on files raise a LensError that names the file.
Text is UTF-8, a byte order mark at its start is dropped, and only "\n" and "\r\n" end a line: U+2028, form feeds and
their like are part of a text.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import IO, Any

from lens_core.types import ConfigError, LensError

LARGEST_TEXT = 2**24  # bytes of a text or JSON file; what Python makes of JSON is up to 30 times as large
LARGEST_YAML = 2**18  # bytes of a YAML file, which is read a hundred times slower
LARGEST_LINE = 2**22  # bytes of one line of a log
MOST_VALUES = 100_000  # values of a YAML file, each counted as often as aliases repeat it
DEEPEST = 64  # levels of nesting in JSON and YAML: deeper, and code that walks them meets Python's recursion limit
LONGEST_NUMBER = 64  # digits: conversions of longer ones overflow a float or take quadratic time
SHOWN = 120  # characters of a value in a message
MISSING = "cannot be read (No such file or directory); check the path"


def shown(value: object, most: int = SHOWN) -> str:
    """`value` as Python writes it, for a message: one line of at most `most` characters, and no more work than that.

    `repr` follows every alias of a value that YAML built, so a few hundred bytes can take it minutes and gigabytes."""
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return f"{text[: most - 1]}…"
    return text


def _pieces(value: object, most: int) -> Iterator[str]:
    """The parts of a value's repr, made as they are asked for."""
    if isinstance(value, str | bytes):
        yield repr(value[:most] if len(value) <= most else value[: most + 1])
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * LONGEST_NUMBER:
        yield f"a number of {value.bit_length()} bits"
    elif isinstance(value, Mapping):
        yield "{"
        for place, (key, item) in enumerate(value.items()):
            yield ", " if place else ""
            yield from _pieces(key, most)
            yield ": "
            yield from _pieces(item, most)
        yield "}"
    elif isinstance(value, list | tuple | set | frozenset):
        left, right = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
        yield left
        for place, item in enumerate(value):
            yield ", " if place else ""
            yield from _pieces(item, most)
        yield f",{right}" if isinstance(value, tuple) and len(value) == 1 else right
    elif value is None or isinstance(value, bool | int | float | complex | date | Path | type):
        yield repr(value)
    else:
        yield f"<{type(value).__name__}>"  # whose repr is another's code


def one_line(error: object, most: int = 300) -> str:
    """The text of an exception, of which a library may have made several lines or a very long one."""
    text = " ".join(str(error)[: 4 * most].split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


# ---- text ---------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError for anything else."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("is UTF-16; save it as UTF-8")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def check_text(text: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which no file and no tokenizer can take. Raises ValueError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {text[error.start]!r}, which is half a character; write it anew") from error
    return text


def is_line(value: Any) -> bool:
    """Whether `value` is text that one row of a table can hold: without control characters, line ends and half
    characters. Spaces of any width and the joiners of Persian words and of emoji are part of a line."""
    return isinstance(value, str) and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)


def lines(text: str) -> list[str]:
    """The lines of a text without their ends, which are "\\n" and "\\r\\n" alone; an end at the very end adds none."""
    result = [line.removesuffix("\r") for line in text.split("\n")]
    return result[:-1] if text.endswith("\n") or not text else result


def read_bytes(
    path: Path, most: int = LARGEST_TEXT, error: type[LensError] = ConfigError, missing: str = MISSING
) -> bytes:
    """All of a file of at most `most` bytes. Raises `error`, which names it and says `missing` where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError as fault:
        raise error(f"{path}: {missing}") from fault
    except (OSError, ValueError) as fault:  # ValueError: a path that no file can have
        reason = getattr(fault, "strerror", None) or one_line(fault)
        raise error(f"{path}: cannot be read ({reason}); check the path") from fault
    if len(data) > most:
        raise error(f"{path}: is larger than {_size(most)}, the most that is read of such a file; check the path")
    return data


def read_text(
    path: Path, most: int = LARGEST_TEXT, error: type[LensError] = ConfigError, missing: str = MISSING
) -> str:
    """The text of a UTF-8 file of at most `most` bytes, without a byte order mark. Raises `error`, which names it."""
    try:
        return decode(read_bytes(path, most, error, missing))
    except ValueError as fault:
        raise error(f"{path}: {fault}") from fault


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB"


# ---- JSON ---------------------------------------------------------------------------------------------------------


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, unless it gives one key twice (ValueError)."""
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def parse_json(
    text: str | bytes, *, finite: bool = True, allow_duplicate_keys: bool = False, deepest: int = DEEPEST
) -> Any:
    """The value that `text` is the JSON of. Raises ValueError, in one line.

    Refused are: nesting deeper than `deepest`, numbers of more than LONGEST_NUMBER digits, half a surrogate pair, an
    object with one key twice unless `allow_duplicate_keys`, and, where `finite`, NaN and infinite numbers.
    """
    text = decode(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")

    def whole(digits: str) -> int:
        return int(_short(digits))

    def real(digits: str) -> float:
        value = float(digits)
        if finite and math.isinf(value):
            raise ValueError(f"the number {digits[:20]} is beyond a float's range")
        return value

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"{name} is no number")
        return float(name)

    try:
        data = json.loads(
            text, parse_int=whole, parse_float=real, parse_constant=constant,
            object_pairs_hook=None if allow_duplicate_keys else reject_duplicate_keys,
        )  # fmt: skip
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {deepest} levels") from error
    if text.count("[") + text.count("{") > deepest:
        _check_depth(data, deepest)
    if "\\u" in text:  # the only way for half a pair into decoded text
        for word in _words(data):
            check_text(word)
    return data


def _short(digits: str) -> str:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits)} digits; at most {LONGEST_NUMBER} are read")
    return digits


def _check_depth(data: Any, deepest: int) -> None:
    level = [data]
    for _ in range(deepest):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)] if level else []
        if not level:
            return
    raise ValueError(f"is nested deeper than {deepest} levels")


def _words(data: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def bounded_lines(file: IO[bytes], largest: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line with its end) of a binary file; None for a line of `largest` bytes (LARGEST_LINE) or more.

    A long line is read piece by piece and dropped, so no file costs more memory than one line may have.
    """
    largest = largest or LARGEST_LINE
    number = 0
    while line := file.readline(largest):
        number += 1
        if len(line) == largest and not line.endswith(b"\n"):
            while (rest := file.readline(largest)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line


def json_lines(path: Path, error: type[LensError] = ConfigError) -> Iterator[Any]:
    """The value of each line of a log that holds JSON, in order. Lines that are torn, too long or no JSON are left out.

    NaN and infinite numbers stay: a log holds what happened. Raises `error` where the file cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            for _, line in bounded_lines(file):
                if line is None:
                    continue
                try:
                    value = parse_json(line, finite=False, allow_duplicate_keys=True)
                except ValueError:
                    continue
                yield value
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror or one_line(fault)}); check the path") from fault


# ---- YAML ---------------------------------------------------------------------------------------------------------


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value that `text` is the YAML of, and its problems: a line for each key that a mapping gives twice, of which
    YAML keeps the last, and for each alias within what it stands for.

    Raises ValueError, in one line, also for more than MOST_VALUES values with every alias followed, nesting deeper than
    DEEPEST, and numbers of more than LONGEST_NUMBER digits.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise ValueError(f"has {len(text)} characters; at most {LARGEST_YAML} are read")
    try:
        loader = yaml.SafeLoader(text.removeprefix("\ufeff"))
        root = loader.get_single_node()
        if root is None:
            return None, []
        circles: list[str] = []
        _weigh(root, {}, circles)
        problems = [*_twice(root, "$", set()), *circles]  # before merge keys are resolved, which changes the tree
        return loader.construct_document(root), problems
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {DEEPEST} levels") from error
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    # What PyYAML raises of its own accord: KeyError for `!!bool x`, IndexError for `!!int ''`, AttributeError for
    # `!!timestamp x`.
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {one_line(error)})") from error


def _weigh(node: Any, known: dict[int, tuple[int, int] | None], circles: list[str]) -> tuple[int, int]:
    """(values that a YAML node stands for, levels of nesting), every alias followed; `known` holds those of nodes seen,
    None while one is being weighed; `circles` takes a line for each that holds itself. Raises ValueError for what is
    beyond the bounds."""
    import yaml

    if id(node) in known:
        weight = known[id(node)]
        if weight is None:
            circles.append(f"line {node.start_mark.line + 1}: an alias stands within what it stands for; write it out")
        return weight or (1, 1)
    if isinstance(node, yaml.ScalarNode):
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            _short(node.value)
        check_text(node.value)
        return 1, 1
    known[id(node)] = None
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    values, levels = 1, 1
    for part in inner:
        more, deep = _weigh(part, known, circles)
        values, levels = values + more, max(levels, deep + 1)
        if values > MOST_VALUES:
            raise ValueError(f"stands for more than {MOST_VALUES} values, its aliases followed; write a shorter file")
        if levels > DEEPEST:
            raise ValueError(f"is nested deeper than {DEEPEST} levels")
    known[id(node)] = values, levels
    return values, levels


def _twice(node: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Every key that stands more than once in a mapping of this YAML tree; YAML itself would keep the last."""
    import yaml

    if id(node) in seen:
        return  # an alias: it has been read where it was defined
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _twice(item, f"{path}[{index}]", seen)
    if isinstance(node, yaml.MappingNode):
        places: dict[str, list[str]] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name:
                places.setdefault(name, []).append(str(key.start_mark.line + 1))
            yield from _twice(value, f"{path}.{name[:SHOWN]}", seen)
        for name, lines in places.items():
            if len(lines) > 1:
                yield f"{path}.{name[:SHOWN]}: stands in lines {' and '.join(lines[:SHOWN])}; keep one"


def read_yaml(path: Path, what: str = "YAML", missing: str = MISSING) -> tuple[Any, list[str]]:
    """`parse_yaml` of a file of at most LARGEST_YAML bytes. Raises ConfigError, which says `what` it is not."""
    data = read_bytes(path, LARGEST_YAML, missing=missing)
    try:
        return parse_yaml(decode(data))
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as {what}: {error}") from error
