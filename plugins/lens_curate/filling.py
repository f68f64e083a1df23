"""From verdicts to the store: captions for what is kept, rows of the training store, and the table of verdicts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from attrs import field, frozen, mutable
from numpy.typing import NDArray

from lens_core.config import unstructure
from lens_core.io.digests import position
from lens_core.types import ConfigError
from lens_curate import tables as t
from lens_curate.captioner import Caption, Captioner, spend_of
from lens_curate.decide import CAPTION, DECODE, EXACT, KEPT, Verdicts, filter_reason
from lens_curate.progress import Progress
from lens_curate.recipe import CurationSpec

ROWS = 2048  # records whose texts are held at once
INSERT_ROWS, INSERT_BYTES = 4096, 64 << 20  # pictures that are held before they are written
_MADE_BY = "lens_curate"
Images = Callable[[t.RecordArrays, NDArray[np.int64]], Iterator[Any]]


@mutable
class _Captions:
    """The captions of one style that there are: ids, their rows, and whether each is flawed."""

    ids: NDArray[np.bytes_]
    rows: NDArray[np.int64]
    flawed: NDArray[np.bool_]

    def places(self, ids: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Where each of these ids stands, or -1."""
        return t.places(self.ids, ids)


@frozen
class _Put:
    """What curations have put into the store from some sources and no record that is kept stands for: id, key and
    source of each. `others`: ids of what other sources have put there. `totals`: by source, how many it has put."""

    id: NDArray[np.bytes_]
    key: NDArray[np.bytes_]
    source: NDArray[np.str_]
    others: NDArray[np.bytes_]
    totals: Mapping[str, int]

    @classmethod
    def read(cls, tables: t.Tables, kept: NDArray[np.bytes_], names: Sequence[str]) -> Self:
        """`kept`: ids that stay, sorted."""
        mine, others = [(np.zeros(0, "S32"), np.zeros(0, "S16"), np.zeros(0, "U1"))], [np.zeros(0, "S32")]
        totals: Counter[str] = Counter()
        for ids, keys, sources in tables.stored_by_curations():
            lost, ours = t.places(kept, ids) < 0, np.isin(sources, names)
            totals.update(sources[ours].tolist())
            mine.append((ids[lost & ours], keys[lost & ours], sources[lost & ours]))
            others.append(ids[lost & ~ours])
        ids, keys, sources = (np.concatenate(column) for column in zip(*mine, strict=True))
        return cls(ids, keys, sources, np.concatenate(others), totals)


