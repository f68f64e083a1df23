"""Files written whole or not at all, logs of JSON lines, and JSON objects that are validated on load."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lens_core.io import readers
from lens_core.types import CheckpointError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(CheckpointError):
    """Something could not be written: no room, no permission."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk inside becomes a WriteError about `path`, in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # how safetensors, which raises an error of its own, tells it
        code = int(number[1]) if number else getattr(error, "errno", None)
        why = os.strerror(code) if code else " ".join(str(error).split())
        room = "make room, or " if code in FULL else ""
        raise WriteError(f"{path}: cannot be written: {why}; {room}choose another output") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it there: whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{path.suffix}"
        # The mode that the umask leaves: to read a umask one must set it, and another thread would see that.
        temporary.touch(0o666, exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            write(temporary)
            temporary.chmod(stat.S_IMODE(mode))  # `write` may have put another file there
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, *data: Mapping[str, Any]) -> None:
    """Add lines of JSON to a log. A power failure or a full disk may leave the last line torn, never one before."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in data)
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log about steps up to `last`. Lines that are torn, or about no step, are left out.

    A step is a whole number from 0 on; other values are as they stand, NaN and infinite ones included."""
    entries = []
    for data in readers.json_lines(path, CheckpointError) if path.is_file() else ():
        step: Any = data.get("step") if isinstance(data, dict) else None
        if type(step) in (int, float) and 0 <= step < 2**53 and step == int(step) and step <= last:
            entries.append(data)
    return entries


def rewrite_log(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """These lines and no others."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """A file of this text, in UTF-8: whole or not at all."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, finite: bool = True, most: int = readers.LARGEST_TEXT) -> dict[str, Any]:
    """The JSON object in `path`, a file of at most `most` bytes; `finite`: without NaN and infinite numbers."""
    missing = "missing; fetch the checkpoint again, this file included"
    text = readers.read_bytes(path, most, CheckpointError, missing)
    try:
        data = readers.parse_json(text, finite=finite)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({readers.one_line(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data
