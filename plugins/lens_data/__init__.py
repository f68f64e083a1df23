"""Pictures with captions, on disk and on their way into training.

store      the training store: a LanceDB database with every picture, its size and its captions
imports    fills the store; the readers of folders, tars and parquet files are lens_core.io's
pictures   image files as upright RGB, resized and cropped to a size
buckets    which training size a picture is for: groups of areas, of aspect ratios
schedule   which pictures each batch of `store` holds
dataset    dataset `store`: seeded, shuffled, resumable batches of one size
packed     dataset `packed`: batches of mixed sizes, each of as much work as the others
mix        dataset `mix`: several datasets in turn, by weight
caching    latents and text features, encoded once and kept beside the pictures
packing    batches of mixed sizes that cost every rank the same, filled by a FLOP budget
summary    what a store holds, as text
recipe_tasks  a recipe's cache filled, its packing estimated
commands   what `lens data` can do: import, info, cache, packing-report
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_datasets() -> dict[str, type[Any]]:
    from lens_data.dataset import StoreDataset
    from lens_data.mix import Mix
    from lens_data.packed import PackedDataset

    return {"mix": Mix, "packed": PackedDataset, "store": StoreDataset}


@hookimpl
def lens_commands() -> dict[str, str]:
    return {"data": "lens_data.commands:app"}
