"""The dataset `store`: batches of one size from a training store. Batch n is a pure function of (store, config, n).

`schedule` says which pictures a batch holds; here they are read, decoded and fitted, in threads that work ahead.
`packed` (packed.py) reads the same pictures in another order.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lens_core.io.digests import of_ids
from lens_core.types import Batch, ConfigError, LensError, TextFeatures
from lens_core.validators import PIXELS, SEED, each, integer, matching, real, text, within
from lens_data import pictures
from lens_data.buckets import LENS_BUCKETS, Buckets, Size, assign
from lens_data.caching import EncodingCache, Latent, encode_missing, encoders, latent_key, text_key
from lens_data.packing import batch_costs
from lens_data.schedule import CAPTION, SUBSTITUTE, BatchContents, BucketSchedule, generator
from lens_data.store import Store

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

ROWS = 4096  # rows of a store that are looked through at once
_ATTEMPTS = 9  # pictures tried for one place of a batch before the store is given up


@frozen
class StoreOptions:
    """Options that every dataset over a store has."""

    store: str = field(validator=text())  # folder or URI of the training store
    # Groups of (height, width) px, a group for each area.
    buckets: Buckets = field(default=LENS_BUCKETS, validator=each(each(each(PIXELS), at_least=1), at_least=1))
    every_area: bool = False  # show a picture at each area that it fills; False: at the largest only
    # Factor by which a picture may grow to fill a size.
    max_upscale: float = field(default=1.0, validator=real(above=0))
    # Share of a picture that the crop may cut off.
    max_crop: float = field(default=0.5, validator=real(at_least=0, below=1))
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
    """Pictures of a training store in buckets: one size a batch.

    In shuffled epochs; see `Config`.

    `corrupt` names the pictures that could not be decoded, with the reason; another of the bucket stands in for each.
    """

    @frozen
    class Config(StoreOptions):
        # Samples a step, all ranks together.
        batch: int = field(default=64, validator=integer(at_least=1))
        # Instead of `batch`: samples of one rank for each group of `buckets`, in their order. Each rank then draws a
        # bucket of its own, with the batch size of its area: [24, 10, 6] for the buckets of Lens.
        local_batch_sizes: tuple[int, ...] = field(default=(), validator=each(integer(at_least=1)))

        def __attrs_post_init__(self) -> None:
            super().__attrs_post_init__()
            if self.local_batch_sizes and len(self.local_batch_sizes) != len(self.buckets):
                raise ConfigError(
                    f"local_batch_sizes has {len(self.local_batch_sizes)} sizes for {len(self.buckets)} groups of "
                    "buckets; give one for each group"
                )

        @property
        def group_batch_sizes(self) -> tuple[int, ...]:
            """Samples of a batch from each group of `buckets`."""
            return self.local_batch_sizes or (self.batch,) * len(self.buckets)

    @classmethod
    def estimate(cls, config: Config) -> str:
        """What a batch of each area costs, as text for a dry run. Opens no store."""
        costs = batch_costs(config.buckets, config.group_batch_sizes)
        if config.local_batch_sizes:
            return f"dataset: each rank draws a bucket of its own; a rank's batch\n{costs}"
        return f"dataset: all ranks share one bucket; a batch of all ranks together\n{costs}"

    @staticmethod
    def open_store(path: str, create: bool = False) -> Store:
        """The store itself, for plugins that read or fill one: they reach it through the catalog."""
        return Store(path, create)

    def __init__(self, config: Any) -> None:
        self.config = config
        self.corrupt: dict[str, str] = {}
        # Steps handed out; with local batch sizes, also the ranks' batches in them.
        self._progress = {"batch": 0, "local_batches": 0} if self._local else {"batch": 0}
        self.store = Store(config.store)
        self._cache = EncodingCache(self.store, config.cache) if config.cache else None
        self._index()
        self._report_left_out()

    @property
    def _local(self) -> bool:
        """Whether each rank draws a bucket of its own."""
        return bool(getattr(self.config, "local_batch_sizes", ()))

    def _index(self) -> None:
        """Read the sizes of all pictures and put each into its buckets.

        Pictures are sorted by id, so that the order of imports does not matter.
        """
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
        for start in range(0, count, ROWS):
            digest.update(ids[start : start + ROWS].tobytes().hex().encode())
        self._fingerprint = digest.hexdigest()[:16]
        self._make_schedule()
        if self._cache is not None:
            lacking, wanted = self._cache.lacking(key for key, _ in self.encodings())
            if lacking:
                raise LensError(
                    f"{config.store}: the cache {config.cache!r} lacks {lacking} of {wanted} latents and texts; "
                    "run `lens data cache` on this recipe"
                )

    def _make_schedule(self) -> None:
        """Prepare the order of batches."""
        config = self.config
        batch_size = {
            size: samples
            for group, samples in zip(config.buckets, config.group_batch_sizes, strict=True)
            for size in group
        }
        self._schedule = BucketSchedule(
            self._buckets.members, [batch_size[size] for size in self._buckets.sizes], config.seed
        )

    def _report_left_out(self) -> None:
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
        schedule = self._steps(world)
        ahead: deque[tuple[BatchContents, Future[tuple[Batch, dict[str, str]]]]] = deque()
        pool = ThreadPoolExecutor(self.config.prefetch_workers, "store")
        try:
            while True:
                while len(ahead) < self.config.prefetch_workers:
                    contents = next(schedule)
                    ahead.append((contents, pool.submit(self._read_batch, contents, rank, world)))
                contents, reading = ahead.popleft()
                batch, corrupt = reading.result()
                for key, why in corrupt.items():
                    if key not in self.corrupt:
                        self.corrupt[key] = why
                        warnings.warn(f"{self.config.store}: picture {key} is corrupt ({why}); replaced", stacklevel=2)
                # Only now: what was read ahead is read again after a resume.
                self._progress = dict(contents.state)
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        return {**self._progress, "version": self.store.version, "pictures": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches of `state`, with the pictures that the store had then."""
        if self.store.version != state["version"] and self.store.at(int(state["version"])):
            self._index()
        if self._fingerprint != state["pictures"]:
            raise LensError(
                f"{self.config.store}: holds other pictures than when the run stopped (at version {state['version']}); "
                "bring that store back, or begin a new run"
            )
        self._progress = {name: int(state[name]) for name in self._progress}

    # ---- which pictures a step holds ------------------------------------------------------------------------------

    def _least(self) -> int:
        """Pictures that a batch takes."""
        return int(max(self.config.group_batch_sizes))

    def _steps(self, world: int) -> Iterator[BatchContents]:
        """The contents of all steps from here on. Raises ConfigError where so many ranks cannot share them."""
        if not self._local and self.config.batch % world:
            raise ConfigError(
                f"a batch of {self.config.batch} has no equal shares for {world} ranks; use a multiple of {world}"
            )
        # With local batch sizes a step is the next batch of the stream for every rank, so that the stream, and where a
        # run goes on in it, is the same for any number of ranks. Otherwise it is one batch, which the ranks share.
        each_step = world if self._local else 1
        step, first = self._progress["batch"], self._progress.get("local_batches", self._progress["batch"])
        while True:
            step, first = step + 1, first + each_step
            state = {"batch": step, "local_batches": first} if self._local else {"batch": step}
            yield self._contents(range(first - each_step, first), state)

    def _contents(self, numbers: range, state: Mapping[str, int]) -> BatchContents:
        """The batches of these numbers as one step."""
        drawn = [self._schedule.batch(number) for number in numbers]
        sizes = [len(members) for _, members in drawn]
        dense = [
            generator(self.config.seed, CAPTION, number).random(size) < self.config.dense_caption_ratio
            for number, size in zip(numbers, sizes, strict=True)
        ]
        return BatchContents(
            numbers=np.repeat(np.array(numbers, np.int64), sizes),
            positions=np.concatenate([np.arange(size) for size in sizes]),
            buckets=np.repeat(np.array([bucket for bucket, _ in drawn], np.int64), sizes),
            members=np.concatenate([members for _, members in drawn]),
            dense=np.concatenate(dense),
            state=state,
            rank_sizes=tuple(sizes) if self._local else (),
        )

    def _rank_share(self, contents: BatchContents, rank: int, world: int) -> Sequence[int]:
        """Which samples of a step are this rank's."""
        sizes = contents.rank_sizes or (len(contents) // world,) * world
        return range(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def encodings(self) -> Iterator[tuple[str, str | Latent]]:
        """All that this dataset may read, by cache key: captions, some more than once, then pictures at their sizes."""
        for row, _ in self._rows_with_sizes():
            for dense, share in ((True, self.config.dense_caption_ratio), (False, 1 - self.config.dense_caption_ratio)):
                if share:
                    yield text_key(_caption(row, dense)), _caption(row, dense)
        for row, sizes in self._rows_with_sizes():
            for size in sizes:
                yield latent_key(row["id"], size), Latent(row["_rowid"], size)

    def _rows_with_sizes(self) -> Iterator[tuple[dict[str, Any], list[Size]]]:
        """Each picture in a bucket, in order: its id and captions, and its sizes. At most ROWS are held at once."""
        for start in range(0, len(self._rows), ROWS):
            sizes: dict[int, list[Size]] = {}
            for size, members in zip(self._buckets.sizes, self._buckets.members, strict=True):
                first, last = np.searchsorted(members, [start, start + ROWS])
                for member in members[first:last].tolist():
                    sizes.setdefault(member, []).append(size)
            rows = self.store.rows(self._rows[sorted(sizes)].tolist(), "id", "brief", "dense") if sizes else {}
            for member in sorted(sizes):
                yield rows[int(self._rows[member])], sizes[member]

    # ---- the pictures themselves: in threads ----------------------------------------------------------------------

    def _read_batch(self, contents: BatchContents, rank: int, world: int) -> tuple[Batch, dict[str, str]]:
        """This rank's share of a step, and which pictures were corrupt, with the reason."""
        mine = self._rank_share(contents, rank, world)
        rows = self._rows_of(contents.members[mine].tolist())
        loaded = {
            bucket: self._load(
                [rows[int(contents.members[p])] for p in mine if contents.buckets[p] == bucket],
                self._buckets.sizes[bucket],
            )
            for bucket in sorted(set(contents.buckets[mine].tolist()))
        }
        images, captions, keys, corrupt = [], [], [], dict[str, str]()
        for at in mine:
            row, image = self._sample(
                contents, at, rows[int(contents.members[at])], loaded[int(contents.buckets[at])], corrupt
            )
            images.append(image)
            captions.append(_caption(row, bool(contents.dense[at])))
            keys.append(int(row["id"][:15], 16))
        pictures = torch.stack(images) if contents.costs is None else tuple(images)
        # Ranks may have unequal numbers of samples. The trainer averages over ranks, so each mean loss counts by its
        # number over the mean one: the gradient is that of the mean over all samples of the step.
        weight = len(mine) * world / len(contents)
        if self._cache is None:
            return Batch(pictures, tuple(captions), tuple(keys), weight=weight), corrupt
        tensors = self._cache.get(map(text_key, captions))
        features = [tensors[text_key(caption)] for caption in captions]
        text = TextFeatures.cat([TextFeatures(t["features"][None], t["mask"][None]) for t in features])
        return Batch(None, tuple(captions), tuple(keys), pictures, text, weight), corrupt

    def _rows_of(self, members: list[int]) -> dict[int, dict[str, Any]]:
        names = ("id", "brief", "dense") if self._cache else ("id", "brief", "dense", "image")
        rows = self.store.rows([int(self._rows[m]) for m in members], *names)
        return {m: rows[int(self._rows[m])] for m in members}

    def _load(self, rows: Iterable[Mapping[str, Any]], size: Size) -> dict[str, Tensor | str]:
        """By id: uint8 [3,H,W], or the cached latent [C,h,w]; for a corrupt picture, the reason."""
        if self._cache is not None:
            keys = {row["id"]: latent_key(row["id"], size) for row in rows}
            tensors = self._cache.get(keys.values())
            return {picture: tensors[key].get("z", "corrupt when it was cached") for picture, key in keys.items()}
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
        contents: BatchContents,
        at: int,
        row: dict[str, Any],
        loaded: Mapping[str, Tensor | str],
        corrupt: dict[str, str],
    ) -> tuple[dict[str, Any], Tensor]:
        """The picture of a sample; for a corrupt one, another of its bucket, determined by the place in the stream."""
        bucket = int(contents.buckets[at])
        members, size = self._buckets.members[bucket], self._buckets.sizes[bucket]
        draw = generator(self.config.seed, SUBSTITUTE, int(contents.numbers[at]), int(contents.positions[at]))
        for _ in range(_ATTEMPTS):
            picture = loaded[row["id"]]
            if isinstance(picture, Tensor):
                return row, picture
            corrupt[row["id"]] = picture
            other = int(draw.choice(members))
            row = self._rows_of([other])[other]
            loaded = self._load([row], size)
        raise LensError(
            f"{self.config.store}: {_ATTEMPTS} pictures drawn from the bucket {size[0]}x{size[1]} cannot be decoded; "
            "import the sources again"
        )


def fill_cache(
    config: StoreOptions,
    pipeline: LensPipeline,
    rank: int = 0,
    world: int = 1,
    log: Callable[[str], None] = print,
    kind: type[StoreDataset] = StoreDataset,
    precision: str = "fp32",
) -> None:
    """Encode what the cache `config.cache` lacks for training with this config; see `caching.encode_missing`.

    `precision` is the one that the caller encodes in, fp32 or bf16.
    """
    if not config.cache:
        raise ConfigError("the dataset names no cache; add `cache: NAME` to the recipe's dataset")
    for part in (pipeline.vae, pipeline.text_encoder):
        if part is None:
            raise ConfigError("a cache needs a vae and a text_encoder; name them, or a start, in the recipe's pipeline")
        if isinstance(part, nn.Module):
            part.eval()  # as the training loop has it
    dataset = kind(evolve(config, cache=""))
    cache = EncodingCache(dataset.store, config.cache, encoders(pipeline, precision))
    missing, _ = cache.lacking(key for key, _ in dataset.encodings())
    total = missing // world
    encode_missing(dataset.store, cache, pipeline, dataset.encodings(), rank=rank, world=world, total=total, log=log)


def _caption(row: Mapping[str, Any], dense: bool) -> str:
    wanted, other = ("dense", "brief") if dense else ("brief", "dense")
    return str(row[wanted] or row[other])
