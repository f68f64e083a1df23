"""What a curation knows, in tables beside the pictures of the store that it fills.

curate_records   one row for each picture of a source, also of those that cannot be read
curate_parts     the parts of sources that have been read to their end, with their stamps and how many records count
scores_…         the numbers of one filter, by the id of a file, or by a hash of it and its captions where the filter
                 reads captions; another version or Config has another table
curate_captions  captions that were made, by id and by what asked for them
curate_verdicts  one row for each record: whether it is kept, and if not, why; written anew by every run

All but the last only grow. Where a row stands twice (a part was read again), the last one counts. Records that the
newest reading of their part has not found again count no more, nor do those of parts that their source has no more.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_core.catalog import Catalog
from lens_core.io.digests import position
from lens_core.types import LensError
from lens_curate.hashes import BITS, grid_array
from lens_curate.hashes import VERSION as HASHES
from lens_curate.parts import SHORT
from lens_curate.recipe import Filter
from lens_curate.sources import NamedSource, StoreSource, open_store

RECORDS = "curate_records"
PARTS = "curate_parts"
CAPTIONS = "curate_captions"
VERDICTS = "curate_verdicts"
OWN = "(store)"
"""The `part` of pictures that were in the store before, by `lens data import` or another curation."""

UNFINISHED = ""
"""The stamp of a part that was read before, has changed, and was not read to its end since: the next run reads it."""

COLUMNS: Mapping[str, Mapping[str, str]] = {
    RECORDS: {
        "key": "string", "part": "string", "source": "string", "license": "string", "name": "string", "id": "string",
        "pixels": "string", "phash": "binary", "mirrored": "binary", "colours": "binary", "height": "int32",
        "width": "int32", "format": "string", "size": "int64", "sharpness": "float32", "brief": "string",
        "dense": "string", "fault": "string", "thumbnail": "binary",
    },
    PARTS: {"part": "string", "stamp": "string", "count": "int32"},
    CAPTIONS: {
        "id": "string", "prompt": "string", "style": "string", "text": "string", "flaw": "string", "attempts": "int32",
    },
    VERDICTS: {
        "key": "string", "id": "string", "source": "string", "name": "string", "kept": "bool", "stage": "string",
        "reason": "string", "of": "string", "distance": "int32",
    },
}  # fmt: skip
COMPACT_AFTER = 256
"""Times that a run adds to a table before its pieces are joined at the end: reading very many pieces is slow. Joining
takes memory, some 200 MB where a row has 2 KB, so what is small is left as it is."""
_IMAGES = {"id": "string", "image": "large_binary"}
_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_EMPTY = {"string": "", "binary": b"", "int32": 0, "int64": 0, "float32": 0.0}


def record_row(key: str, part: str, source: NamedSource, name: str, brief: str, dense: str) -> dict[str, Any]:
    """The row of a record of which nothing more is known yet."""
    row: dict[str, Any] = {column: _EMPTY[kind] for column, kind in COLUMNS[RECORDS].items()}
    return row | {
        "key": key, "part": OWN if isinstance(source.source, StoreSource) and source.name == OWN else part,
        "source": source.name, "license": source.license, "name": name, "brief": brief, "dense": dense,
    }  # fmt: skip


def own_source(path: str, catalog: Catalog) -> NamedSource:
    """The store that is filled, as a source: pictures that are in it already are hashed, to compare new ones with."""
    source = StoreSource(StoreSource.Config(path), catalog)
    return NamedSource(OWN, "", "dense", source, f"{OWN} {HASHES}")


def score_columns(columns: Sequence[str]) -> dict[str, str]:
    return {"id": "string", **dict.fromkeys(columns, "float32"), "fault": "string"}


def score_table(made: Filter) -> str:
    """The name of the table of a filter's scores."""
    return f"scores_{made.component.rpartition(':')[2]}_{hashlib.sha256(made.identity.encode()).hexdigest()[:12]}"


