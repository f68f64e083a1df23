"""Fills a training store: from a folder, from WebDataset tars, from a Hugging Face dataset folder.

A picture's id is the hash of its file, so the same import twice adds nothing. What cannot be used is counted by reason
and never stops an import; an import that was killed goes on when it is run again. Import from one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from attrs import field, frozen, mutable

from lens_core.types import ConfigError
from lens_data import pictures
from lens_data.store import Store

FLUSH = 64 * 1024**2  # bytes of pictures held back before they are written
_EXAMPLES = 3  # names told for each reason

Row = dict[str, Any]  # of the store's columns


@frozen
class Found:
    """One picture as its source has it: `told` are its captions by key. `fault` says why it cannot be used."""

    name: str
    image: bytes | None = None
    told: Mapping[str, Any] = field(factory=dict)
    fault: str = ""


@mutable
class Report:
    """What became of the pictures that were found: `skipped` counts by reason, `examples` names the first few."""

    found: int = 0
    added: int = 0
    updated: int = 0
    skipped: dict[str, int] = field(factory=dict)
    examples: dict[str, list[str]] = field(factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES:
            names.append(name)

    def __str__(self) -> str:
        lines = [f"{self.found} found, {self.added} added, {self.updated} updated"]
        for reason, count in sorted(self.skipped.items()):
            names = ", ".join(self.examples[reason])
            lines.append(f"{count} skipped: {reason} ({names}{', …' if count > len(self.examples[reason]) else ''})")
        return "\n".join(lines)


def import_folder(
    store: str | Path, path: str | Path, *, caption: str = "dense", source: str = "", update: bool = False
) -> Report:
    """Import pictures below `path`, with captions from `captions.jsonl` or from a .txt beside each.

    A line of `captions.jsonl` is `{"file": "a.png", "brief": …, "dense": …}`; `file_name` and `text` do as well. A
    caption that does not say which it is, is a `caption`: "brief" or "dense". `source` names the origin (default: the
    folder's name). `update` replaces the captions of pictures that the store has already.
    """
    return _fill(store, _in_folder(_existing(path)), caption, source or _origin(path), update)


def import_tars(
    store: str | Path, path: str | Path, *, caption: str = "dense", source: str = "", update: bool = False
) -> Report:
    """Import WebDataset tars: `path` is one, or a folder of them. Captions are in .txt or .json members."""
    return _fill(store, _in_tars(_existing(path)), caption, source or _origin(path), update)


def import_parquet(
    store: str | Path,
    path: str | Path,
    *,
    caption: str = "dense",
    source: str = "",
    update: bool = False,
    image_column: str = "",
    text_column: str = "",
) -> Report:
    """Import a Hugging Face dataset folder: parquet files with an image column (struct of bytes and path) and captions.

    Without names, the image column is the first such struct, and captions stand in `brief`, `dense`, `caption` or
    `text`.
    """
    found = _in_parquet(_existing(path), image_column, text_column)
    return _fill(store, found, caption, source or _origin(path), update)


# ---- what the three share -----------------------------------------------------------------------------------------


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise ConfigError(f"{path}: there is no such folder or file to import; check the path")
    return Path(path)


def _origin(path: str | Path) -> str:
    whole = Path(path).resolve()
    return whole.name if whole.is_dir() else whole.stem


def _fill(store: str | Path, found: Iterable[Found], caption: str, source: str, update: bool) -> Report:
    if caption not in ("brief", "dense"):
        raise ConfigError(f"a caption is brief or dense, not {caption!r}; choose one")
    into = Store(str(store), create=True)
    table = into.columns("id", "brief", "dense").to_pydict()
    words = ((hash(b), hash(d)) for b, d in zip(table["brief"], table["dense"], strict=True))
    known = dict(zip(table["id"], zip(table["_rowid"], words, strict=True), strict=True))
    del table  # only hashes stay: captions are most of what a large store says
    report, new, changed, held, seen = Report(), list[Row](), dict[int, Row](), 0, set[str]()

    def flush() -> None:
        if new:
            into.add(new)
            report.added += len(new)
            new.clear()
        if changed:
            stored = into.rows(list(changed), "brief", "dense")
            # A caption that the source does not have is kept.
            into.replace(
                [{**row, **{k: row[k] or stored[n][k] for k in ("brief", "dense")}} for n, row in changed.items()]
            )
            report.updated += len(changed)
            changed.clear()

    for item in found:
        report.found += 1
        row, fault = _row(item, caption, source)
        if row is None:
            report.skip(fault, item.name)
            continue
        if row["id"] in seen:
            report.skip("the same picture again", item.name)
            continue
        seen.add(row["id"])
        if row["id"] not in known:
            new.append(row)
        else:
            number, stored = known[row["id"]]
            if all(
                not text or hash(text) == old for text, old in zip((row["brief"], row["dense"]), stored, strict=True)
            ):
                report.skip("already in the store", item.name)
                continue
            if not update:
                report.skip("already in the store with other captions; --update replaces them", item.name)
                continue
            changed[number] = row
        held += len(row["image"])
        if held >= FLUSH:
            flush()
            held = 0
    flush()
    if not report.found:
        raise ConfigError(f"{source}: holds no picture; check the path, and the format of the import")
    return report


def _row(item: Found, caption: str, source: str) -> tuple[Row | None, str]:
    """The store's row, or None and why not."""
    if item.fault:
        return None, item.fault
    if item.image is None:
        return None, "no picture"
    texts = {key: item.told[key] for key in ("brief", "dense", "caption", "text") if key in item.told}
    words = {key: text.strip() for key, text in texts.items() if isinstance(text, str)}
    brief, dense = words.get("brief", ""), words.get("dense", "")
    plain = words.get("caption") or words.get("text") or ""
    brief, dense = (brief or plain, dense) if caption == "brief" else (brief, dense or plain)
    if not (brief or dense):
        return None, "empty caption" if words else "missing caption"
    try:
        width, height = pictures.read(item.image).size
    except pictures.PictureError:
        return None, "corrupt image"
    key = hashlib.sha256(item.image).hexdigest()
    row = {"id": key, "image": item.image, "height": height, "width": width, "brief": brief, "dense": dense}
    return {**row, "source": source}, ""


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in pictures.SUFFIXES


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


# ---- sources ------------------------------------------------------------------------------------------------------


def _in_folder(root: Path) -> Iterator[Found]:
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file() and _is_picture(p.name)}
    listed: dict[str, Mapping[str, Any]] = {}
    lines = root / "captions.jsonl"
    if lines.is_file():
        for number, line in enumerate(lines.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            where, facts = f"captions.jsonl:{number}", _json(line) or {}
            name = facts.get("file") or facts.get("file_name")
            if not isinstance(name, str):
                yield Found(where, fault="damaged line in captions.jsonl")
            elif name not in paths:
                yield Found(f"{where} {name}", fault="caption without a picture")
            elif name in listed:
                yield Found(f"{where} {name}", fault="listed again in captions.jsonl")
            else:
                listed[name] = facts
    for name, path in paths.items():
        told = listed.get(name)
        beside = path.with_suffix(".txt")
        try:
            if told is None and beside.is_file():
                text = _text(beside.read_bytes())
                if text is None:
                    yield Found(name, fault="caption is not UTF-8")
                    continue
                told = {"caption": text}
            yield Found(name, path.read_bytes(), told or {})
        except OSError:
            yield Found(name, fault="unreadable file")


def _json(data: bytes) -> dict[str, Any] | None:
    text = _text(data)
    try:
        value = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _in_tars(path: Path) -> Iterator[Found]:
    tars = sorted(p for p in path.rglob("*") if ".tar" in p.suffixes) if path.is_dir() else [path]
    for tar in tars:
        key, members = "", dict[str, bytes]()
        try:
            with tarfile.open(tar, "r|*") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() else None
                    if file is None:
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    here = f"{folder}/{stem}" if folder else stem
                    if here != key:
                        if members:
                            yield _sample(f"{tar.name}:{key}", members)
                        key, members = here, {}
                    members[f".{ending.lower()}"] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            # The sample at the break may lack a member: it is given up with the rest.
            yield Found(f"{tar.name} ({' '.join(str(error).split())})", fault="damaged archive, its rest is lost")
            continue
        if members:
            yield _sample(f"{tar.name}:{key}", members)


def _sample(name: str, members: Mapping[str, bytes]) -> Found:
    image = next((data for ending, data in members.items() if _is_picture(f"x{ending}")), None)
    told: dict[str, Any] = {}
    for ending, data in members.items():
        if ending == ".json":
            facts = _json(data)
            if facts is None:
                return Found(name, fault="damaged .json")
            told |= facts
        elif ending == ".txt":
            text = _text(data)
            if text is None:
                return Found(name, fault="caption is not UTF-8")
            told["caption"] = text
    return Found(name, image, told)


def _in_parquet(path: Path, image_column: str, text_column: str) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        try:
            reader = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid):
            yield Found(file.name, fault="damaged parquet file")
            continue
        with reader:
            image, texts = _parquet_columns(file, reader.schema_arrow, image_column, text_column)
            row = 0
            try:
                for batch in reader.iter_batches(batch_size=64, columns=[image, *texts]):
                    for values in batch.to_pylist():
                        held = values[image]
                        data = held.get("bytes") if isinstance(held, dict) else held
                        told = {"text" if key == text_column else key: values[key] for key in texts}
                        yield Found(f"{file.name}:{row}", data, told)
                        row += 1
            except (OSError, pa.ArrowInvalid):
                yield Found(f"{file.name}:{row}", fault="damaged parquet file, its rest is lost")


def _parquet_columns(file: Path, schema: Any, image: str, text: str) -> tuple[str, list[str]]:
    import pyarrow as pa

    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    if not image and not structs:
        raise ConfigError(f"{file}: has no image column among {', '.join(schema.names)}; name it with image_column")
    texts = [text] if text else [n for n in ("brief", "dense", "caption", "text") if n in schema.names]
    if not texts:
        raise ConfigError(f"{file}: has no caption column among {', '.join(schema.names)}; name it with text_column")
    for name in (image or structs[0], *texts):
        if name not in schema.names:
            raise ConfigError(f"{file}: has no column {name!r} among {', '.join(schema.names)}; mend the name")
    return image or structs[0], texts
