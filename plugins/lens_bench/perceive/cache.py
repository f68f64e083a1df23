"""Answers of perceivers on disk: append-only, read again by a run that goes on, never mixed between revisions.

A folder holds what one perceiver said as it was: its kind, model, revision and version are in the first line of each of
its files, and hashed in its name. So another revision never answers in this one's place: it has a folder of its own,
and perceives anew. Each further line is one answer, by the picture's SHA-256 and the hash of the question, with a
checksum. Every process writes a file of its own, so that several may work at once, and one that is killed tears no line
but its own last one, which is ignored. Answers stay on disk; only their places are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lens_core.io import atomic_files, readers
from lens_core.types import ConfigError, LensError

FORMAT = 1
LARGEST = 2**24  # bytes of a line; the masks of a hundred objects take a tenth of it

Key = tuple[str, str]  # SHA-256 of the picture, hash of the question


def key_of(sha256: str, question: Any) -> Key:
    """The key of a question, any JSON, about a picture. The order of keys in the question makes no difference."""
    return sha256, _hash(question)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class PerceptionCache:
    """What the perceiver described by `described` has said, below `folder`.

    Raises ConfigError, with the file and its line, for whatever is damaged.
    """

    def __init__(self, folder: Path, perceives: str, described: Mapping[str, Any]) -> None:
        self.perceives = perceives
        self.header = {"format": FORMAT, "perceives": perceives, "perceiver": dict(described)}
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", f"{perceives} {described.get('model', '')}").strip("-.")[:60]
        self.folder = folder / f"{slug}-{_hash(self.header)}"
        self._places: dict[Key, tuple[Path, int]] = {}
        self._file: Path | None = None  # of this process, made at the first answer
        for path in sorted(self.folder.glob("*.jsonl")):
            self._read(path)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def answer(self, key: Key) -> Any:
        """The answer under `key`. Raises KeyError where there is none, ConfigError where its file has changed."""
        path, place = self._places[key]
        try:
            with path.open("rb") as file:
                file.seek(place)
                line = file.readline(LARGEST + 1)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); start again") from error
        return _entry(line, f"{path}, byte {place}")["answer"]

    def add(self, answers: Iterable[tuple[Key, Any]]) -> None:
        """Write answers. Raises LensError for one that is not plain, finite JSON, before anything is written."""
        lines = [self._line(key, answer) for key, answer in answers]
        if not lines:
            return
        if self._file is None:
            with atomic_files.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            atomic_files.append(self._file, self.header)
        place = self._file.stat().st_size
        atomic_files.append(self._file, *lines)
        for line in lines:
            self._places[line["picture"], line["question"]] = self._file, place
            place += len(json.dumps(line, ensure_ascii=False).encode()) + 1

    def _line(self, key: Key, answer: Any) -> dict[str, Any]:
        entry = {"picture": key[0], "question": key[1], "answer": answer}
        try:
            line = {**entry, "check": _check(entry)}
            size = len(json.dumps(line, ensure_ascii=False).encode())
            if json.loads(json.dumps(entry)) != entry:
                raise ValueError("it changes on the way, as tuples and numbers as keys do")
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"an answer cannot be written as JSON ({readers.one_line(error)})"
            raise LensError(f"{self.perceives}: {problem}; a perceiver answers with plain, finite data") from error
        if size > LARGEST:
            raise LensError(f"{self.perceives}: an answer has {size} bytes; at most {LARGEST} are kept")
        return line

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                place = number = 0
                while line := file.readline(LARGEST + 1):
                    number += 1
                    if not line.endswith(b"\n") and len(line) <= LARGEST:
                        break  # torn by an interruption
                    where = f"{path}, line {number}"
                    if number == 1:
                        self._check_header(line, where)
                    else:
                        entry = _entry(line, where)
                        self._places[entry["picture"], entry["question"]] = path, place
                    place += len(line)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error

    def _check_header(self, line: bytes, where: str) -> None:
        try:
            header = readers.parse_json(line)
        except ValueError:
            header = None
        if header != self.header:
            problem = "is not what its folder's name says; it was perceived by another model, revision or version"
            raise ConfigError(f"{where}: {problem}. Delete the file, and its pictures are perceived again")


def _entry(line: bytes, where: str) -> dict[str, Any]:
    cure = "delete the file, and its pictures are perceived again"
    if len(line) > LARGEST:
        raise ConfigError(f"{where}: is longer than {LARGEST >> 20} MiB; {cure}")
    try:
        entry = readers.parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is damaged ({readers.one_line(error)}); {cure}") from error
    fields = ("picture", "question", "answer")
    if not isinstance(entry, dict) or set(entry) != {*fields, "check"}:
        raise ConfigError(f"{where}: is no answer of a perceiver; {cure}")
    if entry["check"] != _check({name: entry[name] for name in fields}):
        raise ConfigError(f"{where}: is damaged (its checksum differs); {cure}")
    return entry


def _check(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def other_versions(folder: Path, cache: PerceptionCache) -> list[str]:
    """Folders of answers of the same kind by other models, revisions or versions, which this run does not use."""
    names = []
    for other in sorted(folder.glob("*")) if folder.is_dir() else ():
        first = next(iter(sorted(other.glob("*.jsonl"))), None) if other != cache.folder else None
        if first is None:
            continue
        try:
            with first.open("rb") as file:
                header = readers.parse_json(file.readline(2**16))
        except (OSError, ValueError):
            continue
        if isinstance(header, dict) and header.get("perceives") == cache.perceives:
            names.append(other.name)
    return names
