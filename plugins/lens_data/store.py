"""The training store: a LanceDB database, in a folder or on object storage, with one row a picture.

Columns of the table `samples`: id (sha256 of the image file), image (the file, byte for byte), height and width (px,
upright), brief and dense (captions, "" where there is none), source (where it came from).
A store only grows by versions, and a reader keeps the one it opened, so an import does not disturb a running training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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
            return self._database.open_table(name)
        # Another rank may be making it at this moment.
        return None if schema is None else self._database.create_table(name, schema=schema, exist_ok=True)

    def beside(self, name: str, columns: Mapping[str, str], made_by: str) -> Any:
        """Another table of this store; made where `made_by`, which its metadata keeps, is given. None if missing."""
        return self._open(name, _schema(columns, "lens.made_by", made_by) if made_by else None)

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
        found = self.table.take_row_ids(wanted).select(list(names)).with_row_id().to_arrow().to_pylist()
        return {row["_rowid"]: row for row in found}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append new rows; all of them appear, or none."""
        import pyarrow as pa

        self.table.add(pa.Table.from_pylist(list(rows), schema=self.schema))

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Overwrite the rows with the same ids."""
        import pyarrow as pa

        new = pa.Table.from_pylist(list(rows), schema=self.schema)
        self.table.merge_insert("id").when_matched_update_all().execute(new)
