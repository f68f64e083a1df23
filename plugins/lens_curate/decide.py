"""Which pictures are kept: a pure function of their hashes, scores and captions, and of the recipe's thresholds.

Stages in order: decode, exact duplicates, filters, near duplicates, costly filters, captions. A picture is dropped by
the first that it fails. Near duplicates come after the filters, so that the best of a cluster is one that passed them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from lens_curate.duplicates import Colours, equal_groups, near_duplicates
from lens_curate.recipe import Duplicates, Filter, Limits
from lens_curate.tables import RecordArrays

KEPT = ""
DECODE, EXACT, NEAR, MIRRORED, CAPTION = "decode", "exact", "near", "mirrored", "captions"
FAILED, UNSCORED = 1, 2  # as `Tables.scores` numbers them


@frozen
class Scores:
    """A filter's numbers for every record; `state` is 0 where there are some, FAILED or UNSCORED."""

    made: Filter
    values: Mapping[str, NDArray[np.float32]]
    state: NDArray[np.int8]


@frozen
class Verdicts:
    """The verdict on each record. `stage` is the number in `stages` of the one that dropped it; 0 is kept."""

    stages: tuple[str, ...]
    ours: NDArray[np.bool_]  # records of the recipe's sources; all others are as earlier curations left them
    stage: NDArray[np.int16]
    column: NDArray[np.int16]  # of a filter, the number of the column that decided; -1 where it failed to measure
    of: NDArray[np.int64]  # the record that is kept instead, or -1
    distance: NDArray[np.int32]  # bits to it
    scores: tuple[Scores, ...] = field(factory=tuple)

    @property
    def kept(self) -> NDArray[np.bool_]:
        return np.asarray(self.stage == 0)


def decide(
    records: RecordArrays,
    scores: Sequence[Scores],
    duplicates: Duplicates,
    order: Sequence[str],
    earlier: NDArray[np.bool_],
    colours: Colours | None = None,
) -> Verdicts:
    """Verdicts on all records, without captions. `order`: the recipe's sources. `earlier`: records that a curation of
    this store has kept. Those of other sources stay, as do the store's own pictures, and new ones are compared with
    them; those of the recipe's sources pass the filters that could not be tried on them, for their source cannot be
    read now. `colours`: the grids of records at these places."""
    ours = np.isin(records.source, [n for n, name in enumerate(records.sources) if name in order]) & ~records.in_store
    incumbent = records.in_store | (earlier & ~ours)
    stages = (KEPT, DECODE, EXACT, *(s.made.name for s in scores), NEAR, MIRRORED, CAPTION)
    count = len(records)
    stage, column = np.zeros(count, np.int16), np.zeros(count, np.int16)
    of, distance = np.full(count, -1, np.int64), np.zeros(count, np.int32)
    rank = ranks(records, order, incumbent)
    stage[ours & (records.fault != 0)] = stages.index(DECODE)
    present = (ours | incumbent) & (records.fault == 0)
    if duplicates.exact:
        _drop_equal(records, rank, ours & present, present, stage, of, stages.index(EXACT))
    for each in scores:
        if not each.made.costly:
            _apply(each, ours & present & (stage == 0), earlier, stage, column, stages.index(each.made.name))
    if duplicates.distance is not None:
        places = np.flatnonzero(present & (stage == 0))
        mirrored = records.mirrored if duplicates.mirrored == "drop" else None
        ranked = np.empty(len(places), np.int64)
        ranked[np.argsort(rank[places])] = np.arange(len(places))
        grids = None if colours is None else lambda some: colours(places[some])
        instead, bits, flipped = near_duplicates(
            records.hashes, mirrored, ranked, duplicates.distance, grids, duplicates.colour_distance, places
        )
        drop = (instead >= 0) & ours[places]
        stage[places[drop]] = np.where(flipped[drop], stages.index(MIRRORED), stages.index(NEAR))
        of[places[drop]], distance[places[drop]] = places[instead[drop]], bits[drop]
    for each in scores:
        if each.made.costly:
            _apply(each, ours & present & (stage == 0), earlier, stage, column, stages.index(each.made.name))
    # What no stage of this recipe is about, and no other curation has kept, is not kept.
    stage[~ours & ~incumbent] = -1
    return Verdicts(stages, ours, stage, column, of, distance, tuple(scores))


def ranks(records: RecordArrays, order: Sequence[str], incumbent: NDArray[np.bool_]) -> NDArray[np.int64]:
    """0 for the record that is preferred to all others, and so on: those already in the store, then most pixels, then
    the sharpest, then the source that stands first in the recipe. The key decides where nothing else does."""
    places = {name: place for place, name in enumerate(order)}
    source = np.array([places.get(name, len(places)) for name in records.sources], np.int64)
    by = np.lexsort((
        records.key, source[records.source] if len(source) else records.source, -records.sharpness, -records.area,
        ~incumbent,
    ))  # fmt: skip
    rank = np.empty(len(records), np.int64)
    rank[by] = np.arange(len(records))
    return rank


def passes(values: NDArray[np.float32], limits: Limits) -> NDArray[np.bool_]:
    """Which numbers are within limits; NaN never is."""
    inside = np.isfinite(values)
    # A float32 is compared with the limit as it is written, so that a score of 0.3 passes a limit of 0.3.
    if limits.min is not None:
        inside &= values >= np.float32(limits.min)
    if limits.max is not None:
        inside &= values <= np.float32(limits.max)
    return inside


def filter_reason(made: Filter, column: int, value: float) -> str:
    """Why a filter drops a picture, in words."""
    if column < 0:
        return f"{made.name} could not measure it"
    name = list(made.keep)[column]
    limits = made.keep[name]
    if limits.min is not None and value < np.float32(limits.min):
        return f"{name} is {value:.4g}, below {limits.min:g}"
    return f"{name} is {value:.4g}, above {limits.max:g}"


def _drop_equal(
    records: RecordArrays,
    rank: NDArray[np.int64],
    ours: NDArray[np.bool_],
    present: NDArray[np.bool_],
    stage: NDArray[np.int16],
    of: NDArray[np.int64],
    number: int,
) -> None:
    places = np.flatnonzero(present)
    instead = equal_groups(records.pixels[places], rank[places])
    drop = (instead >= 0) & ours[places]
    stage[places[drop]], of[places[drop]] = number, places[instead[drop]]


def _apply(
    each: Scores,
    alive: NDArray[np.bool_],
    earlier: NDArray[np.bool_],
    stage: NDArray[np.int16],
    column: NDArray[np.int16],
    number: int,
) -> None:
    if not each.made.keep:
        return
    alive = alive & ~(earlier & (each.state == UNSCORED))
    failed = alive & (each.state != 0)
    stage[failed], column[failed] = number, -1
    for place, (name, limits) in enumerate(each.made.keep.items()):
        out = alive & (stage == 0) & ~passes(each.values[name], limits)
        stage[out], column[out] = number, place
