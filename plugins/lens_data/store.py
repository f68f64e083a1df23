"""The training store: a LanceDB database, in a folder or on object storage, with one row a picture.

Columns of the table `samples`: id (sha256 of the image file), image (the file, byte for byte), height and width (px,
upright), brief and dense (captions, "" where there is none), source (where it came from).
A store only grows by versions, and a reader keeps the one it opened, so an import does not disturb a running training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from lens_core.io.atomic_files import writing
from lens_core.types import LensError

SCHEMA = 1
"""The version of the store's columns, kept in the table's metadata."""

TABLE = "samples"
_COLUMNS = {
    "id": "string",
    "image": "large_binary",
    "height": "int32",
    "width": "int32",
    "brief": "string",
    "dense": "string",
    "source": "string",
}


def _lancedb() -> ModuleType:
    try:
        import lancedb
    except ImportError as error:
        raise LensError("the training store needs lancedb, which is missing; pip install 'lens-t2i[data]'") from error
    module: ModuleType = lancedb
    return module


def _schema(columns: Mapping[str, str], key: str, value: str) -> Any:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()], metadata={key: value})


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """What goes wrong with the disk inside becomes a WriteError about `path`, in one line; so does Lance's own error,
    which tells the system's as `os error N`."""
    try:
        with writing(Path(path)):
            try:
                yield
            except (RuntimeError, ValueError) as error:
                number = re.search(r"os error (\d+)", str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0][:300]
        raise LensError(f"{path}: cannot be written: {first}; choose another store, or make a new one") from error


def _names(database: Any) -> set[str]:
    names, token = set[str](), None
    while True:
        page = database.list_tables(page_token=token)
        names |= set(page.tables)
        token = page.page_token
        if not token:
            return names


class Store:
    """An open store, at the version that was newest then. `create` makes an empty one where there is none."""

    def __init__(self, path: str, create: bool = False) -> None:
        lancedb = _lancedb()
        self.path = str(path)
        self.schema = _schema(_COLUMNS, "lens.schema", str(SCHEMA))
        missing = LensError(f"{self.path}: holds no training store; fill one with `lens data import`")
        if not create and "://" not in self.path and not Path(self.path).exists():
            raise missing  # connecting would make the folder
        try:
            self._database = lancedb.connect(self.path)
            self.table: Any = self._open(TABLE, self.schema if create else None)
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise LensError(f"{self.path}: cannot be opened as a training store: {first}") from error
        if self.table is None:
            raise missing
        written = (self.table.schema.metadata or {}).get(b"lens.schema", b"none").decode()
        if written != str(SCHEMA):
            raise LensError(f"{self.path}: is a store of schema {written}; this Lens reads {SCHEMA}: import it again")

    def _open(self, name: str, schema: Any) -> Any:
        """The table, made with `schema` where there is none; None without a schema."""
        if name in _names(self._database):
            try:
                return self._database.open_table(name)
            except ValueError as error:
                # A disk that was full when the table was made: its folder is there, and nothing is in it.
                if "was not found" not in str(error):
                    raise
        if schema is None:
            return None
        with _writing(self.path):  # another rank may be making it at this moment
            return self._database.create_table(name, schema=schema, exist_ok=True)

    def side_table(self, name: str, columns: Mapping[str, str], made_by: str) -> Any:
        """Another table of this store; made where `made_by`, which its metadata keeps, is given. None if missing."""
        return self._open(name, _schema(columns, "lens.made_by", made_by) if made_by else None)

    def append(self, table: Any, rows: Any) -> None:
        """Add an Arrow table, or rows, to a side table; all of its rows appear, or none. Raises WriteError."""
        with _writing(self.path):
            table.add(rows)

    def compact(self, table: Any) -> None:
        """Join the small pieces of a side table, one for each `append`, into few. Raises WriteError."""
        with _writing(self.path):
            table.optimize(cleanup_older_than=timedelta(hours=1))  # whoever reads an older version may end

    def rewrite(
        self, name: str, columns: Mapping[str, str], made_by: str, batches: Iterable[Sequence[Mapping[str, Any]]]
    ) -> Any:
        """Make a side table of these rows in the place of one that is there; readers see the old one until all of them
        are written. Returns the table. Raises WriteError."""
        import pyarrow as pa

        schema = _schema(columns, "lens.made_by", made_by)
        made = (pa.RecordBatch.from_pylist(list(rows), schema=schema) for rows in batches)
        reader = pa.RecordBatchReader.from_batches(schema, made)
        mode = "overwrite" if name in _names(self._database) else "create"
        with _writing(self.path):
            return self._database.create_table(name, reader, mode=mode)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove the pictures with these ids. Versions that a training run has open keep them. Raises WriteError."""
        with _writing(self.path):
            for start in range(0, len(ids), 1000):
                listed = ", ".join(f"'{key}'" for key in ids[start : start + 1000] if key.isalnum())
                self.table.delete(f"id IN ({listed})")

    def __len__(self) -> int:
        return int(self.table.count_rows())

    @property
    def version(self) -> int:
        return int(self.table.version)

    def at(self, version: int) -> bool:
        """Go to the store as it was at `version`; False if that version is gone."""
        before = self.version
        try:
            self.table.checkout(version)
            return True
        except (OSError, RuntimeError, ValueError):
            self.table.checkout(before)
            return False

    def columns(self, *names: str) -> Any:
        """These columns of every row as an Arrow table; `_rowid`, for `rows`, comes with them."""
        return self.table.search().select(list(names)).with_row_id(True).to_arrow()

    def rows(self, numbers: Sequence[int], *names: str) -> dict[int, dict[str, Any]]:
        """These columns of the rows with these `_rowid`, which must exist, by row id."""
        wanted = sorted(set(numbers))  # Lance answers in an order of its own
        rows = self.table.take_row_ids(wanted).select(list(names)).with_row_id().to_arrow().to_pylist()
        return {row["_rowid"]: row for row in rows}

    def batches(self, *names: str) -> Iterator[Any]:
        """These columns of every row, and `_rowid`, a few thousand rows at a time."""
        yield from self.table.search().select(list(names)).with_row_id(True).to_batches(batch_size=4096)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append new rows; all of them appear, or none. Raises WriteError."""
        import pyarrow as pa

        with _writing(self.path):
            self.table.add(pa.Table.from_pylist(list(rows), schema=self.schema))

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Append those rows whose ids are not there, also where another process has written since this store was
        opened; how many they were. Raises WriteError."""
        import pyarrow as pa

        with _writing(self.path):
            new = pa.Table.from_pylist(list(rows), schema=self.schema)
            before, newest = self.version, int(self._database.open_table(TABLE).version)
            if newest == before and "://" not in self.path:
                self.table.add(new)  # nobody has, and none can: an import locks a store on a disk
                return len(new)
            self.table.checkout_latest()
            return int(self.table.merge_insert("id").when_not_matched_insert_all().execute(new).num_inserted_rows)

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Overwrite the rows with the same ids. Raises WriteError."""
        import pyarrow as pa

        with _writing(self.path):
            new = pa.Table.from_pylist(list(rows), schema=self.schema)
            self.table.merge_insert("id").when_matched_update_all().execute(new)
