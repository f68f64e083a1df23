"""Fills a training store: from a folder, from WebDataset tars, from a Hugging Face dataset folder.

A picture's id is the hash of its file, so the same import twice adds nothing. What cannot be used is counted by reason
and never stops an import; an import that was killed goes on when it is run again. One import at a time writes to a
store: another is refused. On object storage, which has no locks, rows are merged by id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, mutable

from lens_core.io import folders, parquet, tars
from lens_core.io.atomic_files import WriteError
from lens_core.io.captions import printable, read_captions
from lens_core.io.digests import Ids, of_ids, position
from lens_core.io.locks import locked
from lens_core.io.progress import progress
from lens_core.io.sources import SourceItem, is_picture
from lens_core.io.system_files import is_system_file
from lens_core.types import ConfigError
from lens_data import pictures
from lens_data.store import Store

FLUSH = 64 * 1024**2  # bytes of pictures held back before they are written
ROWS = 4096  # pictures held back at most
_EXAMPLES = 3  # names shown for each reason

Row = dict[str, Any]  # of the store's columns


@mutable
class ImportReport:
    """What became of the pictures of a source: `total` of them, `skipped` by reason, with the first few `examples`."""

    total: int = 0
    added: int = 0
    updated: int = 0
    skipped: dict[str, int] = field(factory=dict)
    examples: dict[str, list[str]] = field(factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES:
            names.append(printable(name))

    def __str__(self) -> str:
        lines = [f"{self.total} found, {self.added} added, {self.updated} updated"]
        for reason, count in sorted(self.skipped.items()):
            names = ", ".join(self.examples[reason])
            lines.append(f"{count} skipped: {reason} ({names}{', …' if count > len(self.examples[reason]) else ''})")
        return "\n".join(lines)


def import_folder(
    store: str | Path, path: str | Path, *, caption: str = "dense", source: str = "", update: bool = False
) -> ImportReport:
    """Import pictures below `path`, with captions from a list or from a .txt beside each.

    A list is `captions.jsonl`, `metadata.jsonl` or `metadata.csv`, in any folder, for the pictures there and below. A
    line is `{"file": "a.png", "brief": …, "dense": …}`; `file_name` and `text` do as well. A caption that does not say
    which it is, is a `caption`: "brief" or "dense". `source` names the origin (default: the folder's name). `update`
    replaces the captions of pictures that the store has already.
    """
    if not _existing(path).is_dir():
        raise ConfigError(f"{path}: is one file, and neither a tar nor a parquet file; name the folder of the pictures")
    return _fill(store, folders.read_folder(Path(path)), caption, source or _origin(path), update)


def import_tars(
    store: str | Path, path: str | Path, *, caption: str = "dense", source: str = "", update: bool = False
) -> ImportReport:
    """Import WebDataset tars: `path` is one, or a folder of them. Captions are in .json members, or else in .txt."""
    return _fill(store, tars.read_tars(_existing(path)), caption, source or _origin(path), update)


def import_parquet(
    store: str | Path,
    path: str | Path,
    *,
    caption: str = "dense",
    source: str = "",
    update: bool = False,
    image_column: str = "",
    text_column: str = "",
) -> ImportReport:
    """Import a Hugging Face dataset folder: parquet files with an image column (struct of bytes and path) and captions.

    Without names, the image column is called image, img, jpg, png, jpeg or webp, or is the only such struct, and
    captions stand in `brief`, `dense`, `caption` or `text`.
    """
    items = parquet.read_parquet(_existing(path), image_column, text_column)
    return _fill(store, items, caption, source or _origin(path), update)


# ---- what the three share -----------------------------------------------------------------------------------------


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise ConfigError(f"{path}: there is no such folder or file to import; check the path")
    return Path(path)


def _origin(path: str | Path) -> str:
    whole = Path(path).resolve()
    return whole.name if whole.is_dir() else whole.stem


def _fill(store: str | Path, items: Iterable[SourceItem], caption: str, source: str, update: bool) -> ImportReport:
    if caption not in ("brief", "dense"):
        raise ConfigError(f"a caption is brief or dense, not {caption!r}; choose one")
    local = "://" not in str(store)
    with locked(Path(store), "store") if local else nullcontext():
        return _Importer(Store(str(store), create=True), caption, printable(source), update).run(items)


class _Importer:
    """One import into an open store. Of what the store holds, only hashes are kept: captions are most of it."""

    def __init__(self, store: Store, caption: str, source: str, update: bool) -> None:
        self.store, self.caption, self.source, self.update = store, caption, source, update
        self.stored = _StoredPictures(store)
        self.added_ids = Ids()  # pictures that were new in this import
        self.report = ImportReport()
        self.new: list[Row] = []
        self.changed: dict[int, Row] = {}
        self.held = 0

    def run(self, items: Iterable[SourceItem]) -> ImportReport:
        for item in progress(items, "picture", desc=f"import {self.source}"):
            self.report.total += 1
            fault = self._take(item)
            if fault:
                self.report.skip(fault, item.name)
            if self.held >= FLUSH or len(self.new) + len(self.changed) >= ROWS:
                self._flush()
        self._flush()
        if not self.report.total:
            raise ConfigError(f"{self.source}: holds no picture; check the path, and the format of the import")
        return self.report

    def _take(self, item: SourceItem) -> str:
        """Hold a picture back for the store; or why not."""
        row, fault = _row(item, self.caption, self.source)
        if row is None:
            return fault
        digest = bytes.fromhex(row["id"])
        place = self.stored.place(digest)
        if digest in self.added_ids if place is None else self.stored.met[place]:
            return "the same picture again"
        if place is None:
            self.added_ids.add(digest)
            self.new.append(row)
        else:
            self.stored.met[place] = True
            if self.stored.has(place, row):
                return "already in the store"
            if not self.update:
                return "already in the store with other captions; --update replaces them"
            self.changed[int(self.stored.rows[place])] = row
        self.held += len(row["image"])
        return ""

    def _flush(self) -> None:
        try:
            if self.new:
                self.report.added += self.store.insert(self.new)
            if self.changed:
                stored = self.store.rows(list(self.changed), "brief", "dense")
                # A caption that the source does not have is kept.
                self.store.replace(
                    [
                        {**row, **{k: row[k] or stored[n][k] for k in ("brief", "dense")}}
                        for n, row in self.changed.items()
                    ]
                )
                self.report.updated += len(self.changed)
        except WriteError as error:
            raise WriteError(
                f"{error}. {self.report.added} pictures were added before; the same import goes on"
            ) from error
        self.new.clear()
        self.changed.clear()
        self.held = 0


class _StoredPictures:
    """What a store holds, about 60 bytes a picture: ids, sorted; with each, its row, hashes of its captions, and
    whether this import has met it."""

    def __init__(self, store: Store) -> None:
        count = len(store)
        self.ids, self.rows = np.empty(count, "S32"), np.empty(count, np.int64)
        self.words = np.empty((count, 2), np.int64)
        at = 0
        for batch in store.batches("id", "brief", "dense"):
            part = slice(at, at + batch.num_rows)
            self.ids[part] = of_ids(batch["id"].to_pylist())
            self.rows[part] = batch["_rowid"].to_numpy()
            for column, name in enumerate(("brief", "dense")):
                self.words[part, column] = [hash(text) for text in batch[name].to_pylist()]
            at += batch.num_rows
        order = np.argsort(self.ids)
        for name in ("ids", "rows", "words"):
            setattr(self, name, getattr(self, name)[order])
        self.met = np.zeros(count, bool)

    def place(self, digest: bytes) -> int | None:
        return position(self.ids, digest)

    def has(self, place: int, row: Row) -> bool:
        """Whether the store has these captions, as far as there are any."""
        return all(
            not row[name] or hash(row[name]) == old
            for name, old in zip(("brief", "dense"), self.words[place].tolist(), strict=True)
        )


def _row(item: SourceItem, caption: str, source: str) -> tuple[Row | None, str]:
    """The store's row, or None and why not."""
    if item.fault:
        return None, item.fault
    if item.image is None:
        return None, "no picture"
    brief, dense, fault = read_captions(item.captions, caption)
    if fault:
        return None, fault
    try:
        width, height = pictures.read(item.image).size
    except pictures.PictureError as error:
        return None, error.reason
    key = hashlib.sha256(item.image).hexdigest()
    row = {"id": key, "image": item.image, "height": height, "width": width, "brief": brief, "dense": dense}
    return {**row, "source": source}, ""


_FORMATS: dict[str, Callable[..., ImportReport]] = {
    "folder": import_folder,
    "tars": import_tars,
    "parquet": import_parquet,
}


def import_path(
    store: str | Path, path: Path, *, format: str = "auto", columns: Mapping[str, str] | None = None, **options: Any
) -> ImportReport:
    """Import what is at `path`: `format` is folder, tars, parquet, or auto, which looks at what is there.

    `columns` are `image_column` and `text_column` of parquet files; `options` are those of `import_folder`. Raises
    ConfigError for an unknown format, and for columns of what has none.
    """
    chosen = format_of(path) if format == "auto" else format
    if chosen not in _FORMATS:
        raise ConfigError(f"no import is called {chosen!r}; known: auto, {', '.join(_FORMATS)}")
    named = {name: column for name, column in (columns or {}).items() if column}
    if named and chosen != "parquet":
        raise ConfigError(f"--{next(iter(named)).replace('_', '-')}: {chosen} have no columns; leave it out")
    return _FORMATS[chosen](store, path, **options, **named)


def format_of(path: Path) -> str:
    """Whether a path is of parquet files, of tars, or a folder of pictures. Raises ConfigError for one that has several
    of them."""
    first: dict[str, Path] = {}  # a file of each kind
    for file in [path] if path.is_file() else path.rglob("*"):
        if is_system_file(file.relative_to(path) if file != path else file.name):
            continue
        kind = next((kind for kind, of_kind in _KINDS.items() if of_kind(file.name)), None)
        if kind is not None and file.is_file():
            first.setdefault(kind, file)
        if len(first) > 1:
            (one, here), (other, there) = ((kind, printable(str(f.relative_to(path)))) for kind, f in first.items())
            raise ConfigError(
                f"{path}: has files of two kinds, {here} ({one}) and {there} ({other}); say which are meant: "
                f"--format {one} or --format {other}"
            )
    return next(iter(first), "folder")


_KINDS: dict[str, Callable[[str], bool]] = {"parquet": parquet.is_parquet, "tars": tars.is_tar, "folder": is_picture}
