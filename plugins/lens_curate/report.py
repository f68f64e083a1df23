"""What a curation did, in numbers and pictures: `report.json` and the page `report.html`.

Pictures are thumbnails from the table of records, so a report reads no source.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_core.config import unstructure
from lens_core.io.atomic_files import write_atomic, write_json
from lens_curate import tables as t
from lens_curate.decide import MIRRORED, NEAR, Scores, passes
from lens_curate.filling import Filler, trouble_line
from lens_curate.progress import duration
from lens_curate.recipe import CurationSpec

BINS = 40
SHOWN = 24  # pictures of a contact sheet
PAIRS = 12  # duplicates shown side by side
_LENGTHS = 20_000  # captions whose lengths are counted
_SEED = 0


@frozen
class Report:
    """`data` is what report.json holds; `pictures` what the page shows of it, by section."""

    data: Mapping[str, Any]
    pictures: Mapping[str, Sequence[Mapping[str, Any]]]
    waiting: str = ""  # why the curation is not complete, or ""

    def write(self, folder: Path) -> Path:
        """Write report.json and report.html; the page. Raises WriteError."""
        from lens_curate.page import page

        folder = folder.expanduser()
        write_json(folder / "report.json", self.data)
        html = page(self.data, self.pictures)
        place = folder / "report.html"
        write_atomic(place, lambda path: path.write_text(html, encoding="utf-8", errors="replace"))
        return place

    def __str__(self) -> str:
        d = self.data
        lines = [f"{d['records']:,} records, {d['kept']:,} kept ({d['kept'] / max(1, d['records']):.1%})"]
        lines += [f"{stage['dropped']:10,} dropped by {stage['stage']}" for stage in d["funnel"] if stage["dropped"]]
        stored = d["stored"]
        changes = f"{stored['removed']:,} removed, {stored['changed']:,} with new captions"
        lines.append(f"{stored['added']:,} added to the store, {changes}")
        lines.append(f"{d['read']:,} records read, {duration(d['seconds'])}")
        if d["cost"].get("calls") or d["cost"].get("cached"):
            cost = d["cost"]
            lines.append(
                f"captions: {cost['calls']:,.0f} calls, {cost['cached']:,.0f} from the cache, ${cost['usd']:.2f}"
            )
        return "\n".join([*lines, *([self.waiting] if self.waiting else [])])


def summarize(tables: t.Tables, spec: CurationSpec, filler: Filler, read: int, seconds: float) -> Report:
    """The report of a run whose verdicts are there."""
    records, verdicts = filler.records, filler.verdicts
    ours = verdicts.ours
    data = {
        "recipe": unstructure(spec),
        "records": int(ours.sum()),
        "kept": int((verdicts.kept & ours).sum()),
        "read": read,
        "seconds": round(seconds, 3),
        "funnel": funnel(filler),
        "scores": {s.made.name: _histograms(s, ours & (records.fault == 0)) for s in verdicts.scores},
        "captions": _caption_lengths(filler),
        "stored": {"added": filler.added, "removed": filler.removed, "changed": filler.changed,
                   "gone": len(filler.gone)},
        "duplicates": {"exact": _count(filler, "exact"), "near": _count(filler, NEAR),
                       "mirrored": _count(filler, MIRRORED)},
        "cost": {**filler.spend, "waiting": filler.waiting},
    }  # fmt: skip
    return Report(data, _pictures(tables, filler), trouble_line(filler))


def _count(filler: Filler, stage: str) -> int:
    return int((filler.verdicts.stage == filler.verdicts.stages.index(stage)).sum())


def funnel(filler: Filler) -> list[dict[str, Any]]:
    """For each stage, how many records came to it and how many it dropped, in all and by source."""
    records, verdicts = filler.records, filler.verdicts
    ours = verdicts.ours
    left = {name: int((ours & (records.source == n)).sum()) for n, name in enumerate(records.sources)}
    left = {name: count for name, count in left.items() if count}
    rows = []
    order = _order(filler)
    for stage in order:
        dropped = ours & (verdicts.stage == verdicts.stages.index(stage))
        by = {n: int((dropped & (records.source == i)).sum()) for i, n in enumerate(records.sources) if n in left}
        entered = sum(left.values())
        rows.append({"stage": stage, "entered": entered, "dropped": sum(by.values()), "by_source": by})
        left = {name: count - by[name] for name, count in left.items()}
    rows.append({"stage": "kept", "entered": sum(left.values()), "dropped": 0, "by_source": left})
    return rows


def _order(filler: Filler) -> list[str]:
    """The stages in the order in which they are applied."""
    scores = filler.verdicts.scores
    cheap = [s.made.name for s in scores if not s.made.costly and s.made.keep]
    costly = [s.made.name for s in scores if s.made.costly and s.made.keep]
    return ["decode", "exact", *cheap, NEAR, MIRRORED, *costly, "captions"]


def _histograms(scores: Scores, target: NDArray[np.bool_]) -> dict[str, Any]:
    """Of each column: bins from the first to the 99th percentile and beyond, thresholds, and how many fail."""
    columns = {}
    for name, values in scores.values.items():
        limits = scores.made.keep.get(name)
        known = values[target & np.isfinite(values)].astype(np.float64)
        if not len(known):
            columns[name] = {"count": 0, "bins": [], "low": 0.0, "high": 0.0}
            continue
        low, high = np.quantile(known, [0.005, 0.995]).tolist()
        for limit in () if limits is None else (limits.min, limits.max):
            if limit is not None:
                low, high = min(low, limit), max(high, limit)
        if low == high:
            low, high = low - 0.5, high + 0.5
        bins = np.histogram(np.clip(known, low, high), BINS, (low, high))[0]
        columns[name] = {
            "count": len(known), "low": low, "high": high, "bins": bins.tolist(),
            "median": float(np.median(known)),
            "min": None if limits is None else limits.min, "max": None if limits is None else limits.max,
            "outside": 0 if limits is None else int((~passes(values[target], limits)).sum()),
        }  # fmt: skip
    return {"component": scores.made.component, "version": scores.made.curator.version,
            "failed": int((target & (scores.state == 1)).sum()), "columns": columns}  # fmt: skip


def _caption_lengths(filler: Filler) -> dict[str, Any]:
    """Words of the captions in the store or on their way there, by style, of a sample where there are very many."""
    rng = np.random.default_rng(_SEED)
    places = np.flatnonzero(filler.verdicts.kept & filler.verdicts.ours)
    if len(places) > _LENGTHS:
        places = np.sort(rng.choice(places, _LENGTHS, replace=False))
    words: dict[str, list[int]] = {"brief": [], "dense": []}
    for start in range(0, len(places), 2048):
        for row in filler.texts(places[start : start + 2048].tolist()).values():
            for style in words:
                if row[style]:
                    words[style].append(len(row[style].split()))
    made = {}
    for style, counts in words.items():
        if counts:
            high = max(int(np.quantile(counts, 0.995)), 1)
            bins = np.histogram(np.minimum(counts, high), min(BINS, high + 1), (0, high))[0]
            made[style] = {"count": len(counts), "mean": float(np.mean(counts)), "low": 0, "high": high,
                           "bins": bins.tolist(), "min": None, "max": None}  # fmt: skip
    return made


def _pictures(tables: t.Tables, filler: Filler) -> dict[str, list[dict[str, Any]]]:
    """Sections of thumbnails: what each stage dropped, what passed close to a threshold, pairs of duplicates."""
    verdicts = filler.verdicts
    rng = np.random.default_rng(_SEED)
    chosen: dict[str, list[int]] = {}
    for stage in _order(filler):
        places = np.flatnonzero(verdicts.ours & (verdicts.stage == verdicts.stages.index(stage)))
        if len(places):
            count = PAIRS if stage in (NEAR, MIRRORED, "exact") else SHOWN
            chosen[f"dropped by {stage}"] = rng.choice(places, min(count, len(places)), replace=False).tolist()
    for scores in verdicts.scores:
        for name, limits in scores.made.keep.items():
            places = np.flatnonzero(verdicts.ours & verdicts.kept & np.isfinite(scores.values[name]))
            values = scores.values[name][places]
            margins = [np.abs(values - limit) for limit in (limits.min, limits.max) if limit is not None]
            if len(places):
                nearest = np.argsort(np.min(margins, axis=0), kind="stable")[:SHOWN]
                chosen[f"kept, nearest to the threshold of {scores.made.name}: {name}"] = places[nearest].tolist()
    kept = np.flatnonzero(verdicts.ours & verdicts.kept)
    if len(kept):
        chosen["kept"] = rng.choice(kept, min(SHOWN, len(kept)), replace=False).tolist()
    return {section: _cards(tables, filler, places) for section, places in chosen.items()}


def _cards(tables: t.Tables, filler: Filler, places: list[int]) -> list[dict[str, Any]]:
    records, verdicts = filler.records, filler.verdicts
    others = [int(place) for place in verdicts.of[places] if place >= 0]
    numbers = records.row[[*places, *others]].tolist()
    rows = tables.rows(t.RECORDS, numbers, "name", "source", "thumbnail", "height", "width")
    described = filler.described(np.array(places, np.int64), {})
    cards = []
    for place, words in zip(places, described, strict=True):
        row = rows[int(records.row[place])]
        other = int(verdicts.of[place])
        values = {
            f"{s.made.name}.{name}": float(s.values[name][place])
            for s in verdicts.scores
            for name in (s.made.keep or s.values)
        }
        cards.append({
            "name": row["name"], "source": row["source"], "id": words["id"], "reason": words["reason"],
            "size": f"{row['width']}x{row['height']}", "thumbnail": _data_url(row["thumbnail"]),
            "other": _data_url(rows[int(records.row[other])]["thumbnail"]) if other >= 0 else "", "scores": values,
        })  # fmt: skip
    return cards


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else ""
