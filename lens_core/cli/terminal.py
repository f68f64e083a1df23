"""What the terminal gives and gets: arguments that are text, errors of one line, output in any encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import sys

from lens_core.io import readers
from lens_core.types import ConfigError, LensError, PluginError

_LATE_PLUGIN = re.compile(r"Unknown option: \W*--plugin\b")


def check_arguments(words: list[str]) -> None:
    """Raise ConfigError for arguments that are no text: no tokenizer, no file and no terminal could take them."""
    for place, word in enumerate(words, 1):
        if "\0" in word:
            raise ConfigError(f"argument {place}, {readers.shown(word)}, holds a NUL character; leave it out")
        try:
            readers.check_text(word)
        except ValueError as error:
            raise ConfigError(
                f"argument {place}, {readers.shown(word)}, is not UTF-8; write it anew, or rename the file"
            ) from error


def take_option(words: list[str], name: str) -> list[str]:
    """Remove `name VALUE` and `name=VALUE` where they stand before the command -> the values."""
    values = []
    while words and (words[0] == name or words[0].startswith(f"{name}=")):
        first = words.pop(0)
        if first == name and not words:
            raise ConfigError(f"{name} needs a value")
        values.append(words.pop(0) if first == name else first.partition("=")[2])
    return values


def report_error(error: BaseException, code: int) -> int:
    """Print an error, one line a problem -> the exit code: `code`, or 2 for arguments that no command takes.

    LENS_DEBUG=1 in the environment prints the traceback before.
    """
    from cyclopts import CycloptsError

    if os.environ.get("LENS_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ConfigError):
        lines = error.problems
    elif _is_out_of_memory(error):
        lines = ("there is not enough memory; ask for smaller or fewer pictures, or a smaller model",)
    elif isinstance(error, LensError | SystemExit):
        lines = (str(error),)
    elif isinstance(error, CycloptsError):
        text = readers.one_line(error)
        hint = " It stands before the command: lens --plugin FILE generate …" if _LATE_PLUGIN.search(text) else ""
        lines, code = (f"{text}{hint} See lens --help.",), 2
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        lines = (f"{where}{error.strerror or readers.one_line(error)}; check the path, its permissions and its disk",)
        try:
            sys.stdout.flush()
        except OSError:  # it was stdout itself
            discard_output()
    else:
        what = f"{type(error).__name__}: {readers.one_line(error)}"
        lines = (f"{what}; this is a fault of Lens or of a plugin: LENS_DEBUG=1 shows where, please report it",)
    print_error(*lines)
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a GPU, in a component (PluginError) or elsewhere."""
    if isinstance(error, MemoryError):
        return True
    spoken_for = isinstance(error, LensError | SystemExit) and not isinstance(error, PluginError)
    return not spoken_for and bool(re.search("out of memory|allocate memory", str(error)))  # torch's words


def printable(line: object) -> str:
    """The text of `line`, with the characters spelled out that would break a line or command a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(line))


def json_text(value: object, indent: int | None = None) -> str:
    """`value` as JSON for a terminal: characters that would command it are escaped, all others stand as they are."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text)


def print_error(*lines: str) -> None:
    """Print lines to stderr, `printable`."""
    text = "\n".join(map(printable, lines))
    with contextlib.suppress(OSError, ValueError):  # stderr is full, broken or closed: nobody can be told
        print(f"lens: {text}", file=sys.stderr, flush=True)


def escape_unprintable() -> None:
    """Make stdout and stderr spell out, as JSON does, characters that the terminal's encoding lacks."""
    codecs.register_error("lens", _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lens")


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(json.dumps(c)[1:-1] for c in error.object[error.start : error.end]), error.end


def discard_output() -> None:
    """Redirect stdout to nowhere: what is buffered would make Python fail once more when it exits."""
    with contextlib.suppress(OSError, ValueError):  # not a file of the operating system
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