@mutable
class Filler:
    """What is done with the verdicts of one run. `verdicts.stage` changes with captions that fail."""

    tables: t.Tables
    spec: CurationSpec
    captioner: Captioner | None
    records: t.RecordArrays
    verdicts: Verdicts
    added: int = 0
    removed: int = 0
    changed: int = 0
    waiting: int = 0  # captions that were not made: the budget is spent, or the endpoint is down
    trouble: str = ""  # why
    # Ids, sorted, of files that are to be captioned and that no source gives.
    unread: NDArray[np.bytes_] = field(factory=lambda: np.zeros(0, "S32"))
    gone: set[int] = field(factory=set)  # places of records whose file was not found again
    captions: dict[str, _Captions] = field(factory=dict)

    # ---- captions ------------------------------------------------------------------------------------------------

    def caption(self, images: Images, limit: int | None) -> None:
        """Ask for the captions that are lacking, of `limit` pictures at most; each batch is written at once."""
        captioner = self.captioner
        assert captioner is not None
        lacking: dict[bytes, list[str]] = {}
        wanted = np.zeros(len(self.records), bool)
        for style in captioner.styles:
            self._load(style)
            places = np.flatnonzero(self._asks(style))
            places = places[self.captions[style].places(self.records.id[places]) < 0][:limit]
            wanted[places] = True
            for key in t.hex_texts(self.records.id[places]):
                lacking.setdefault(bytes.fromhex(key), []).append(style)
        progress = Progress("captioned", sum(map(len, lacking.values())))
        held: list[tuple[str, bytes, str]] = []
        for table in images(self.records, np.flatnonzero(wanted)) if wanted.any() else ():
            for key, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True):
                held += [(key, image, style) for style in lacking.pop(bytes.fromhex(key), ())]
            while len(held) >= 2 * captioner.concurrency:
                self._ask(captioner, held[: 2 * captioner.concurrency], progress)
                del held[: 2 * captioner.concurrency]
        self._ask(captioner, held, progress)
        self.unread = np.sort(t.hex_array([key.hex() for key in lacking], 32))
        progress.end()
        for style in captioner.styles:
            self._load(style)

    def _asks(self, style: str) -> NDArray[np.bool_]:
        """Records that get a caption of this style."""
        kept = self.verdicts.kept & self.verdicts.ours
        if self.spec.captions is not None and self.spec.captions.only_missing:
            kept &= ~(self.records.brief if style == "brief" else self.records.dense)
        return kept

    def _load(self, style: str) -> None:
        assert self.captioner is not None
        self.captions[style] = _Captions(*self.tables.captions(self.captioner.identity(style)))

    def _ask(self, captioner: Captioner, pictures: list[tuple[str, bytes, str]], progress: Progress) -> None:
        import pyarrow as pa

        rows = []
        for answer in captioner.caption(pictures):
            progress.add(1)
            if isinstance(answer, Caption):
                rows.append({
                    "id": answer.id, "prompt": captioner.identity(answer.style), "style": answer.style,
                    "text": answer.text, "flaw": answer.flaw, "attempts": answer.attempts,
                })  # fmt: skip
            else:
                self.waiting, self.trouble = self.waiting + 1, str(answer)
        columns = t.COLUMNS[t.CAPTIONS]
        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
        self.tables.append(t.CAPTIONS, pa.Table.from_pylist(rows, schema=schema), columns, _MADE_BY)

    def judge_captions(self, preview: bool) -> None:
        """Drop what has no caption, or one that failed its checks. In a preview, which makes few, only the latter."""
        stage, number = self.verdicts.stage, self.verdicts.stages.index(CAPTION)
        kept = self.verdicts.kept & self.verdicts.ours
        stays = self._unread()
        if len(self.unread):  # what was stored before stays as it is until its file is read
            stays &= t.among(self.records.id, (ids for ids, _, _ in self.tables.stored_by_curations()))
        if self.captioner is None:
            stage[kept & ~self.records.brief & ~self.records.dense] = number
            return
        for style in self.captioner.styles:
            wanted = self._asks(style)
            places = self.captions[style].places(self.records.id)
            failed = wanted & (places < 0) & ~stays & (not preview)
            there = wanted & (places >= 0)
            failed[there] = self.captions[style].flawed[places[there]]
            stage[failed] = number

    def _unread(self) -> NDArray[np.bool_]:
        return np.asarray(t.places(self.unread, self.records.id) >= 0)

    # ---- the store -----------------------------------------------------------------------------------------------

    def remove(self, names: Sequence[str], prune: bool, unlisted: Mapping[str, str]) -> None:
        """Remove from the store what an earlier run has put there from the sources with these names, and no record that
        is kept stands for. Comes before the new verdicts are written, for the old ones say what was put there.

        What its source has no more goes with `prune` alone: a disk that is not mounted, a folder that cannot be listed
        and another folder under the same name look alike. Raises ConfigError without it; `unlisted` says what a source
        could not list. A picture whose file cannot be read at the moment stays.
        """
        records, put = self.records, _Put.read(self.tables, np.sort(self.records.id[self.verdicts.kept]), names)
        seen = t.places(np.sort(records.id), put.id) >= 0  # there, and not kept
        listed = t.places(np.sort(records.key), put.key) >= 0
        read = t.places(np.sort(records.key[records.fault == 0]), put.key) >= 0
        drop = np.setdiff1d(put.id[seen | read | ~listed], put.others)
        drop = drop[t.among(drop, self._store_ids())] if len(drop) else drop
        if not prune:
            missing = np.isin(put.id, drop) & ~seen
            for name, total in put.totals.items():
                lost = missing & (put.source == name)
                gone = int((lost & ~listed).sum())
                # A few files that changed are new versions; most of them at once are another folder.
                gone = gone or (int(lost.sum()) if lost.sum() > max(1, total / 2) else 0)
                if gone:
                    step = (
                        f"{unlisted[name]} now: make it readable, and run again"
                        if name in unlisted
                        else "use --prune to remove them, or give this source another `name` to keep them"
                    )
                    raise ConfigError(
                        f"{name}: no longer has {gone:,} of {total:,} pictures that a curation put into the store; "
                        f"{step}"
                    )
        if len(drop):
            self.tables.store.delete(t.hex_texts(drop))
            self.removed = len(drop)
        t.release_memory()

    def _store_ids(self) -> Iterator[NDArray[np.bytes_]]:
        for batch in self.tables.store.batches("id"):
            yield t.hex_array(batch["id"].to_pylist(), 32)

    def _stored(self) -> NDArray[np.bool_]:
        """Records whose file is in the store."""
        return t.among(self.records.id, self._store_ids())

    def fill(self, images: Images) -> None:
        """Add what is kept to the store, and replace captions there. Other pictures in it stay as they are."""
        records, store = self.records, self.tables.store
        there = self._stored()
        self._replace(there & self.verdicts.kept & self.verdicts.ours & ~self._unread())
        places = np.flatnonzero(self.verdicts.kept & self.verdicts.ours & ~there)
        order = places[np.argsort(records.id[places], kind="stable")]
        ids = records.id[order]
        lacking = np.ones(len(order), bool)
        progress = Progress("stored", len(order))
        held: list[dict[str, Any]] = []

        def insert() -> None:
            # Many at a time: every insertion is a version of the store, and its reader remembers all of them.
            if held:
                self.added += store.insert(held)
                progress.add(len(held))
                held.clear()
                t.release_memory()

        size = 0
        for table in images(records, places) if len(places) else ():
            files = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
            at = {key: position(ids, bytes.fromhex(key)) for key in files}
            new = {key: place for key, place in at.items() if place is not None and lacking[place]}
            texts = self.texts([int(order[place]) for place in new.values()])
            held += [{**texts[int(order[place])], "id": key, "image": files[key]} for key, place in new.items()]
            for key, place in new.items():  # the first of the records with this file, which are one row of the store
                past = np.searchsorted(ids, np.array([bytes.fromhex(key)], ids.dtype), side="right")[0]
                lacking[place:past] = False
            size += sum(len(files[key]) for key in new)
            if size >= INSERT_BYTES or len(held) >= INSERT_ROWS:
                insert()
                size = 0
        insert()
        progress.end()
        self.gone = set(order[lacking].tolist())

    def texts(self, places: list[int]) -> dict[int, dict[str, Any]]:
        """The columns of the store, but the file, of records at these places: with the captions that shall be there."""
        numbers = self.records.row[places].tolist()
        records = self.tables.rows(t.RECORDS, numbers, "height", "width", "brief", "dense", "source")
        made: dict[str, dict[int, str]] = {}
        for style, captions in self.captions.items():
            at = captions.places(self.records.id[places])
            rows = self.tables.rows(t.CAPTIONS, captions.rows[at[at >= 0]].tolist(), "text", "flaw")
            made[style] = {
                place: rows[int(captions.rows[where])]["text"]
                for place, where in zip(places, at.tolist(), strict=True)
                if where >= 0 and not rows[int(captions.rows[where])]["flaw"]
            }
        asks = {style: self._asks(style) for style in self.captions}
        texts = {}
        for place, number in zip(places, numbers, strict=True):
            row = {name: value for name, value in records[number].items() if name != "_rowid"}
            new = {style: made[style][place] for style in made if place in made[style] and asks[style][place]}
            texts[place] = {**row, **new}
        return texts

    def _replace(self, target: NDArray[np.bool_]) -> None:
        """Replace captions of stored pictures where they shall be others now."""
        records, store = self.records, self.tables.store
        places = np.flatnonzero(target)
        order = places[np.argsort(records.id[places], kind="stable")]
        ids = records.id[order]
        changed: list[tuple[int, int]] = []  # rows of the store, and the records that they are of
        for batch in store.batches("id", "brief", "dense"):
            rows = batch.to_pylist()
            at = [position(ids, bytes.fromhex(row["id"])) if len(row["id"]) == 64 else None for row in rows]
            texts = self.texts([int(order[place]) for place in at if place is not None])
            for row, place in zip(rows, at, strict=True):
                if place is not None:
                    wanted = texts[int(order[place])]
                    if (row["brief"], row["dense"]) != (wanted["brief"], wanted["dense"]):
                        changed.append((row["_rowid"], int(order[place])))
        for start in range(0, len(changed), 64):
            some = dict(changed[start : start + 64])
            whole = store.rows(list(some), "id", "image", "height", "width", "brief", "dense", "source")
            texts = self.texts(list(some.values()))
            store.replace([
                {k: v for k, v in whole[number].items() if k != "_rowid"}
                | {style: texts[place][style] for style in ("brief", "dense")}
                for number, place in some.items()
            ])  # fmt: skip
        self.changed = len(changed)

    # ---- verdicts ------------------------------------------------------------------------------------------------

    def write_verdicts(self, spec: CurationSpec) -> None:
        self.tables.rewrite(t.VERDICTS, json.dumps(unstructure(spec)), self._rows(self._earlier()))
        t.release_memory()

    def _earlier(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """Verdicts of earlier curations on records that this recipe is not about: keys, sorted, and rows."""
        others = self.records.key[~self.verdicts.ours & ~self.records.in_store]
        keys, rows = [np.zeros(0, "S16")], [np.zeros(0, np.int64)]
        for batch in self.tables.batches(t.VERDICTS, "key") if len(others) else ():
            keys_read = t.hex_array(batch["key"].to_pylist(), 16)
            mine = np.isin(keys_read, others)
            keys.append(keys_read[mine])
            rows.append(np.array(batch["_rowid"].to_pylist(), np.int64)[mine])
        key, row = np.concatenate(keys), np.concatenate(rows)
        order = np.argsort(key)
        return key[order], row[order]

    def _rows(self, earlier: tuple[NDArray[np.bytes_], NDArray[np.int64]]) -> Iterator[list[dict[str, Any]]]:
        """Rows of the table of verdicts, some thousand at a time. The old one is read while they are written."""
        keys, numbers = earlier
        for start in range(0, len(self.records), ROWS):
            places = np.arange(start, min(start + ROWS, len(self.records)))
            old: dict[str, dict[str, Any]] = {}
            if len(keys):
                at = t.places(keys, self.records.key[places])
                records = self.tables.rows(t.VERDICTS, numbers[at[at >= 0]].tolist(), *t.COLUMNS[t.VERDICTS])
                old = {row["key"]: {name: row[name] for name in t.COLUMNS[t.VERDICTS]} for row in records.values()}
            yield self.described(places, old)

    def described(self, places: NDArray[np.int64], earlier: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The verdicts on records at these places, in words."""
        records, verdicts = self.records, self.verdicts
        names = self.tables.rows(t.RECORDS, records.row[places].tolist(), "name", "source")
        of = verdicts.of[places]
        others = dict(zip(of.tolist(), t.hex_texts(records.id[np.maximum(of, 0)]), strict=True))
        keys, ids = t.hex_texts(records.key[places]), t.hex_texts(records.id[places])
        rows = []
        for key, digest, place in zip(keys, ids, places.tolist(), strict=True):
            if key in earlier:
                rows.append(earlier[key])
                continue
            number = int(verdicts.stage[place])
            stage = verdicts.stages[number] if number >= 0 else "other recipe"
            reason = self._reason(place, stage)
            if place in self.gone:
                stage, reason = DECODE, "its file has changed or gone since it was read; run again"
            record = names[int(records.row[place])]
            instead = int(verdicts.of[place])
            rows.append({
                "key": key, "id": digest, "source": record["source"], "name": record["name"], "kept": stage == KEPT,
                "stage": stage, "reason": reason, "of": others[instead] if instead >= 0 else "",
                "distance": int(verdicts.distance[place]),
            })  # fmt: skip
        return rows

    def _reason(self, place: int, stage: str) -> str:
        verdicts = self.verdicts
        if stage == KEPT:
            return ""
        if stage == DECODE:
            return self.records.faults[int(self.records.fault[place])]
        if stage == EXACT:
            return "the same pixels as a picture that is kept"
        if stage == CAPTION:
            return self._caption_reason(place)
        for scores in verdicts.scores:
            if scores.made.name == stage:
                column = int(verdicts.column[place])
                value = float(scores.values[list(scores.made.keep)[column]][place]) if column >= 0 else float("nan")
                return filter_reason(scores.made, column, value)
        if int(verdicts.of[place]) < 0:
            return "of a source that this recipe does not name"
        mirrored = "the mirror image of " if stage == "mirrored" else ""
        return f"near {mirrored}a picture that is kept: {int(verdicts.distance[place])} of 256 bits differ"

    def _caption_reason(self, place: int) -> str:
        for style, captions in self.captions.items():
            if self.captioner is not None:
                at = int(captions.places(self.records.id[[place]])[0])
                if at >= 0 and captions.flawed[at]:
                    row = self.tables.rows(t.CAPTIONS, [int(captions.rows[at])], "flaw", "attempts")
                    answer = row[int(captions.rows[at])]
                    return f"{style} caption: {answer['flaw']}, after {answer['attempts']} attempts"
                if at < 0:
                    return f"no {style} caption yet"
        return "came without a caption, and the recipe makes none"

    @property
    def spend(self) -> dict[str, float]:
        return spend_of(self.captioner.llm) if self.captioner is not None else {}


def trouble_line(filler: Filler) -> str:
    """What to do about captions that were not made, or ""."""
    if not filler.waiting:
        return ""
    return f"{filler.waiting} captions were not made: {filler.trouble}; the same command goes on"
