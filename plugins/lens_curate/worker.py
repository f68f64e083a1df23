"""What runs in each process of a curation: reads parts of sources, decodes, hashes and scores their pictures.

A task and an answer are plain: JSON text in, Arrow tables out. Whatever engine carries them, the same task gives the
same answer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from attrs import evolve, field, frozen, mutable
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.config import structure, unstructure
from lens_core.io.captions import printable, read_captions
from lens_core.io.images import ImageError, read_raw, to_rgb
from lens_core.io.readers import one_line
from lens_core.io.sources import SourceItem, broken
from lens_core.types import LensError, Record
from lens_curate import tables
from lens_curate.hashes import colour_grid, perceptual_hash, pixel_digest
from lens_curate.measures import sharpness
from lens_curate.parts import SHORT, Part, short_ids, text_digest
from lens_curate.recipe import CurationSpec, Filter, build_filters
from lens_curate.sources import NamedSource, build_sources

BATCH = 32  # pictures that are scored together
PIXELS = 24 << 20  # of the pictures that are held decoded, beyond one
BODY = 16 << 20  # bytes of pictures in an answer, beyond one
NOT_COUNTED = ("another picture of a sample", "a link in an archive")


@frozen
class PartTask:
    """A part to read: whether its records are wanted, which filters' scores, which pictures' files."""

    source: int  # number in the recipe; -1: the store that is filled
    part: Part
    records: bool = True
    filters: tuple[int, ...] = ()
    only: str | None = None  # pictures to score, as in `short_ids`; None: all
    images: str = ""  # pictures whose files are wanted, as in `short_ids`
    limit: int | None = None  # pictures that are read at most, for a preview
    # Numbers of pictures, from 1 on, that have killed a process, with the reason: they are not decoded, see `isolated`.
    fatal: Mapping[int, str] = field(factory=dict)
    # The number of the picture at whose reading the source itself did, and the reason; the part ends before it.
    unreadable: tuple[int, str] | None = None
    earlier: int = 0  # records of the part that count and were read when it was another


@frozen
class Answer:
    """A table of `kind`: "records", "parts", "images", or "scores N" of filter N."""

    kind: str
    body: bytes  # an Arrow table, as IPC


def dump_task(parts: Sequence[PartTask]) -> str:
    return json.dumps([unstructure(part) for part in parts])


def load_task(text: str) -> list[PartTask]:
    return [structure(PartTask, {**each, "fatal": {int(n): why for n, why in each["fatal"].items()}})
            for each in json.loads(text)]  # fmt: skip


@mutable
class _Held:
    """What one task has made and not handed on."""

    records: list[tuple[dict[str, Any], Record | None]] = field(factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(factory=dict)
    pixels: int = 0
    bytes: int = 0

    def add(self, kind: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(kind, []).append(row)

    def answers(self) -> Iterator[Answer]:
        # Parts come last: a part counts as read once its records have been written.
        for kind in sorted(self.rows, key=lambda k: (k == "parts", k)):
            yield Answer(kind, tables.dump(kind, self.rows[kind]))
        self.rows.clear()
        self.bytes = 0


class Worker:
    """Runs tasks of one recipe. Weights are loaded when the first picture is scored.

    `batch` pictures are scored together. `note` is called with the number of each picture in its part before it is
    decoded, and with 0 before the next one is read from the source.
    """

    def __init__(
        self,
        spec: CurationSpec,
        store: str,
        catalog: Catalog | None = None,
        batch: int = BATCH,
        note: Callable[[int], None] = lambda number: None,
    ) -> None:
        catalog = catalog or Catalog.installed()
        self.batch, self.note = batch, note
        self.spec = spec
        self.sources: list[NamedSource] = build_sources(spec.sources, catalog)
        self.filters: list[Filter] = build_filters(spec, catalog)
        self.stored_source = tables.own_source(store, catalog)

    def source(self, number: int) -> NamedSource:
        return self.stored_source if number < 0 else self.sources[number]

    def run(self, tasks: Sequence[PartTask]) -> Iterator[Answer]:
        held = _Held()
        for task in tasks:
            yield from self._read(task, held)
        yield from held.answers()

    def _read(self, task: PartTask, held: _Held) -> Iterator[Answer]:
        source = self.source(task.source)
        digest = source.digest(task.part)
        seen: dict[str, int] = {}
        wanted, sent, count, retry = short_ids(task.images), set[str](), 0, False
        for count, item in enumerate(self._items(source, task), start=1):
            retry |= item.retry
            again = seen[item.name] = seen.get(item.name, 0) + 1
            name = item.name if again == 1 else f"{item.name} ({again})"
            if item.retry and task.earlier:  # beside the record that there is, which stays
                name = f"{name}, as it is now"
            if wanted and item.image is not None:
                key = hashlib.sha256(item.image).hexdigest()
                if key[:SHORT] in wanted and key not in sent:
                    sent.add(key)
                    held.add("images", {"id": key, "image": item.image})
                    held.bytes += len(item.image)
            if count in task.fatal:
                self._give_up(task, held, self._row(source, digest, name, item), task.fatal[count])
            elif task.records or task.filters:
                self.note(count)
                row, record = self._record(source, digest, name, item)
                held.records.append((row, record))
                held.pixels += record.pixels.size // 3 if record is not None else 0
            if count != task.limit and (len(held.records) >= self.batch or held.pixels >= PIXELS or held.bytes >= BODY):
                self._score(task, held)
                yield from held.answers()
            if count == task.limit:
                break
            self.note(0)
        self._score(task, held)
        if task.records and not retry:
            held.add("parts", {"part": digest, "stamp": f"{source.identity} {task.part.stamp}", "count": count})
        elif task.records and task.earlier:  # not read to its end: what was read before counts beside what is new
            held.add("parts", {"part": digest, "stamp": tables.UNFINISHED, "count": task.earlier + count})

    def _give_up(self, task: PartTask, held: _Held, row: dict[str, Any], why: str) -> None:
        """A picture that is not tried again: a record with a fault, or, where it has a record, scores with one."""
        if task.records:
            held.add("records", {**row, "fault": why})
            return
        for number in task.filters if task.only is None or row["id"][:SHORT] in short_ids(task.only) else ():
            made = self.filters[number]
            held.add(f"scores {number}", _failed(made, made.score_id(row["id"], row["brief"], row["dense"]), why))

    def _items(self, source: NamedSource, task: PartTask) -> Iterator[SourceItem]:
        """What counts as a picture of a part, in the order of the source."""
        part = task.part
        if part.fault:
            yield SourceItem(part.key, fault=part.fault, retry=part.retry)
            return
        if task.unreadable is not None:
            number, why = task.unreadable
            yield from islice(self._items(source, evolve(task, unreadable=None)), number - 1)
            yield SourceItem(part.key, fault=why)
            return
        try:
            yield from (item for item in source.source.read(part) if item.fault not in NOT_COUNTED)
        except LensError as error:
            yield SourceItem(part.key, fault=one_line(error, 120), retry=True)
        except Exception as error:  # a source of files that strangers wrote may stumble over anything
            yield broken(part.key, error, f"cannot be read ({type(error).__name__})")

    def _row(self, source: NamedSource, part: str, name: str, item: SourceItem) -> dict[str, Any]:
        """The row of a picture that has not been decoded."""
        brief, dense, _ = read_captions(item.captions, source.caption)
        row = tables.record_row(text_digest(source.name, name), part, source, printable(name), brief, dense)
        if item.image is None:
            return {**row, "fault": item.fault or "no picture"}
        return {**row, "id": hashlib.sha256(item.image).hexdigest(), "size": len(item.image)}

    def _record(
        self, source: NamedSource, part: str, name: str, item: SourceItem
    ) -> tuple[dict[str, Any], Record | None]:
        """The row of a picture, and the picture if it can be decoded."""
        row = self._row(source, part, name, item)
        if item.image is None:
            return row, None
        try:
            raw = read_raw(item.image)
            row["format"] = raw.format or ""
            image = to_rgb(raw)
        except ImageError as error:
            return {**row, "fault": error.reason}, None
        data = {"name": name, "source": source.name, "license": source.license, "format": row["format"]}
        record = Record(item.image, np.asarray(image), row["brief"], row["dense"], data)
        return {**row, **self._facts(record, image)}, record

    def _facts(self, record: Record, image: Image.Image) -> dict[str, Any]:
        """What every decoded picture is known by."""
        phash, mirrored = perceptual_hash(record.pixels)
        return {
            "pixels": pixel_digest(record.pixels).hex(),
            "phash": phash,
            "mirrored": mirrored,
            "colours": colour_grid(record.pixels),
            "height": image.height,
            "width": image.width,
            "sharpness": sharpness(record),
            "thumbnail": thumbnail(image, self.spec.thumbnail),
        }

    def _score(self, task: PartTask, held: _Held) -> None:
        """Move what is held decoded to the rows that are handed on."""
        if task.records:
            for row, _ in held.records:
                held.add("records", row)
        only = None if task.only is None else short_ids(task.only)
        pictures = [
            (row, r) for row, r in held.records if r is not None and (only is None or row["id"][:SHORT] in only)
        ]
        for number in task.filters:
            made = self.filters[number]
            for start in range(0, len(pictures), BATCH):
                some = pictures[start : start + BATCH]
                keys = [made.score_id(row["id"], row["brief"], row["dense"]) for row, _ in some]
                for scores in score_batch(made, [record for _, record in some], keys):
                    held.add(f"scores {number}", scores)
        held.records.clear()
        held.pixels = 0


def thumbnail(image: Image.Image, side: int) -> bytes:
    """A small JPEG of a picture, for the report."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BOX, reducing_gap=2.0) if scale < 1 else image
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def score_batch(made: Filter, records: Sequence[Record], ids: Sequence[str]) -> list[dict[str, Any]]:
    """A row of scores for each picture. Where a batch raises, each picture is tried alone; one that raises again, or
    has no finite number, gets its fault."""
    if not records:
        return []
    try:
        columns = _checked(made, made.curator.score(records), len(records))
    except Exception as error:  # a third party's scorer may raise anything; the others go on
        if len(records) == 1:
            fault = f"{type(error).__name__}: {one_line(error, 120)}"
            return [_failed(made, ids[0], fault)]
        return [row for record, key in zip(records, ids, strict=True) for row in score_batch(made, [record], [key])]
    rows = []
    for place, key in enumerate(ids):
        values = {name: column[place] for name, column in columns.items()}
        lost = [name for name, value in values.items() if not np.isfinite(value)]
        rows.append({"id": key, "fault": f"{lost[0]} is not a number" if lost else "", **values})
    return rows


def _failed(made: Filter, key: str, fault: str) -> dict[str, Any]:
    """The row of scores of a picture that could not be scored."""
    return {"id": key, "fault": fault, **dict.fromkeys(made.curator.columns, float("nan"))}


def _checked(made: Filter, columns: Mapping[str, Sequence[float]], count: int) -> Mapping[str, Sequence[float]]:
    for name in made.curator.columns:
        if name not in columns or len(columns[name]) != count:
            raise ValueError(f"{made.component} gave {len(columns.get(name, ()))} numbers {name} for {count} pictures")
    return {name: [float(value) for value in columns[name]] for name in made.curator.columns}
