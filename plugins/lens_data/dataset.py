"""The dataset `store`: batches of one size from a training store. Batch n is a pure function of (store, config, n).
`packed` (packed.py) reads the same pictures in another order.

Each bucket is an endless stream: its pictures in a new order in every pass, pass after pass, cut into global batches.
No picture is dropped at the end of a pass, so a bucket with few pictures has its turn too, only more seldom.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from numpy.typing import NDArray
from torch import Tensor, nn

from lens_core.types import Batch, ConfigError, LensError, TextFeatures
from lens_core.validators import PIXELS, SEED, each, integer, matching, real, text, within
from lens_data import pictures
from lens_data.buckets import LENS_BUCKETS, Buckets, Size, assign
from lens_data.caching import Cache, Latent, encoders, fill, latent_key, text_key
from lens_data.digests import of_ids
from lens_data.store import Store

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

_ORDER, _SLOTS, _CAPTION, _SUBSTITUTE = range(4)  # separate streams of randomness
_ROWS = 4096  # rows of a store that are looked through at once
_TRIES = 9  # pictures tried for one place of a batch before the store is given up


@frozen
class Plan:
    """What a global batch will hold: pictures (indices into the sorted ids), the bucket of each, and who tells its
    dense caption. Once it is handed out, the dataset's state is `after`."""

    number: int
    buckets: NDArray[np.int64]
    members: NDArray[np.int64]
    dense: NDArray[np.bool_]
    after: Mapping[str, int]
    costs: NDArray[np.float64] | None = None  # of each sample, where ranks share by work


@frozen
class Settings:
    """What every dataset over a store can be told."""

    store: str = field(validator=text())  # folder or URI of the training store
    # Groups of (height, width) px, a group for each area.
    buckets: Buckets = field(default=LENS_BUCKETS, validator=each(each(each(PIXELS), at_least=1), at_least=1))
    every_area: bool = False  # show a picture at each area that it fills; False: at the largest only
    max_upscale: float = field(
        default=1.0, validator=real(above=0)
    )  # factor by which a picture may grow to fill a size
    max_crop: float = field(default=0.5, validator=real(at_least=0, below=1))  # share that the crop may cut off
    # Share of samples with the dense caption; the others have the brief one.
    dense_caption_ratio: float = field(default=1.0, validator=within(0, 1))
    seed: int = field(default=0, validator=SEED)
    # Name of a cache that `lens data cache` filled: latents and text features are read instead.
    cache: str = field(default="", validator=matching(r"[\w.-]*", "a name of letters, digits, _ . and -"))
    # Batches that are read ahead, each in a thread of its own.
    prefetch_workers: int = field(default=4, validator=integer(at_least=1, at_most=256))

    def __attrs_post_init__(self) -> None:
        sizes = [size for group in self.buckets for size in group]
        if len(set(sizes)) < len(sizes):
            raise ConfigError("buckets name a size twice; remove one")


