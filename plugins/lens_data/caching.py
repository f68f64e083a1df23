"""Latents and text features, computed once: a table beside the pictures, one a cache, that training reads instead.

A row is a key with tensors: `z:ID:HxW` holds the latent of a picture at a size, `t:HASH` the features of a caption.
Everything is encoded alone, so that what is cached depends neither on its neighbours nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen, has
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lens_core.attribution import latents_of, text_of
from lens_core.inference.pixels import to_pixels
from lens_core.io.digests import Ids, batched, of_keys, position
from lens_core.io.progress import progress_bar
from lens_core.recipe import unstructure
from lens_core.types import LensError
from lens_data import pictures
from lens_data.buckets import Size
from lens_data.store import Store

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

FLUSH = 64 * 1024**2  # bytes of tensors held back before they are written
ROWS = 4096  # entries held back at most
_CHUNK = 64  # pictures read at once


def latent_key(picture: str, size: Size) -> str:
    return f"z:{picture}:{size[0]}x{size[1]}"


def text_key(caption: str) -> str:
    return f"t:{hashlib.sha256(caption.encode()).hexdigest()}"


KINDS = ("vae", "text_encoder")


def encoders(pipeline: LensPipeline, precision: str = "fp32") -> dict[str, dict[str, str]]:
    """What made a cache: of each encoder that there is, its `name`, for people, and a `hash` of all that its features
    follow from: weights with their dtype, class, config, what pictures must record, and the `precision` of its work."""
    made_by = {}
    for kind in KINDS:
        part = getattr(pipeline, kind)
        if part is None:
            continue
        digest = hashlib.sha256(precision.encode())
        # What pictures must record, a pinned date for instance, changes features just as weights do.
        record = getattr(part, "provenance", None)
        record = record() if callable(record) else record
        about = [type(part).__module__, type(part).__qualname__, _config(pipeline, kind), record]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for name, value in part.state_dict().items() if isinstance(part, nn.Module) else ():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        use = pipeline.specs.get(kind)
        origin = f" from {pipeline.source}" if pipeline.source else ""
        made_by[kind] = {
            "name": f"{use.use if use else type(part).__name__}{origin} in {precision}",
            "hash": digest.hexdigest()[:16],
        }
    return made_by


def _config(pipeline: LensPipeline, kind: str) -> Any:
    """An encoder's config as plain values: its own, or what it was built from."""
    config = getattr(getattr(pipeline, kind), "config", None)
    if config is not None and has(type(config)):
        return unstructure(config)
    if isinstance(config, Mapping):
        return {str(k): v for k, v in config.items() if not str(k).startswith("_")}
    use = pipeline.specs.get(kind)
    return dict(use.options) if use else {}


def _makers(data: bytes) -> dict[str, dict[str, str]]:
    try:
        made = json.loads(data)
    except ValueError:
        return {}  # of an older Lens, or of another program: nothing that is there now has made it
    return made if isinstance(made, dict) and all(isinstance(part, dict) for part in made.values()) else {}


def _named(part: Mapping[str, str] | None) -> str:
    return f"{part.get('name')} (hash {part.get('hash')})" if part else "not known"