def dump(kind: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as an Arrow table in IPC format; `kind` as in `worker.Answer`."""
    import pyarrow as pa

    columns = {"records": COLUMNS[RECORDS], "parts": COLUMNS[PARTS], "images": _IMAGES}.get(kind)
    if columns is None:
        columns = score_columns([name for name in rows[0] if name not in ("id", "fault")])
    schema = pa.schema([(name, pa.type_for_alias(alias)) for name, alias in columns.items()])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def load(body: bytes) -> Any:
    """The Arrow table of `dump`."""
    import pyarrow as pa

    with pa.ipc.open_stream(body) as reader:
        return reader.read_all()


@frozen
class RecordArrays:
    """The records of a curation as arrays, one place for each: what decides which are kept. Texts are read by row."""

    row: NDArray[np.int64]  # `_rowid` in the table of records
    key: NDArray[np.bytes_]  # S16
    source: NDArray[np.int32]  # number in `sources`
    sources: tuple[str, ...]
    in_store: NDArray[np.bool_]  # was in the store before
    part: NDArray[np.bytes_]  # S16
    id: NDArray[np.bytes_]  # S32; zeros where there is no file
    fault: NDArray[np.int32]  # number in `faults`; 0 is none
    faults: tuple[str, ...]
    pixels: NDArray[np.int32]  # equal for records with equal pixels
    hashes: NDArray[np.uint64]  # [N,4]
    mirrored: NDArray[np.uint64]  # [N,4]
    area: NDArray[np.int64]  # px
    sharpness: NDArray[np.float32]
    brief: NDArray[np.bool_]  # came with a brief caption
    dense: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row)


@frozen
class PartIndex:
    """Digests of parts, sorted, those of their stamps, and the records that each has."""

    part: NDArray[np.bytes_]
    stamp: NDArray[np.bytes_]
    count: NDArray[np.int32]

    def has(self, part: bytes, stamp: str) -> bool:
        """Whether a part has been read as it is now."""
        place = position(self.part, part)
        return place is not None and bool(self.stamp[place : place + 1] == np.array([stamp_digest(stamp)], "S16"))

    def count_of(self, part: bytes) -> int:
        """How many records a part has; 0 where it has not been read to its end."""
        place = position(self.part, part)
        return 0 if place is None else int(self.count[place])


class Tables:
    """The tables of one store."""

    def __init__(self, path: str, catalog: Catalog, create: bool = False) -> None:
        self.path = path
        self.store = open_store(catalog, path, create)
        self._open: dict[str, Any] = {}
        self._appends: dict[str, int] = {}

    def table(self, name: str, columns: Mapping[str, str] | None = None, made_by: str = "") -> Any:
        """A side table; None where there is none, unless `made_by` says that it shall be made."""
        if name not in self._open:
            table = self.store.side_table(name, columns or COLUMNS[name], made_by)
            if table is None:
                return None
            self._open[name] = table
        return self._open[name]

    def append(
        self, name: str, table: Any, columns: Mapping[str, str] | None = None, made_by: str = "lens_curate"
    ) -> None:
        """Add the rows of an Arrow table; all of them appear, or none. Raises WriteError."""
        if table.num_rows:
            self._appends[name] = self._appends.get(name, 0) + 1
            self.store.append(self.table(name, columns, made_by), table)

    def compact(self) -> None:
        """Join the pieces of tables that this run has grown often."""
        for name, count in self._appends.items():
            if count >= COMPACT_AFTER:
                self.store.compact(self.table(name))
        self._appends.clear()

    def batches(self, name: str, *columns: str) -> Iterator[Any]:
        """These columns of a side table, and `_rowid`, a few thousand rows at a time; nothing where there is none."""
        table = self.table(name)
        if table is not None:
            yield from table.search().select(list(columns)).with_row_id(True).to_batches(batch_size=1024)

    def parts(self) -> PartIndex:
        """The parts that have been read to their end."""
        parts, stamps, counts = [np.zeros(0, "S16")], [np.zeros(0, "S16")], [np.zeros(0, np.int32)]
        for batch in self.batches(PARTS, "part", "stamp", "count"):
            parts.append(hex_array(batch["part"].to_pylist(), 16))
            stamps.append(np.array([stamp_digest(stamp) for stamp in batch["stamp"].to_pylist()], "S16"))
            counts.append(np.array(batch["count"].to_pylist(), np.int32))
        part, stamp, count = np.concatenate(parts), np.concatenate(stamps), np.concatenate(counts)
        last = _last_of_each(part)
        order = last[np.argsort(part[last])]
        return PartIndex(part[order], stamp[order], count[order])

    def rows(self, name: str, numbers: Sequence[int], *columns: str) -> dict[int, dict[str, Any]]:
        """These columns of the rows with these `_rowid`, by row id."""
        if not len(numbers):
            return {}
        table = self.table(name).take_row_ids(sorted(set(numbers))).select(list(columns)).with_row_id().to_arrow()
        return {row["_rowid"]: row for row in table.to_pylist()}

    def captions(self, identity: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.bool_]]:
        """Captions that were asked for in this way: ids (S32, sorted), their `_rowid`, and whether each is flawed."""
        pieces: list[tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.bool_]]] = [
            (np.zeros(0, "S32"), np.zeros(0, np.int64), np.zeros(0, bool))
        ]
        for batch in self.batches(CAPTIONS, "id", "prompt", "flaw"):
            mine = np.array([prompt == identity for prompt in batch["prompt"].to_pylist()], bool)
            ids, flaws = hex_array(batch["id"].to_pylist(), 32), np.array([bool(f) for f in batch["flaw"].to_pylist()])
            pieces.append((ids[mine], np.array(batch["_rowid"].to_pylist(), np.int64)[mine], flaws[mine]))
        ids, rows, flawed = (np.concatenate(column) for column in zip(*pieces, strict=True))
        last = _last_of_each(ids)
        order = last[np.argsort(ids[last])]
        return ids[order], rows[order], flawed[order]

    def stored_by_curations(self) -> Iterator[tuple[NDArray[np.bytes_], NDArray[np.bytes_], NDArray[np.str_]]]:
        """Ids, keys and sources of pictures that the last run has kept, and so put into the store, in batches. The
        store's own pictures are none of them."""
        for batch in self.batches(VERDICTS, "id", "key", "source", "kept"):
            sources = np.array(batch["source"].to_pylist(), np.str_)
            put = np.array(batch["kept"].to_pylist(), bool) & (sources != OWN)
            ids, keys = hex_array(batch["id"].to_pylist(), 32), hex_array(batch["key"].to_pylist(), 16)
            yield ids[put], keys[put], sources[put]

    def records(self, names: Sequence[str] = (), listed: NDArray[np.bytes_] | None = None) -> RecordArrays:
        """All records of the newest reading of each part; of those that stand twice, the last. `listed`: the parts,
        sorted, that the sources with these names have now; records of their other parts are left out."""
        columns = ("key", "part", "source", "id", "fault", "pixels", "phash", "mirrored", "height", "width",
                   "sharpness", "brief", "dense")  # fmt: skip
        sources: dict[str, int] = {}
        faults: dict[str, int] = {"": 0}
        table = self.table(RECORDS)
        count, at = 0 if table is None else int(table.count_rows()), 0
        # Filled in place: pieces that are joined would be there twice.
        arrays = {name: np.zeros((count, *shape), kind) for name, (kind, *shape) in _ARRAYS.items()}
        for batch in self.batches(RECORDS, *columns):
            for name, values in _arrays(batch, sources, faults).items():
                arrays[name][at : at + batch.num_rows] = values
            at += batch.num_rows
        current = _newest_reading(arrays["part"], self.parts())
        if listed is not None:
            theirs = np.isin(arrays["source"], [number for name, number in sources.items() if name in names])
            current &= (places(listed, arrays["part"]) >= 0) | ~theirs | arrays["in_store"]
        rows = np.flatnonzero(current)
        last = rows[_last_of_each(arrays["key"][rows])]
        if len(last) < count:
            for name in arrays:
                arrays[name] = arrays[name][last]
        release_memory()
        # Digests of pixels are compared with one another alone, for which their numbers do.
        pixels = np.unique(arrays.pop("pixels"), return_inverse=True)[1].astype(np.int32)
        return RecordArrays(sources=tuple(sources), faults=tuple(faults), pixels=pixels, **arrays)

    def scores(self, made: Filter, records: RecordArrays) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int8]]:
        """A filter's numbers for records, by column, NaN where there are none; and for each record 0 where it has been
        scored, 1 where that failed, 2 where it has not been scored."""
        ids = self._score_ids(made, records)
        names = tuple(made.curator.columns)
        order = np.argsort(ids, kind="stable")
        wanted = ids[order]
        values = {name: np.full(len(ids), np.nan, np.float32) for name in names}
        state = np.full(len(ids), 2, np.int8)
        table = self.table(score_table(made), score_columns(names))
        for batch in () if table is None else self.batches(score_table(made), "id", "fault", *names):
            digests = hex_array(batch["id"].to_pylist(), 32)
            first, past = np.searchsorted(wanted, digests), np.searchsorted(wanted, digests, side="right")
            failed = np.array([bool(f) for f in batch["fault"].to_pylist()])
            numbers = [batch[name].to_numpy(zero_copy_only=False) for name in names]
            # A file may stand in several records: each gets the number.
            for step in range(int((past - first).max(initial=0))):
                hit = first + step < past
                places = order[(first + step)[hit]]
                state[places] = failed[hit]
                for name, column in zip(names, numbers, strict=True):
                    values[name][places] = column[hit]
        return values, state

    def _score_ids(self, made: Filter, records: RecordArrays) -> NDArray[np.bytes_]:
        """What a filter's numbers on records are kept under, S32."""
        if not getattr(made.curator, "reads_captions", False):
            return records.id
        order = np.argsort(records.row)
        rows, ids = records.row[order], np.zeros(len(records), "S32")
        for batch in self.batches(RECORDS, "id", "brief", "dense"):
            keys = map(made.score_id, *(batch[name].to_pylist() for name in ("id", "brief", "dense")))
            at = places(rows, np.array(batch["_rowid"].to_pylist(), np.int64))
            ids[order[at[at >= 0]]] = hex_array(list(keys), 32)[at >= 0]
        return ids

    def colours(self, records: RecordArrays, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Grids of colours of records at these places, uint8 [n,8,8,3]."""
        numbers = records.row[places].tolist()
        rows = self.rows(RECORDS, numbers, "colours")
        return grid_array([rows[number]["colours"] for number in numbers])

    def rewrite(self, name: str, made_by: str, batches: Iterable[Sequence[Mapping[str, Any]]]) -> None:
        """Replace a side table by these rows: all of them appear, or the table stays as it was. Raises WriteError."""
        self._open[name] = self.store.rewrite(name, COLUMNS[name], made_by, batches)


def places(ordered: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Where each of `wanted` stands in a sorted array, or -1."""
    if not len(ordered):
        return np.full(len(wanted), -1, np.int64)
    at = np.clip(np.searchsorted(ordered, wanted), 0, len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)


def among(ids: NDArray[np.bytes_], batches: Iterable[NDArray[np.bytes_]]) -> NDArray[np.bool_]:
    """Which of these ids stand in some batch of ids, of which one is held at a time."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    hits = np.zeros(len(ids) + 1, np.int32)  # where runs of equal ids that are hit begin, and where they end
    for batch in batches:
        wanted = np.unique(batch)
        np.add.at(hits, np.searchsorted(ordered, wanted), 1)
        np.add.at(hits, np.searchsorted(ordered, wanted, side="right"), -1)
    mask = np.empty(len(ids), bool)
    mask[order] = np.cumsum(hits[:-1]) > 0
    return mask


def release_memory() -> None:
    """Give what is free back to the system: allocators keep it for themselves, and the peaks of stages would add up."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def steady_memory() -> None:
    """Have arrays placed where their pages go back as soon as they are freed. glibc does so only with arrays larger
    than the largest that was freed before, and puts others among what lasts."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, 256 << 10)


def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def hex_texts(digests: NDArray[np.bytes_]) -> list[str]:
    """The inverse of `hex_array`; "" for one that is all zeros, as of a record without a file."""
    size = digests.dtype.itemsize
    data = np.ascontiguousarray(digests).tobytes()  # an item alone would lose the zeros at its end
    texts = [data[at : at + size].hex() for at in range(0, len(data), size)]
    return [text if text.strip("0") else "" for text in texts]


def short_texts(digests: NDArray[np.bytes_]) -> str:
    """The beginnings of ids as one text, see `parts.short_ids`."""
    return "".join(text[:SHORT] for text in hex_texts(digests))


def stamp_digest(stamp: str) -> bytes:
    return hashlib.blake2b(stamp.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hex_array(texts: Sequence[str], size: int) -> NDArray[np.bytes_]:
    """Hexadecimal texts as an array of `size` bytes each; zeros for an empty one."""
    data = b"".join(bytes.fromhex(text).ljust(size, b"\0")[:size] for text in texts)
    return np.frombuffer(data, f"S{size}")


_ARRAYS: Mapping[str, tuple[Any, ...]] = {  # of `RecordArrays`: types, and sizes of a row; `pixels` is a digest here
    "row": (np.int64,), "key": ("S16",), "source": (np.int32,), "in_store": (bool,), "part": ("S16",), "id": ("S32",),
    "fault": (np.int32,), "pixels": ("S16",), "hashes": (np.uint64, BITS // 64), "mirrored": (np.uint64, BITS // 64),
    "area": (np.int64,), "sharpness": (np.float32,), "brief": (bool,), "dense": (bool,),
}  # fmt: skip


def _arrays(batch: Any, sources: dict[str, int], faults: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Some rows of the table of records as arrays; sources and faults get numbers as they come."""
    columns: dict[str, list[Any]] = {name: batch[name].to_pylist() for name in batch.schema.names}
    parts = columns["part"]
    width = BITS // 8

    def hashes(name: str) -> NDArray[np.uint64]:
        data = b"".join(h if len(h) == width else bytes(width) for h in columns[name])
        return np.frombuffer(data, np.uint64).reshape(-1, BITS // 64)

    sides = [np.array(columns[name], np.int64) for name in ("height", "width")]
    return {
        "row": np.array(columns["_rowid"], np.int64),
        "key": hex_array(columns["key"], 16),
        "source": np.array([sources.setdefault(name, len(sources)) for name in columns["source"]], np.int32),
        "in_store": np.array([part == OWN for part in parts], bool),
        "part": hex_array(["" if part == OWN else part for part in parts], 16),
        "id": hex_array(columns["id"], 32),
        "fault": np.array([faults.setdefault(fault, len(faults)) for fault in columns["fault"]], np.int32),
        "pixels": hex_array(columns["pixels"], 16),
        "hashes": hashes("phash"),
        "mirrored": hashes("mirrored"),
        "area": sides[0] * sides[1],
        "sharpness": np.array(columns["sharpness"], np.float32),
        "brief": np.array([bool(text) for text in columns["brief"]], bool),
        "dense": np.array([bool(text) for text in columns["dense"]], bool),
    }


def _newest_reading(part: NDArray[np.bytes_], read: PartIndex) -> NDArray[np.bool_]:
    """Which records are of the newest reading of their part: as many of the last ones as it has, for a reading writes
    all of them. Of a part that was not read to its end, all."""
    order = np.argsort(part, kind="stable")
    ordered = part[order]
    behind = np.searchsorted(ordered, ordered, side="right") - np.arange(len(ordered))  # 1: the last one
    at = places(read.part, ordered)
    newest = np.ones(len(part), bool)
    if len(read.count):
        newest[order] = (at < 0) | (behind <= read.count[at])
    return newest


def _last_of_each(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """The places of the last row with each key, ascending."""
    _, first = np.unique(keys[::-1], return_index=True)
    return np.sort(len(keys) - 1 - first)


def open_tables(path: str, catalog: Catalog) -> Tables:
    """The tables of a store that a curation has filled. Raises LensError where none has."""
    tables = Tables(path, catalog)
    if tables.table(VERDICTS) is None:
        raise LensError(f"{path}: no curation has filled this store; run `lens data curate RECIPE --output {path}`")
    return tables