class StoreDataset:
    """Pictures of a store in shuffled epochs, all of a batch in one bucket; see `Config`.

    `corrupt` names the pictures that could not be decoded, with the reason; another of the bucket stands in for each.
    """

    @frozen
    class Config(Settings):
        # Samples a step, all ranks together.
        batch: int = field(default=64, validator=integer(at_least=1))

    def __init__(self, config: Any) -> None:
        self.config = config
        self.corrupt: dict[str, str] = {}
        self._done = {"batch": 0}
        self.store = Store(config.store)
        self._cache = Cache(self.store, config.cache) if config.cache else None
        self._read()
        self._tell_what_is_left_out()

    def _read(self) -> None:
        """Sizes of all pictures and who is in which bucket. Sorted by id, so that the order of imports is no matter."""
        count, at = len(self.store), 0
        ids, self._rows = np.empty(count, "S32"), np.empty(count, np.int64)
        heights, widths = np.empty(count, np.int32), np.empty(count, np.int32)
        for batch in self.store.batches("id", "height", "width"):
            part = slice(at, at + batch.num_rows)
            ids[part], self._rows[part] = of_ids(batch["id"].to_pylist()), batch["_rowid"].to_numpy()
            heights[part], widths[part] = batch["height"].to_numpy(), batch["width"].to_numpy()
            at += batch.num_rows
        order = np.argsort(ids)
        ids, self._rows, heights, widths = ids[order], self._rows[order], heights[order], widths[order]
        config = self.config
        self._buckets = assign(
            heights,
            widths,
            config.buckets,
            max_upscale=config.max_upscale,
            max_crop=config.max_crop,
            every_area=config.every_area,
        )
        self._counts = np.array([len(m) for m in self._buckets.members], np.int64)
        digest = hashlib.sha256()
        for start in range(0, count, _ROWS):
            digest.update(ids[start : start + _ROWS].tobytes().hex().encode())
        self._fingerprint = digest.hexdigest()[:16]
        self._order = lru_cache(2 * len(self._counts) + 2)(self._shuffled)
        self._slots = lru_cache(2)(self._shuffled_slots)
        if self._cache is not None:
            lacking, wanted = self._cache.lacking(key for key, _ in self.encodings())
            if lacking:
                raise LensError(
                    f"{config.store}: the cache {config.cache!r} lacks {lacking} of {wanted} latents and texts; "
                    "run `lens data cache` on this recipe"
                )

    def _tell_what_is_left_out(self) -> None:
        config, sizes = self.config, self._buckets.sizes
        fitting = len(self._rows) - sum(self._buckets.left_out.values())
        least = self._least()
        if fitting < least:
            why = "".join(f"; {n} are {reason}" for reason, n in self._buckets.left_out.items())
            raise ConfigError(
                f"{config.store}: {fitting} of {len(self._rows)} pictures fit the buckets, too few for a batch of "
                f"{least}{why}; lower batch, or change buckets, max_upscale or max_crop"
            )
        if self._buckets.left_out:
            why = " and ".join(f"{n} {reason}" for reason, n in self._buckets.left_out.items())
            warnings.warn(f"{config.store}: of {len(self._rows)} pictures, {why} are left out", stacklevel=3)
        empty = [f"{h}x{w}" for (h, w), n in zip(sizes, self._counts, strict=True) if not n]
        if empty:
            warnings.warn(
                f"{config.store}: {len(empty)} of {len(sizes)} buckets have no picture: {', '.join(empty)}",
                stacklevel=3,
            )

    def check_encoders(self, pipeline: LensPipeline, precision: str) -> None:
        """Raise LensError if the cache was made by other encoders, or in another precision, than a run has."""
        if self._cache is not None:
            self._cache.check(encoders(pipeline, precision))

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Endless. Every rank sees its own share of the same global batch."""
        plans = self._plans(world)
        ahead: deque[tuple[Plan, Future[tuple[Batch, dict[str, str]]]]] = deque()
        pool = ThreadPoolExecutor(self.config.prefetch_workers, "store")
        try:
            while True:
                while len(ahead) < self.config.prefetch_workers:
                    plan = next(plans)
                    ahead.append((plan, pool.submit(self._batch, plan, rank, world)))
                plan, reading = ahead.popleft()
                batch, corrupt = reading.result()
                for key, why in corrupt.items():
                    if key not in self.corrupt:
                        self.corrupt[key] = why
                        warnings.warn(f"{self.config.store}: picture {key} is corrupt ({why}); replaced", stacklevel=2)
                self._done = dict(plan.after)
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        return {**self._done, "version": self.store.version, "pictures": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches of `state`, with the pictures that the store had then."""
        if self.store.version != state["version"] and self.store.at(int(state["version"])):
            self._read()
        if self._fingerprint != state["pictures"]:
            raise LensError(
                f"{self.config.store}: holds other pictures than when the run stopped (at version {state['version']}); "
                "bring that store back, or begin a new run"
            )
        self._done = {name: int(state[name]) for name in self._done}

    # ---- which pictures: the schedule -----------------------------------------------------------------------------

    def _rng(self, stream: int, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, stream, *place])

    def _least(self) -> int:
        """Pictures that a batch takes."""
        return int(self.config.batch)

    def _plans(self, world: int) -> Iterator[Plan]:
        """The global batches from here on. Raises ConfigError where so many ranks cannot share them."""
        if self.config.batch % world:
            raise ConfigError(
                f"a batch of {self.config.batch} has no equal shares for {world} ranks; use a multiple of {world}"
            )
        number = self._done["batch"]
        while True:
            yield self._plan(number)
            number += 1

    def _plan(self, number: int) -> Plan:
        epoch, slot = self._place(number)
        bucket, turn = (int(n) for n in self._slots(epoch)[slot])
        batch, count = self.config.batch, int(self._counts[bucket])
        stream = np.arange(turn * batch, (turn + 1) * batch)
        members = np.array([self._order(bucket, p // count)[p % count] for p in stream.tolist()])
        dense = self._rng(_CAPTION, number).random(batch) < self.config.dense_caption_ratio
        return Plan(number, np.full(batch, bucket), members, dense, {"batch": number + 1})

    def _places(self, plan: Plan, rank: int, world: int) -> Sequence[int]:
        """Which samples of the plan are this rank's."""
        share = len(plan.members) // world
        return range(rank * share, (rank + 1) * share)

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch of global batch `number`, and its place therein. Epochs differ by a few batches in length."""
        low, high = 0, number * self.config.batch // int(self._counts.sum()) + len(self._counts) * self.config.batch + 1
        while high - low > 1:  # the last epoch that begins at or before `number`
            middle = (low + high) // 2
            low, high = (middle, high) if self._begin(middle).sum() <= number else (low, middle)
        return low, number - int(self._begin(low).sum())

    def _begin(self, epoch: int) -> NDArray[np.int64]:
        """How many batches each bucket has given when `epoch` begins."""
        return epoch * self._counts // self.config.batch

    def _shuffled_slots(self, epoch: int) -> NDArray[np.int64]:
        """(bucket, its turn) of every batch of the epoch."""
        first, last = self._begin(epoch), self._begin(epoch + 1)
        slots = [(bucket, turn) for bucket in range(len(first)) for turn in range(first[bucket], last[bucket])]
        return self._rng(_SLOTS, epoch).permutation(np.array(slots, np.int64).reshape(-1, 2))

    def _shuffled(self, bucket: int, turn: int) -> NDArray[np.int64]:
        return self._rng(_ORDER, bucket, turn).permutation(self._buckets.members[bucket])

    def encodings(self) -> Iterator[tuple[str, str | Latent]]:
        """What this dataset can tell and show, by cache key: captions, some more than once, then pictures."""
        for row, _ in self._described():
            for dense, share in ((True, self.config.dense_caption_ratio), (False, 1 - self.config.dense_caption_ratio)):
                if share:
                    yield text_key(_caption(row, dense)), _caption(row, dense)
        for row, sizes in self._described():
            for size in sizes:
                yield latent_key(row["id"], size), Latent(row["_rowid"], size)

    def _described(self) -> Iterator[tuple[dict[str, Any], list[Size]]]:
        """Each picture that is in a bucket, in order: its id and captions, and its sizes. So many are held at once."""
        for start in range(0, len(self._rows), _ROWS):
            sizes: dict[int, list[Size]] = {}
            for size, members in zip(self._buckets.sizes, self._buckets.members, strict=True):
                first, last = np.searchsorted(members, [start, start + _ROWS])
                for member in members[first:last].tolist():
                    sizes.setdefault(member, []).append(size)
            rows = self.store.rows(self._rows[sorted(sizes)].tolist(), "id", "brief", "dense") if sizes else {}
            for member in sorted(sizes):
                yield rows[int(self._rows[member])], sizes[member]

    # ---- the pictures themselves: in threads ----------------------------------------------------------------------

    def _batch(self, plan: Plan, rank: int, world: int) -> tuple[Batch, dict[str, str]]:
        """This rank's share of the plan, and which pictures were corrupt, with the reason."""
        mine = self._places(plan, rank, world)
        rows = self._rows_of(plan.members[mine].tolist())
        loaded = {
            bucket: self._load(
                [rows[int(plan.members[p])] for p in mine if plan.buckets[p] == bucket], self._buckets.sizes[bucket]
            )
            for bucket in sorted(set(plan.buckets[mine].tolist()))
        }
        images, captions, keys, corrupt = [], [], [], dict[str, str]()
        for place in mine:
            row, image = self._sample(
                plan, place, rows[int(plan.members[place])], loaded[int(plan.buckets[place])], corrupt
            )
            images.append(image)
            captions.append(_caption(row, bool(plan.dense[place])))
            keys.append(int(row["id"][:15], 16))
        pictures = torch.stack(images) if plan.costs is None else tuple(images)
        weight = len(mine) * world / len(plan.members)
        if self._cache is None:
            return Batch(pictures, tuple(captions), tuple(keys), weight=weight), corrupt
        texts = self._cache.get(map(text_key, captions))
        told = [texts[text_key(caption)] for caption in captions]
        text = TextFeatures.cat([TextFeatures(t["features"][None], t["mask"][None]) for t in told])
        return Batch(None, tuple(captions), tuple(keys), pictures, text, weight), corrupt

    def _rows_of(self, members: list[int]) -> dict[int, dict[str, Any]]:
        names = ("id", "brief", "dense") if self._cache else ("id", "brief", "dense", "image")
        rows = self.store.rows([int(self._rows[m]) for m in members], *names)
        return {m: rows[int(self._rows[m])] for m in members}

    def _load(self, rows: Iterable[Mapping[str, Any]], size: Size) -> dict[str, Tensor | str]:
        """By id: uint8 [3,H,W], or the cached latent [C,h,w]; for a corrupt picture, the reason."""
        if self._cache is not None:
            keys = {row["id"]: latent_key(row["id"], size) for row in rows}
            found = self._cache.get(keys.values())
            return {picture: found[key].get("z", "corrupt when it was cached") for picture, key in keys.items()}
        loaded: dict[str, Tensor | str] = {}
        for row in rows:
            try:
                image = pictures.fit(pictures.read(row["image"]), size)
                loaded[row["id"]] = torch.from_numpy(image).permute(2, 0, 1).contiguous()
            except pictures.PictureError as error:
                loaded[row["id"]] = str(error)
        return loaded

    def _sample(
        self,
        plan: Plan,
        place: int,
        row: dict[str, Any],
        loaded: Mapping[str, Tensor | str],
        corrupt: dict[str, str],
    ) -> tuple[dict[str, Any], Tensor]:
        """The picture at a place of the global batch; if it is corrupt, one that this place alone determines."""
        bucket = int(plan.buckets[place])
        members, size = self._buckets.members[bucket], self._buckets.sizes[bucket]
        draw = self._rng(_SUBSTITUTE, plan.number, place)
        for _ in range(_TRIES):
            got = loaded[row["id"]]
            if isinstance(got, Tensor):
                return row, got
            corrupt[row["id"]] = got
            other = int(draw.choice(members))
            row = self._rows_of([other])[other]
            loaded = self._load([row], size)
        raise LensError(
            f"{self.config.store}: {_TRIES} pictures drawn from the bucket {size[0]}x{size[1]} cannot be decoded; "
            "import the sources again"
        )


def fill_cache(
    config: Settings,
    pipeline: LensPipeline,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
    kind: type[StoreDataset] = StoreDataset,
    precision: str = "fp32",
) -> None:
    """Encode what the cache `config.cache` lacks for training with this config; see `caching.fill`. `precision` is the
    one that the caller encodes in, fp32 or bf16."""
    if not config.cache:
        raise ConfigError("the dataset names no cache; add `cache: NAME` to the recipe's dataset")
    for part in (pipeline.vae, pipeline.text_encoder):
        if part is None:
            raise ConfigError("a cache needs a vae and a text_encoder; name them, or a start, in the recipe's pipeline")
        if isinstance(part, nn.Module):
            part.eval()  # as the training loop has it
    dataset = kind(evolve(config, cache=""))
    cache = Cache(dataset.store, config.cache, encoders(pipeline, precision))
    fill(dataset.store, cache, pipeline, dataset.encodings(), rank=rank, world=world, say=say)


def _caption(row: Mapping[str, Any], dense: bool) -> str:
    wanted, other = ("dense", "brief") if dense else ("brief", "dense")
    return str(row[wanted] or row[other])