class EncodingCache:
    """The cache `name` of a store as it is now. It is made where `made_by`, which `encoders` gives, is given."""

    def __init__(self, store: Store, name: str, made_by: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.name, self.where, self._store = name, store.path, store
        text = json.dumps(made_by, sort_keys=True) if made_by else ""
        self._table = store.side_table(f"cache-{name}", {"key": "string", "data": "large_binary"}, text)
        if self._table is None:
            raise LensError(f"{store.path}: has no cache {name!r}; fill it with `lens data cache`")
        metadata = self._table.schema.metadata or {}
        self._made_by = _makers(metadata.get(b"lens.made_by", b""))
        if made_by:
            self.check(made_by)
        count = int(self._table.count_rows())
        self._keys, self._rows = np.empty(count, "S16"), np.empty(count, np.int64)  # 24 bytes an entry
        at = 0
        for batch in self._table.search().select(["key"]).with_row_id(True).to_batches(batch_size=4096):
            part = slice(at, at + batch.num_rows)
            self._keys[part], self._rows[part] = of_keys(batch["key"].to_pylist()), batch["_rowid"].to_numpy()
            at += batch.num_rows
        order = np.argsort(self._keys)
        self._keys, self._rows = self._keys[order], self._rows[order]

    def check(self, encoders: Mapping[str, Mapping[str, str]]) -> None:
        """Raise LensError, which names both, unless these encoders, those that there are, made what the cache holds."""
        wrong = [
            f"its {kind.replace('_', ' ')} is {_named(self._made_by.get(kind))}, this one {_named(now)}"
            for kind, now in encoders.items()
            if self._made_by.get(kind, {}).get("hash") != now["hash"]
        ]
        if wrong:
            raise LensError(
                f"{self.where}: the cache {self.name!r} is of another VAE or text encoder; give the new one another "
                f"name, and fill it with `lens data cache`: {'; '.join(wrong)}"
            )

    def __contains__(self, key: str) -> bool:
        return position(self._keys, of_keys([key]).tobytes()) is not None

    def lacking(self, keys: Iterable[str]) -> tuple[int, int]:
        """How many of these keys are not there, of how many different ones."""
        wanted = np.unique(np.concatenate([np.empty(0, "S16"), *map(of_keys, batched(keys, 4096))]))
        places = np.searchsorted(self._keys, wanted)
        inside = places < len(self._keys)
        return len(wanted) - int((self._keys[places[inside]] == wanted[inside]).sum()), len(wanted)

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The tensors of these keys, which must be there; none for a picture that could not be decoded."""
        keys = sorted(set(keys))
        places = [position(self._keys, of_keys([key]).tobytes()) for key in keys]
        if missing := places.count(None):
            raise LensError(f"the cache {self.name!r} lacks {missing} entries; run `lens data cache` again")
        wanted = sorted(int(self._rows[place]) for place in places if place is not None)
        entries = self._table.take_row_ids(wanted).select(["key", "data"]).to_arrow().to_pylist()
        return {row["key"]: from_bytes(row["data"]) if row["data"] else {} for row in entries}

    def add(self, rows: Mapping[str, bytes]) -> None:
        """Append rows that are not there yet; they are seen when the cache is opened again. Raises WriteError."""
        self._store.append(self._table, [{"key": key, "data": data} for key, data in rows.items()])


@frozen
class Latent:
    """A picture to encode: its row in the store, at a size."""

    row: int
    size: Size


def encode_missing(
    store: Store,
    cache: EncodingCache,
    pipeline: LensPipeline,
    wanted: Iterable[tuple[str, str | Latent]],
    *,
    rank: int = 0,
    world: int = 1,
    total: int | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Encode this rank's share of what `cache` lacks of `wanted`: captions and pictures, by key, some more than once.

    Killed and run again, it continues. A corrupt picture is noted in the cache, and training replaces it. `total`, for
    the bar: about how many there are.
    """
    held: dict[str, bytes] = {}
    size = done = corrupt = 0
    seen = Ids()

    def flush() -> None:
        nonlocal size
        if held:
            cache.add(held)
            held.clear()
            size = 0

    def lacking() -> Iterator[tuple[str, str | Latent]]:
        for key, what in wanted:
            digest = hashlib.sha256(key.encode()).digest()
            if int(key.split(":")[1][:15], 16) % world == rank and key not in cache and digest not in seen:
                seen.add(digest)
                yield key, what

    with progress_bar(total, "entry", desc=f"cache {cache.name}") as bar:
        for some in batched(lacking(), _CHUNK):
            numbers = [what.row for _, what in some if isinstance(what, Latent)]
            rows = store.rows(numbers, "image") if numbers else {}
            for key, what in some:
                if isinstance(what, str):
                    tensors = _text(pipeline, what)
                else:
                    tensors = _latent(pipeline, rows[what.row]["image"], what.size)
                    corrupt += not tensors
                held[key] = to_bytes(tensors) if tensors else b""
                size += len(held[key])
                done += 1
                if size >= FLUSH or len(held) >= ROWS:
                    flush()
            bar.update(len(some))
    flush()
    log(f"cache {cache.name}: rank {rank} of {world} is done; {done} encoded, {corrupt} corrupt pictures")


@torch.no_grad()
def _latent(pipeline: LensPipeline, data: bytes, size: Size) -> dict[str, Tensor]:
    try:
        image = pictures.fit(pictures.read(data), size)
    except pictures.PictureError:
        return {}
    pixels = to_pixels(torch.from_numpy(image)[None].permute(0, 3, 1, 2))
    return {"z": latents_of(pipeline.vae, pixels)[0].cpu().contiguous()}


@torch.no_grad()
def _text(pipeline: LensPipeline, caption: str) -> dict[str, Tensor]:
    text = text_of(pipeline.text_encoder, [caption])
    return {"features": text.features[0].cpu().contiguous(), "mask": text.mask[0].cpu().contiguous()}
