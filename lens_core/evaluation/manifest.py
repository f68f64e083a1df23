"""Which picture was generated from which prompt: `manifest.jsonl` beside the pictures, append-only, read on a restart.

One JSON object a line, one line an outcome, written after its picture is whole on the disk. Whatever stops a run
between the two leaves a picture without a line, which is generated again. A last line without its line end was torn by
the interruption: it is ignored, and removed before the next line is written. Several processes each append to a file
of their own, and every one of them is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, field, fields, frozen

from lens_core.checkpoints.manifest import hash_of
from lens_core.io import atomic_files, json_fields, readers
from lens_core.io.json_fields import FieldError
from lens_core.types import ConfigError

STATUSES = ("ok", "refused", "failed")
_PROMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LARGEST_FACTS = 2**16  # characters of what a system said about one picture, as JSON
_SHA256 = re.compile(r"[0-9a-f]{64}")

Key = tuple[str, int]


@frozen
class Entry:
    """The outcome of one picture. `file`, `sha256` and `seconds` are those of a picture ("" and, for a refusal, the
    time until it came); `reason` is why there is none."""

    prompt_id: str  # of the benchmark: letters, digits, ".", "_" and "-"; part of the file's name
    index: int  # from 0, of the pictures of one prompt
    prompt: str  # as the benchmark has it
    sent_prompt: str  # as the system got it, after any rewriting
    seed: int | None  # None where the system takes none
    system: str  # the model's name or the API's id of it
    revision: str  # of the model; "" where none is known
    status: Literal["ok", "refused", "failed"]
    seconds: float  # from the request to the picture
    file: str = ""  # of the picture, below the manifest's folder
    sha256: str = ""  # of that file, in hexadecimal digits
    reason: str = ""
    usd: float = 0.0  # what it cost, if it is known
    facts: Mapping[str, Any] = field(factory=dict)  # what the system said about the picture

    @property
    def key(self) -> Key:
        return self.prompt_id, self.index


def parse(line: Mapping[str, Any]) -> Entry:
    """The entry in a line. Raises FieldError for whatever is missing, unknown or wrong."""
    known = [a.name for a in fields(Entry)]
    for name in line:
        json_fields.choice(name, name[:40], known)
    values = {"usd": 0.0, "facts": {}, **line}
    for name in known:
        json_fields.field(values, name)
    for name in ("prompt", "sent_prompt", "system", "revision", "file", "sha256", "reason"):
        json_fields.text(values[name], name)
    _check_prompt_id(values["prompt_id"])
    json_fields.whole(values["index"], "index", low=0)
    if values["seed"] is not None:
        json_fields.whole(values["seed"], "seed", low=0)
    for name in ("seconds", "usd"):
        if json_fields.number(values[name], name) < 0:
            raise FieldError(name, f"must be at least 0, not {values[name]}")
    _check_facts(values["facts"])
    status = json_fields.choice(values["status"], "status", STATUSES)
    entry = Entry(**values)
    if status == "ok":
        _check_file(entry)
    elif entry.file or entry.sha256:
        raise FieldError("file", f"a picture that is {status} has no file")
    return entry


def _check_prompt_id(value: Any) -> None:
    if not isinstance(value, str) or not _PROMPT_ID.fullmatch(value):
        raise FieldError("prompt_id", f"must be 1 to 100 letters, digits, '.', '_' and '-', not {readers.shown(value)}")


def _check_facts(value: Any) -> None:
    try:
        size = len(json.dumps(json_fields.mapping(value, "facts"), allow_nan=False))
    except (TypeError, ValueError) as error:
        if isinstance(error, FieldError):
            raise
        raise FieldError("facts", f"must be what JSON can hold ({readers.one_line(error)})") from error
    if size > LARGEST_FACTS:
        raise FieldError("facts", f"has {size:,} characters; at most {LARGEST_FACTS:,} are kept")


def _check_file(entry: Entry) -> None:
    """The name is made of the entry's own fields, so that a line can point at no other file of this disk."""
    stem, _, suffix = entry.file.rpartition(".")
    if stem != _stem(entry.key) or not re.fullmatch("[a-z]{2,5}", suffix):
        raise FieldError("file", f"must be {_stem(entry.key)}.png or with another ending, not {entry.file!r}")
    if not _SHA256.fullmatch(entry.sha256):
        raise FieldError("sha256", f"must be 64 hexadecimal digits, not {entry.sha256!r}")


def _stem(key: Key) -> str:
    return f"images/{key[0]}_{key[1]}"


