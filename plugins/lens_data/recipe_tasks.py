"""What recipes are asked before they train: to fill their cache, and how evenly they would use their ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lens_core.types import ConfigError
from lens_data.buckets import LENS_BUCKETS


def fill_recipe_cache(recipe: Path, rank: int = 0, world: int = 1) -> None:
    """Encode once what training by a recipe would encode again and again: the share `rank` of `world` equal ones.

    Killed and called again, it goes on. Raises ConfigError where the dataset has no cache.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} must be at least 0 and below world, {world}")
    import torch

    from lens_core.catalog import Catalog
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.recipe import build, read_recipe
    from lens_data.dataset import StoreDataset, fill_cache

    catalog = Catalog.installed()
    plan = read_recipe(recipe, catalog)
    if plan.dataset is None:
        raise ConfigError(f"{recipe}: has no dataset, so nothing to encode; add one with `use: store`")
    _, cls, config = build(catalog, "dataset", plan.dataset, "$.dataset")
    if not issubclass(cls, StoreDataset):
        raise ConfigError(f"{recipe}: its dataset is {plan.dataset.use!r}, which has no cache; use `store`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)  # as a run does, for encoders that nobody has trained
    pipeline = LensPipeline.from_parts(plan.pipeline, catalog).to(device)
    # As the training loop encodes: in the recipe's precision.
    with torch.autocast(device, torch.bfloat16, enabled=plan.train.precision == "bf16"):
        fill_cache(config, pipeline, rank, world, kind=cls, precision=plan.train.precision)


def packing_table(recipe: Path | None, ranks: int, images_per_rank: float, samples: int) -> str:
    """How evenly a packed training would use `ranks`, beside other ways to share the same samples, as text.

    Without a recipe: `images_per_rank` pictures of 1024x1024 are a rank's budget, and samples are a uniform mixture of
    the 27 sizes. Raises ConfigError where the recipe's dataset is not `packed`.
    """
    from functools import partial

    from lens_data.packing import block_flops, comparison_table, mixture

    if recipe is None:
        lengths = np.array(mixture(samples, [size for group in LENS_BUCKETS for size in group]), np.float64)
        work, budget = block_flops, images_per_rank * float(block_flops(np.array([4096.0]))[0])
    else:
        from lens_core.catalog import Catalog
        from lens_core.recipe import build, read_recipe
        from lens_data.packed import PackedDataset

        catalog = Catalog.installed()
        read = read_recipe(recipe, catalog)
        if read.dataset is None or build(catalog, "dataset", read.dataset, "$.dataset")[1] is not PackedDataset:
            raise ConfigError(f"{recipe}: its dataset is not `packed`, so it packs nothing; use `packed`")
        dataset = PackedDataset(build(catalog, "dataset", read.dataset, "$.dataset")[2])
        lengths, work = dataset.tokens(samples), partial(block_flops, width=dataset.config.backbone_width)
        budget = dataset.config.budget / ranks * float(work(np.array([dataset.largest]))[0])
    return comparison_table(lengths.tolist(), budget, ranks, work)
