"""The verdicts of a curation, read from its tables: all of them, and every stage's on one picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lens_core.catalog import Catalog
from lens_core.config import structure
from lens_core.types import LensError
from lens_curate import tables as t
from lens_curate.decide import passes
from lens_curate.recipe import CurationSpec, Filter, Limits, build_filters


def verdicts(store: str, catalog: Catalog | None = None) -> Iterator[dict[str, Any]]:
    """The verdict on each record: key, id, source, name, kept, stage, reason, of, distance."""
    tables = t.open_tables(store, catalog or Catalog.installed())
    for batch in tables.batches(t.VERDICTS, *t.COLUMNS[t.VERDICTS]):
        for row in batch.to_pylist():
            yield {name: row[name] for name in t.COLUMNS[t.VERDICTS]}


def explain(store: str, which: str, catalog: Catalog) -> list[str]:
    """Every verdict on at most 64 records with this id, a beginning of it, or this name, as lines."""
    tables = t.open_tables(store, catalog)
    table = tables.table(t.VERDICTS)
    if re.fullmatch("[0-9a-f]{6,64}", which):
        condition = f"starts_with(id, '{which}')"
    else:
        quoted = which.replace("'", "''")
        condition = f"name = '{quoted}'"
    rows = table.search().where(condition).limit(64).to_list()
    spec = structure(CurationSpec, json.loads((table.schema.metadata or {})[b"lens.made_by"]))
    filters = build_filters(spec, catalog)
    lines: list[str] = []
    for row in rows:
        lines += _of_record(tables, spec, filters, row)
    return lines


def _of_record(tables: t.Tables, spec: CurationSpec, filters: list[Filter], row: dict[str, Any]) -> list[str]:
    records = tables.table(t.RECORDS).search().where(f"key = '{row['key']}'").to_list()
    if not records:
        raise LensError(f"{tables.path}: its tables disagree about {row['name']}; run the curation again")
    record = records[-1]
    lines = [
        f"{row['name']} from {row['source']}: {'kept' if row['kept'] else 'dropped by ' + row['stage']}",
        f"  id          {row['id'] or 'none, for it has no file'}",
    ]
    if record["license"]:
        lines.append(f"  license     {record['license']}")
    if record["fault"]:
        return [*lines, f"  decode      {record['fault']}"]
    size = f"{record['width']}x{record['height']} px, {record['format']}, {record['size']:,} bytes"
    lines.append(f"  decode      {size}")
    same = f"the same pixels as {row['of']}, which is kept" if row["stage"] == "exact" else "no equal picture before it"
    lines.append(f"  exact       {same if spec.duplicates.exact else 'not asked for'}")
    for made in filters:
        key = made.score_id(record["id"], record["brief"], record["dense"])
        lines.append(f"  {made.name:11} {_scores(tables, made, key)}")
    if row["stage"] in ("near", "mirrored"):
        lines.append(f"  {row['stage']:11} {row['reason']}; kept instead: {row['of']}")
    elif row["kept"]:
        lines.append("  near        no picture that is kept is near")
    for style in ("brief", "dense"):
        if record[style]:
            lines.append(f"  {style:11} {record[style]!r}, as it came")
    captions = tables.table(t.CAPTIONS)
    if captions is not None and row["id"]:
        for made_caption in captions.search().where(f"id = '{row['id']}'").to_list():
            flaw = f", refused: {made_caption['flaw']}" if made_caption["flaw"] else ""
            lines.append(f"  {made_caption['style']:11} {made_caption['text']!r}, made in "
                         f"{made_caption['attempts']} attempts{flaw}")  # fmt: skip
    if row["reason"]:
        lines.append(f"  verdict     {row['reason']}")
    return lines


def _scores(tables: t.Tables, made: Filter, key: str) -> str:
    table = tables.table(t.score_table(made), t.score_columns(made.curator.columns))
    rows = [] if table is None else table.search().where(f"id = '{key}'").to_list()
    if not rows:
        return "not measured: an earlier stage dropped it"
    row = rows[-1]
    if row["fault"]:
        return f"failed: {row['fault']}"
    return ", ".join(_score(name, float(row[name]), made.keep.get(name)) for name in made.curator.columns)


def _score(name: str, value: float, limits: Limits | None) -> str:
    if limits is None:
        return f"{name} {value:.4g}"
    bounds = [f"{word} {limit:g}" for word, limit in (("min", limits.min), ("max", limits.max)) if limit is not None]
    verdict = "passes" if passes(np.array([value], np.float32), limits)[0] else "FAILS"
    return f"{name} {value:.4g} {verdict} ({', '.join(bounds)})"