class Manifest:
    """The manifest of one system's pictures in `folder`, for one of the processes that write to it.

    Raises ConfigError with a line for each wrong line, for a picture that two lines disagree about, and where the
    folder holds another system's pictures or another revision's.
    """

    def __init__(self, folder: Path, system: str, revision: str = "", process: int = 0) -> None:
        self.folder, self.system, self.revision = folder, system, revision
        self.path = folder / ("manifest.jsonl" if process == 0 else f"manifest-{process}.jsonl")
        self.entries: dict[Key, Entry] = {}
        problems: list[str] = []
        for path in sorted(folder.glob("manifest*.jsonl")):
            self._read(path, problems)
        if problems:
            raise ConfigError(problems[:20])
        self._torn = self.path.is_file()

    def _read(self, path: Path, problems: list[str]) -> None:
        for number, line in json_fields.numbered(path, whole=True):
            try:
                if isinstance(line, FieldError):
                    raise line
                self._take(parse(line))
            except FieldError as error:
                problems.append(f"{path}, line {number}: {error}")

    def _take(self, entry: Entry) -> None:
        for name in ("system", "revision"):
            if getattr(entry, name) != getattr(self, name):
                wanted, here = getattr(self, name), getattr(entry, name)
                raise FieldError(name, f"the pictures are of {here!r}, not of {wanted!r}; choose another folder")
        before = self.entries.get(entry.key)
        if before is not None and before.prompt != entry.prompt:
            raise FieldError("prompt", f"is not that of an earlier line for {entry.prompt_id!r}")
        if before is None or before.status == "failed":
            self.entries[entry.key] = entry
        elif entry.status != "failed" and entry != before:  # a failure may stand before or after: files have no order
            problem = f"picture {entry.index} has another outcome in an earlier line; remove one of them"
            raise FieldError("prompt_id", problem)

    def missing(self, prompts: Mapping[str, str], images: int) -> list[Key]:
        """Which of the first `images` pictures of each prompt, prompt id -> text, are still to be generated, in order.

        What is there stays, a refusal included: asked again, it might cost again. What failed is tried again. Raises
        ConfigError where a prompt is not the one that its pictures were generated from.
        """
        changed = [e for e in self.entries.values() if e.prompt_id in prompts and prompts[e.prompt_id] != e.prompt]
        if changed:
            names = ", ".join(sorted({e.prompt_id for e in changed})[:5])
            raise ConfigError(f"{self.folder}: holds pictures of other prompts for {names}; choose another folder")
        keys = [(prompt_id, index) for prompt_id in prompts for index in range(images)]
        return [k for k in keys if k not in self.entries or self.entries[k].status == "failed"]

    def add_picture(
        self, key: Key, prompt: str, data: bytes, *, seconds: float, seed: int | None = None,
        sent_prompt: str | None = None, suffix: str = "png", **about: Any,
    ) -> Entry:  # fmt: skip
        """Write a picture, `data` as its file has it, then its line. `about`: `usd` and `facts` of the entry. Raises
        ConfigError where there is one already."""
        file = f"{_stem(key)}.{suffix}"
        digest = hashlib.sha256(data).hexdigest()
        about |= {"seconds": seconds, "file": file, "sha256": digest}
        entry = self._entry(key, prompt, sent_prompt, seed, status="ok", **about)
        self._check_new(entry)
        atomic_files.write_atomic(self.folder / file, lambda p: p.write_bytes(data))
        return self._append(entry)

    def add_outcome(
        self, key: Key, prompt: str, status: Literal["refused", "failed"], reason: str, *, seconds: float,
        seed: int | None = None, sent_prompt: str | None = None, **about: Any,
    ) -> Entry:  # fmt: skip
        """Write the line of a picture that there is none of; `about` as of `add_picture`."""
        entry = self._entry(key, prompt, sent_prompt, seed, status=status, seconds=seconds, reason=reason, **about)
        self._check_new(entry)
        return self._append(entry)

    def _entry(self, key: Key, prompt: str, sent: str | None, seed: int | None, **outcome: Any) -> Entry:
        """`outcome`: the fields of an Entry from `status` on."""
        sent = prompt if sent is None else sent
        return Entry(*key, prompt, sent, seed, self.system, self.revision, **outcome)

    def _check_new(self, entry: Entry) -> None:
        """Nothing that could not be read again is written, and nothing that is there already."""
        try:
            parse(asdict(entry))
            if entry.key in self.entries and self.entries[entry.key].status != "failed":
                raise FieldError("file", f"picture {entry.index} of {entry.prompt_id!r} is there already")
        except FieldError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    def _append(self, entry: Entry) -> Entry:
        if self._torn:
            _remove_torn_line(self.path)
            self._torn = False
        atomic_files.append(self.path, asdict(entry))
        self.entries[entry.key] = entry
        return entry

    def check_pictures(self, keys: Iterable[Key] | None = None) -> None:
        """Compare the pictures (all, or those of `keys`) with their hashes. Raises ConfigError, a line for each that is
        missing or changed."""
        problems = []
        for key in self.entries if keys is None else keys:
            entry = self.entries[key]
            path = self.folder / entry.file
            if entry.status != "ok":
                continue
            if not path.is_file():
                problems.append(f"{path}: is missing; put it back, or start with another folder")
            elif hash_of(path) != entry.sha256:
                problems.append(f"{path}: is not the picture that was generated; put that back, or start anew")
        if problems:
            raise ConfigError(problems)

    @property
    def seconds(self) -> float:
        """Of all outcomes."""
        return math.fsum(entry.seconds for entry in self.entries.values())


def _remove_torn_line(path: Path) -> None:
    """Cut off what stands after the last line end."""
    with atomic_files.writing(path), path.open("r+b") as file:
        end = size = file.seek(0, 2)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        if end < size:
            file.truncate(end)
