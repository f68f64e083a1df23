"""Where pictures come from: folders, WebDataset tars, parquet files, a store. `urls` and `text_pictures` are two more.

A source lists its parts without opening a picture, and reads one part at a time, anywhere: a picture of a folder, a
tar, a row group, some rows of a store. `stamp` changes when a part does, which is then read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve, field, frozen

from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, structure, unstructure
from lens_core.io import folders, parquet, readers, tars
from lens_core.io.captions import printable
from lens_core.io.sources import CAPTION_KEYS, SourceItem, files_below
from lens_core.types import ConfigError, did_you_mean
from lens_core.validators import one_of, text
from lens_curate import text_pictures, urls
from lens_curate.parts import Part, text_digest
from lens_curate.recipe import for_each

STORE_ROWS = 64  # rows of a store that are read at once


class Source(Protocol):
    """Lists parts and reads them. `read` of a part gives the same items wherever and whenever it runs."""

    def check(self) -> None:
        """Raise LensError where there is nothing to read."""

    def parts(self) -> Iterator[Part]: ...

    def read(self, part: Part) -> Iterator[SourceItem]: ...


@frozen
class NamedSource:
    """A source of a recipe with what every picture of it is noted with."""

    name: str
    license: str
    caption: str  # what a caption is that does not say so: brief or dense
    source: Source
    identity: str  # changes when its pictures must be read again

    def digest(self, part: Part) -> str:
        """What a part is known by in the tables, 32 hexadecimal digits."""
        return text_digest(self.name, part.key)


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"{path}: there is no such folder or file; check the path of this source")
    return place


def _stamp(*paths: Path) -> str:
    """Sizes and times of files; a file that is not there counts as such."""
    marks = []
    for path in paths:
        try:
            facts = path.stat()
            marks.append(f"{facts.st_size} {facts.st_mtime_ns}")
        except (OSError, ValueError):
            marks.append("none")
    return ", ".join(marks)


def _prefix(root: Path, file: Path) -> str:
    """The folders between the two, with a slash at the end, so that names below different folders differ."""
    if not root.is_dir():
        return ""
    between = file.relative_to(root).parent
    return "" if str(between) == "." else f"{between}/"


class _Files:
    """A source of files: a folder, or one file."""

    @frozen
    class Config:
        path: str = field(validator=text())

    def __init__(self, config: Any, catalog: Catalog) -> None:
        self.config = config


class Folder(_Files):
    """Pictures below a folder, with captions from lists and .txt files, as `lens data import` reads them."""

    def check(self) -> None:
        if not _existing(self.config.path).is_dir():
            raise ConfigError(f"{self.config.path}: is a file, not a folder of pictures; name the folder")

    def parts(self) -> Iterator[Part]:
        root = _existing(self.config.path)
        for entry in folders.list_folder(root):
            if isinstance(entry, SourceItem):
                yield Part(entry.name, fault=entry.fault, retry=entry.retry)
                continue
            relative, captions = entry
            facts = [
                {k: v if isinstance(v, str) else v.decode("utf-8", "surrogateescape")
                 for k, v in listed.items() if k in CAPTION_KEYS and isinstance(v, str | bytes)}
                for listed in captions
            ]  # fmt: skip
            file = root / relative
            beside = folders.text_beside(str(file))
            stamp = f"{_stamp(file, Path(beside or file.with_suffix('.txt')))} {text_digest(json.dumps(facts))}"
            yield Part(relative, stamp, payload={"captions": facts})

    def read(self, part: Part) -> Iterator[SourceItem]:
        yield folders.read_picture(Path(self.config.path).expanduser(), part.key, tuple(part.payload["captions"]))


class Tars(_Files):
    """Samples of WebDataset tars, one or all below a folder."""

    def check(self) -> None:
        if not files_below(_existing(self.config.path), tars.is_tar):
            raise ConfigError(f"{self.config.path}: holds no tar; check the path of this source")

    def parts(self) -> Iterator[Part]:
        root = _existing(self.config.path)
        faults: list[SourceItem] = []
        for tar in files_below(root, tars.is_tar, faults):
            yield Part(str(tar.relative_to(root) if root.is_dir() else tar.name), _stamp(tar), count=0)
        for fault in faults:
            yield Part(fault.name, fault=fault.fault, retry=fault.retry)

    def read(self, part: Part) -> Iterator[SourceItem]:
        root = Path(self.config.path).expanduser()
        tar = root / part.key if root.is_dir() else root
        for item in tars.read_tar(tar):
            yield evolve(item, name=f"{_prefix(root, tar)}{item.name}")


class Parquet(_Files):
    """Rows of parquet files, as Hugging Face dataset folders have them; the columns are those of `lens data import`."""

    @frozen
    class Config(_Files.Config):
        image_column: str = ""  # "": the one called image, img, jpg, png, jpeg or webp
        text_column: str = ""  # "": brief, dense, caption or text, if there is one

    def check(self) -> None:
        if not files_below(_existing(self.config.path), parquet.is_parquet):
            raise ConfigError(f"{self.config.path}: holds no parquet file; check the path of this source")
        next(self._groups(), None)  # names columns that are missing

    def _groups(self) -> Iterator[parquet.RowGroup | SourceItem]:
        c = self.config
        return parquet.list_groups(_existing(c.path), c.image_column, c.text_column, captions=False)

    def parts(self) -> Iterator[Part]:
        root = _existing(self.config.path)
        for entry in self._groups():
            if isinstance(entry, SourceItem):
                yield Part(entry.name, fault=entry.fault, retry=entry.retry)
                continue
            file = str(entry.file.relative_to(root)) if root.is_dir() else entry.file.name
            payload = {"file": file, "group": entry.group, "first": entry.first, "rows": entry.rows,
                       "image": entry.image, "texts": entry.texts}  # fmt: skip
            yield Part(f"{file}:{entry.group}", _stamp(entry.file), entry.rows, payload)

    def read(self, part: Part) -> Iterator[SourceItem]:
        root, facts = Path(self.config.path).expanduser(), dict(part.payload)
        file = root / facts.pop("file") if root.is_dir() else root
        facts.pop("file", None)
        for item in parquet.read_group(parquet.RowGroup(file, **facts)):
            yield evolve(item, name=f"{_prefix(root, file)}{item.name}")


class StoreSource:
    """The pictures of a training store."""

    @frozen
    class Config:
        path: str = field(validator=text())  # folder or URI

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self.config, self.catalog = config, catalog
        self._store: Any = None

    @property
    def store(self) -> Any:
        if self._store is None:
            self._store = open_store(self.catalog, self.config.path)
        return self._store

    def check(self) -> None:
        _ = self.store

    def parts(self) -> Iterator[Part]:
        for batch in self.store.batches("id"):
            ids, rows = batch["id"].to_pylist(), batch["_rowid"].to_pylist()
            for start in range(0, len(ids), STORE_ROWS):
                stop = min(start + STORE_ROWS, len(ids))
                yield Part(ids[start], text_digest(*ids[start:stop]), stop - start, {"rows": rows[start:stop]})

    def read(self, part: Part) -> Iterator[SourceItem]:
        stored = self.store.rows(part.payload["rows"], "id", "image", "brief", "dense", "source")
        for number in part.payload["rows"]:
            row = stored.get(number)
            if row is not None:
                captions = {"brief": row["brief"], "dense": row["dense"]}
                yield SourceItem(row["id"], bytes(row["image"]), (captions,))


def open_store(catalog: Catalog, path: str, create: bool = False) -> Any:
    """The training store at `path`, whose plugin is reached through the catalog."""
    return catalog.find("dataset", "store").cls.open_store(path, create)


SOURCES: Mapping[str, type[Any]] = {
    "folder": Folder,
    "parquet": Parquet,
    "store": StoreSource,
    "tars": Tars,
    "text_pictures": text_pictures.TextPictures,
    "urls": urls.Urls,
}


@frozen
class _Common:
    """Options of every source."""

    name: str | None = None
    license: str = ""
    caption: str = field(default="dense", validator=one_of("brief", "dense"))


def build_sources(uses: Sequence[ComponentSpec], catalog: Catalog) -> list[NamedSource]:
    """The sources that a recipe names, built and named. Raises ConfigError with every problem; reads nothing."""
    built: list[NamedSource] = []

    def add(use: ComponentSpec, where: str) -> None:
        made = _build(use, catalog, where)
        if made.name in {each.name for each in built}:
            raise ConfigError(f"{where}: another source is called {made.name!r}; give this one another `name`")
        built.append(made)

    for_each(uses, "$.sources", add)
    return built


def _build(use: ComponentSpec, catalog: Catalog, where: str) -> NamedSource:
    cls = SOURCES.get(use.use)
    if cls is None:
        raise ConfigError(f"{where}.use: no source is called {readers.shown(use.use)}.{did_you_mean(use.use, SOURCES)}")
    names = ("name", "license", "caption")
    common = structure(_Common, {k: v for k, v in use.options.items() if k in names}, where)
    config = structure(cls.Config, {k: v for k, v in use.options.items() if k not in names}, where)
    path = str(getattr(config, "path", ""))
    name = printable(common.name or os.path.basename(path.rstrip("/")) or use.use)
    options = {k: v for k, v in unstructure(config).items() if k != "path"}  # a folder may move
    identity = text_digest(use.use, json.dumps(options, sort_keys=True), common.license, common.caption)
    return NamedSource(name, common.license, common.caption, cls(config, catalog), identity)
