"""One curation: sources -> records and scores -> verdicts -> captions -> the training store, with a report.

Everything that is known is in the tables of the store (`tables`), written in small steps, so a run may be killed
anywhere and the next one goes on: parts that were read are not read again, scores that are there are not computed
again, captions that are there are not asked for again. Verdicts are computed anew in every run, from the tables alone.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lens_core.catalog import Catalog
from lens_core.io.atomic_files import WriteError
from lens_core.io.digests import position
from lens_core.io.locks import locked
from lens_core.types import ConfigError
from lens_curate import decide as deciding
from lens_curate import tables as t
from lens_curate.captioner import Captioner
from lens_curate.decide import Scores, Verdicts
from lens_curate.engine import engine
from lens_curate.filling import Filler
from lens_curate.parts import Part
from lens_curate.progress import Progress
from lens_curate.recipe import CurationSpec, Filter, build_filters
from lens_curate.report import Report, summarize
from lens_curate.sources import NamedSource, StoreSource, build_sources
from lens_curate.worker import Answer, PartTask, dump_task

TASK = 64  # pictures of a task, where a part has fewer
FLUSH_ROWS = 8192
FLUSH_SECONDS = 5.0
_MADE_BY = "lens_curate"


def curate(
    spec: CurationSpec,
    store: str | Path,
    *,
    runner: str = "native",
    workers: int | None = None,
    preview: int | None = None,
    prune: bool = False,
    catalog: Catalog | None = None,
) -> Report:
    """Fill the training store at `store` by a recipe, or go on with it; the report of what was kept and dropped.

    With `preview`, a sample of so many pictures is curated into a store that is thrown away, and `store` is not
    touched. Pictures that curations put into the store, and that their sources have no more, are removed with `prune`
    alone; without it ConfigError is raised before anything is removed. It is raised, too, for a recipe that cannot run,
    before a picture is read; LockedError where another process writes to the store; WriteError where the disk is full,
    after which the same call goes on.
    """
    catalog = catalog or Catalog.installed()
    t.steady_memory()
    if preview is not None:
        with tempfile.TemporaryDirectory(prefix="lens-preview-") as folder:
            # Captions of a preview are kept where a later run finds them.
            return _Curation(spec, str(Path(folder) / "store"), runner, workers, catalog, str(store)).run(preview)
    local = "://" not in str(store)
    with locked(Path(store), "store") if local else nullcontext():
        return _Curation(spec, str(store), runner, workers, catalog, str(store)).run(prune=prune)


class _Curation:
    """One run. Everything that a recipe names is checked when it is built, before the store is made."""

    def __init__(
        self, spec: CurationSpec, store: str, runner: str, workers: int | None, catalog: Catalog, caption_store: str
    ) -> None:
        self.spec, self.store, self.catalog = spec, store, catalog
        self.id = uuid.uuid4().hex[:16]
        self.filters: list[Filter] = build_filters(spec, catalog)
        self.sources: list[NamedSource] = build_sources(spec.sources, catalog)
        self.names = [source.name for source in self.sources]
        self.listed = np.zeros(0, "S16")  # the parts that the sources have, sorted
        self.unlisted: dict[str, str] = {}  # by source, what it could not list
        self.captioner = None if spec.captions is None else Captioner(spec.captions, catalog, caption_store)
        for source in self.sources:
            _check_source(source, store, caption_store)
        for made in self.filters:
            if hasattr(made.curator, "prepare"):
                made.curator.prepare()
        self.engine = engine(runner, spec, store, workers)
        self.begun = time.monotonic()
        self.tables = t.Tables(store, catalog, create=True)
        self.cheap = tuple(n for n, made in enumerate(self.filters) if not made.costly)

    def run(self, preview: int | None = None, *, prune: bool = False) -> Report:
        wanted, pending = self._planned(preview, prune)
        self._hash_own()
        read = self._read(wanted, pending)
        records = self._records()
        verdicts = self._decided(records, costly=False)
        if len(self.cheap) < len(self.filters):
            verdicts = self._decided(records, costly=True)
        # Half of what is held of a record is there for the duplicates, and nothing reads it after them.
        columns = ("hashes", "mirrored", "pixels", "area", "sharpness")
        records = evolve(records, **{name: getattr(records, name)[:0].copy() for name in columns})
        t.release_memory()
        filler = Filler(self.tables, self.spec, self.captioner, records, verdicts)
        if self.captioner is not None:
            filler.caption(self._images, limit=None if preview is None else 20)
        filler.judge_captions(preview=preview is not None)
        if preview is None:
            filler.remove(self.names, prune, self.unlisted)
        filler.write_verdicts(self.spec)
        if preview is None:
            filler.fill(self._images)
        if filler.gone:
            filler.write_verdicts(self.spec)
        report = summarize(self.tables, self.spec, filler, read, time.monotonic() - self.begun)
        del records, verdicts, filler
        t.release_memory()
        self.tables.compact()  # last, for it gives rows other numbers
        return report

    # ---- reading and scoring -------------------------------------------------------------------------------------

    def _listed(self) -> Iterator[tuple[int, NamedSource, Part, bytes]]:
        for number, source in enumerate(self.sources):
            for part in source.source.parts():
                yield number, source, evolve(part, run=self.id), bytes.fromhex(source.digest(part))

    def _records(self) -> t.RecordArrays:
        return self.tables.records(self.names, self.listed)

    def _planned(self, preview: int | None, prune: bool) -> tuple[Callable[[], Iterator[PartTask]], tuple[int, int]]:
        """What has not been read, as a function that lists it; and of that, the pictures of parts that know how many
        they have, and the parts that do not. Fills `listed`."""
        read = self.tables.parts()
        digests, pending, silent = bytearray(), [0, 0], set(self.names)

        def tasks(first: bool) -> Iterator[PartTask]:
            for number, source, part, digest in self._listed():
                if first and prune and part.retry:
                    raise ConfigError(
                        f"{source.name}: {part.key} is an {part.fault} now, and --prune would remove what was in it; "
                        "make it readable, delete it if it is a broken link, or leave --prune out"
                    )
                if first:
                    if part.retry:
                        self.unlisted.setdefault(source.name, f"{part.key} is an {part.fault}")
                    digests.extend(digest)
                    silent.discard(source.name)
                if not read.has(digest, f"{source.identity} {part.stamp}"):
                    if first:
                        pending[0 if part.count else 1] += part.count or 1
                    yield PartTask(number, part, True, self.cheap, earlier=read.count_of(digest))

        wanted: Callable[[], Iterator[PartTask]]
        if preview is not None:
            sample = list(_sample(tasks(True), preview))
            wanted, pending = lambda: iter(sample), [preview, 0]
        else:
            for _ in tasks(True):
                pass
            wanted = lambda: tasks(False)  # noqa: E731
        self.listed = np.sort(np.frombuffer(bytes(digests), "S16"))
        for _, _, sources in self.tables.stored_by_curations() if silent and not prune else ():
            for name in silent.intersection(sources.tolist()):
                raise ConfigError(
                    f"{name}: has no picture any more, and {self.store} has pictures from it; check the path of this "
                    "source, or use --prune, which removes them"
                )
        return wanted, (pending[0], pending[1])

    def _read(self, wanted: Callable[[], Iterator[PartTask]], pending: tuple[int, int]) -> int:
        """Read what has not been read, and score it by all filters that are not costly; then score what a new filter
        has not seen. How many records were read."""
        progress = Progress("read", pending[0])
        self._commit(self.engine(_grouped(wanted())), progress, pending[1])
        progress.end()
        records = self._records()
        self._score(records, [self.filters[n] for n in self.cheap], np.ones(len(records), bool))
        return progress.done

    def _hash_own(self) -> None:
        """Hash the pictures of the store that no curation has put there, and that are not hashed yet."""
        if not len(self.tables.store):
            return
        records = self.tables.records()
        put = [ids for ids, _, _ in self.tables.stored_by_curations()]
        known = np.sort(np.concatenate([records.id[records.in_store], *put]))
        del records, put
        present = t.own_source(self.store, self.catalog)

        def tasks() -> Iterator[PartTask]:
            for batch in self.tables.store.batches("id"):
                ids = t.hex_array(batch["id"].to_pylist(), 32)
                new = t.places(known, ids) < 0
                rows = np.array(batch["_rowid"].to_pylist(), np.int64)[new].tolist()
                for start in range(0, len(rows), TASK):
                    some = rows[start : start + TASK]
                    yield PartTask(-1, Part(str(some[0]), present.identity, len(some), {"rows": some}))

        progress = Progress("read from the store")
        self._commit(self.engine(_grouped(tasks())), progress, 0)
        progress.end()

    def _score(self, records: t.RecordArrays, filters: Sequence[Filter], target: NDArray[np.bool_]) -> None:
        """Score the targets that a filter has not scored, in one reading of their parts."""
        lacking: dict[int, NDArray[np.bool_]] = {}
        ours = target & (records.fault == 0) & ~records.in_store
        for made in filters:
            state = self.tables.scores(made, records)[1]
            if (without := ours & (state == deciding.UNSCORED)).any():
                lacking[self.filters.index(made)] = without
        if not lacking:
            return
        any_of = np.logical_or.reduce(list(lacking.values()))

        def task(number: int, part: Part, places: NDArray[np.int64]) -> PartTask:
            which = tuple(n for n, without in lacking.items() if without[places].any())
            return PartTask(number, part, False, which, t.short_texts(records.id[places]))

        progress = Progress("scored", int(any_of.sum()))
        # A judge has one budget, so it is asked in this process.
        costly = all(made.costly for made in filters)
        run = engine("serial", self.spec, self.store) if costly else self.engine
        self._commit(run(_grouped(self._tasks(records, np.flatnonzero(any_of), task))), progress, 0)
        progress.end()

    def _tasks(
        self,
        records: t.RecordArrays,
        places: NDArray[np.int64],
        task: Callable[[int, Part, NDArray[np.int64]], PartTask],
    ) -> Iterator[PartTask]:
        """A task for each part that holds some of these records, with the places of those."""
        order = places[np.argsort(records.part[places], kind="stable")]
        parts, starts = np.unique(records.part[order], return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        for number, _, part, digest in self._listed():
            at = position(parts, digest)
            if at is not None:
                yield task(number, part, order[starts[at] : ends[at]])

    def _images(self, records: t.RecordArrays, places: NDArray[np.int64]) -> Iterator[Any]:
        """Arrow tables (id, image) of the files of these records, read from their sources again."""

        def task(number: int, part: Part, some: NDArray[np.int64]) -> PartTask:
            return PartTask(number, part, False, (), None, t.short_texts(records.id[some]))

        for answer in self.engine(_grouped(self._tasks(records, places, task))):
            if answer.kind == "images":
                yield t.load(answer.body)

    def _decided(self, records: t.RecordArrays, costly: bool) -> Verdicts:
        """Verdicts from the scores that there are; with those of costly filters, which score what the others keep."""
        order = [source.name for source in self.sources]
        earlier = self._kept_earlier(records)

        def verdicts(filters: Sequence[Filter]) -> Verdicts:
            scores = []
            for made in filters:
                values, state = self.tables.scores(made, records)
                scores.append(Scores(made, values, state))
            return deciding.decide(
                records, scores, self.spec.duplicates, order, earlier, partial(self.tables.colours, records)
            )

        known = [made for made in self.filters if not made.costly]
        if costly:
            for made in (each for each in self.filters if each.costly):
                self._score(records, [made], verdicts(known).kept)
                known.append(made)
        return verdicts(known)

    def _kept_earlier(self, records: t.RecordArrays) -> NDArray[np.bool_]:
        """Records that an earlier curation has kept, with the files that they had then."""
        kept = np.zeros(len(records), bool)
        order = np.argsort(records.key)
        ordered = records.key[order]
        for ids, keys, _ in self.tables.stored_by_curations():
            at = t.places(ordered, keys)
            same = order[at[at >= 0]]
            kept[same] = records.id[same] == ids[at >= 0]
        return kept

    def _commit(self, answers: Iterable[Answer], progress: Progress, unknown: int) -> None:
        """Write what workers answer: records and scores before the parts that they complete."""
        held: dict[str, list[Any]] = {}
        rows, since, finished = 0, time.monotonic(), [0, 0]
        known = progress.total

        def flush() -> None:
            for kind in sorted(held, key=lambda k: (k == "parts", k)):
                self._append(kind, held[kind])
            held.clear()
            t.release_memory()

        try:
            for answer in answers:
                table = t.load(answer.body)
                held.setdefault(answer.kind, []).append(table)
                rows += table.num_rows
                if answer.kind == "parts" and unknown:
                    # How many pictures a tar has is known at its end: the others are taken to have as many.
                    finished = [finished[0] + table.num_rows, finished[1] + sum(table["count"].to_pylist())]
                    progress.total = known + unknown * finished[1] // max(1, finished[0])
                if answer.kind == "records" or (answer.kind.startswith("scores") and progress.what == "scored"):
                    progress.add(table.num_rows)
                if rows >= FLUSH_ROWS or time.monotonic() - since > FLUSH_SECONDS:
                    flush()
                    rows, since = 0, time.monotonic()
            flush()
        except WriteError as error:
            raise WriteError(f"{error}. What was written before is kept; the same command goes on") from error

    def _append(self, kind: str, some: Sequence[Any]) -> None:
        import pyarrow as pa

        table = pa.concat_tables(some)
        if kind.startswith("scores"):
            made = self.filters[int(kind.split()[1])]
            columns = t.score_columns(made.curator.columns)
            self.tables.append(t.score_table(made), table, columns, made.identity)
        else:
            name = {"records": t.RECORDS, "parts": t.PARTS}[kind]
            self.tables.append(name, table, t.COLUMNS[name], _MADE_BY)


def _check_source(source: NamedSource, *stores: str) -> None:
    source.source.check()
    if source.name == t.OWN:
        raise ConfigError(f"a source is called {t.OWN!r}, which names the store's own pictures; give it another `name`")
    read = source.source
    if isinstance(read, StoreSource) and any(_same(read.config.path, store) for store in stores):
        raise ConfigError(f"{read.config.path}: is both a source and the output; curate it into another store")


def _same(first: str, second: str) -> bool:
    return first == second or ("://" not in first + second and Path(first).resolve() == Path(second).resolve())


def _grouped(tasks: Iterable[PartTask]) -> Iterator[str]:
    """Tasks of about TASK pictures, as text. A part whose pictures are not counted is one alone."""
    held: list[PartTask] = []
    pictures = 0
    for task in tasks:
        count = task.part.count or TASK
        if held and pictures + count > TASK:
            yield dump_task(held)
            held, pictures = [], 0
        held.append(task)
        pictures += count
    if held:
        yield dump_task(held)


def _sample(tasks: Iterable[PartTask], count: int, seed: int = 0) -> Iterator[PartTask]:
    """Parts with about `count` pictures, every part as likely; of parts with many pictures the first few are read."""
    rng = np.random.default_rng(seed)
    chosen: list[PartTask] = []
    for number, task in enumerate(tasks):  # a reservoir: what is listed is not held
        if len(chosen) < count:
            chosen.append(task)
        elif (place := int(rng.integers(number + 1))) < count:
            chosen[place] = task
    left = count
    for place, task in enumerate(chosen):
        share = max(1, left // (len(chosen) - place))
        limit = min(share, task.part.count) if task.part.count else share
        left -= limit
        yield evolve(task, limit=limit)
        if left <= 0:
            return
