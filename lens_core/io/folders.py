"""Pictures in folders, with captions from a list or from a .txt beside each."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lens_core.io import readers, sources
from lens_core.io.digests import Ids
from lens_core.io.sources import CAPTION_KEYS, SourceItem, is_picture, parse_json
from lens_core.io.system_files import is_system_file

LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that list pictures of their folder with captions; the last two are those of Hugging Face's image folders."""
_NAME_KEYS = ("file", "file_name", "filename")  # what a list calls a picture's name


def read_folder(root: Path) -> Iterator[SourceItem]:
    """Pictures below `root`: those that a list names, with its captions, then the others, with a .txt beside each."""
    for entry in list_folder(root):
        yield entry if isinstance(entry, SourceItem) else read_picture(root, *entry)


def list_folder(root: Path) -> Iterator[tuple[str, tuple[Mapping[str, Any], ...]] | SourceItem]:
    """What `read_folder` would read, in its order, without opening a picture: the path below `root` of each, and the
    captions that a list has for it; an item for each thing that cannot be used."""
    listed, faults = Ids(), list[SourceItem]()
    for folder, names in sources.walk(root, faults):
        for name in LISTS:
            if name in names:
                yield from _in_list(root, folder, name, listed)
    yield from faults
    later = list[SourceItem]()
    for folder, names in sources.walk(root, later):
        for name in names:
            relative = f"{folder}{name}"
            if is_picture(name) and _name_digest(relative) not in listed:
                yield relative, ()
    known = set(faults)
    yield from (fault for fault in later if fault not in known)  # what could be listed the first time alone


def read_picture(root: Path, relative: str, captions: tuple[Mapping[str, Any], ...]) -> SourceItem:
    """The picture of this path below `root`, with these captions, and that of the .txt beside it."""
    path = os.path.join(root, relative)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe, which would be waited for
            return SourceItem(relative, fault=sources.UNREADABLE)
        image = _read(path, sources.LARGEST_PICTURE)
        if image is None:
            return SourceItem(relative, fault=sources.TOO_LARGE)
        text = text_beside(path)
        if text is not None:
            caption = _read(text, sources.LARGEST_TEXT)
            captions = (*captions, {"fault": sources.LONG_TEXT} if caption is None else {"caption": caption})
    except (OSError, ValueError) as error:
        return sources.broken(relative, error, sources.UNREADABLE)
    return SourceItem(relative, image, captions)


def text_beside(path: str) -> str | None:
    """The file with the caption of the picture at `path`; None where there is none."""
    stem = os.path.splitext(path)[0]
    return next((stem + end for end in (".txt", ".TXT", ".Txt") if sources.may_be_file(stem + end)), None)


def _read(path: str, most: int) -> bytes | None:
    """A file of at most `most` bytes; None if it is larger."""
    with open(path, "rb") as file:
        data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    return data if len(data) <= most else None


def _in_list(
    root: Path, folder: str, name: str, listed: Ids
) -> Iterator[tuple[str, tuple[Mapping[str, Any], ...]] | SourceItem]:
    """The pictures that a list in `folder` names, paths from there; `listed` takes their paths below `root`."""
    where = f"{folder}{name}"
    try:
        with open(os.path.join(root, where), "rb") as file:
            for number, facts in _facts(file, csv_=name.endswith(".csv")):
                listed_name = next((facts[key] for key in _NAME_KEYS if key in facts), None)
                if not isinstance(listed_name, str):
                    yield SourceItem(f"{where}:{number}", fault=f"damaged line in {name}")
                    continue
                relative = _resolve(root, folder, listed_name)
                if relative is None:
                    yield SourceItem(f"{where}:{number} {listed_name}", fault="caption without a picture")
                elif (digest := _name_digest(relative)) in listed:
                    yield SourceItem(f"{where}:{number} {listed_name}", fault=f"listed again in {name}")
                else:
                    listed.add(digest)
                    yield relative, (facts,)
    except OSError as error:
        yield sources.broken(where, error, sources.UNREADABLE)


def _resolve(root: Path, folder: str, listed_name: str) -> str | None:
    """The path below `root` of the picture that a list in `folder` names, however that writes it."""
    place = PurePosixPath(listed_name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or not is_picture(place.name) or is_system_file(place):
        return None
    # macOS takes accents apart in file names.
    forms = dict.fromkeys([str(place), *(unicodedata.normalize(form, str(place)) for form in ("NFC", "NFD"))])
    return next((f"{folder}{form}" for form in forms if sources.may_be_file(os.path.join(root, folder, form))), None)


def _name_digest(relative: str) -> bytes:
    return hashlib.sha256(os.fsencode(relative)).digest()


def _facts(file: IO[bytes], csv_: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The fields of each line of a list, by its number; none where the line cannot be read."""
    if not csv_:
        for number, line in _lines(file):
            if line.strip():
                yield number, parse_json(line) or {}
        return
    head = next((line for _, line in _lines(file)), b"").decode("utf-8-sig", "replace")
    columns: list[str] = []
    for delimiter in ",;\t":
        try:
            columns = [c.strip().lower() for c in next(csv.reader([head], delimiter=delimiter), [])]
        except csv.Error:  # a carriage return in its middle, a field that has no end: no column is known
            columns = []
        if any(name in columns for name in _NAME_KEYS):
            break
    number = 1
    texts = (line.decode("utf-8", "surrogateescape") for _, line in _lines(file))
    rows = csv.reader(texts, delimiter=delimiter)
    while True:
        number += 1
        try:
            row = next(rows, None)
        except csv.Error:  # a NUL, a field that has no end
            yield number, {}
            continue
        if row is None:
            return
        if row:
            facts = dict(zip(columns, row, strict=False))
            yield number, facts | {k: facts[k].encode("utf-8", "surrogateescape") for k in CAPTION_KEYS if k in facts}


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines by number, from 1; of a line that is too long, a piece that is no JSON."""
    for number, line in readers.bounded_lines(file, sources.LARGEST_TEXT):
        yield number, b"\0" if line is None else line
