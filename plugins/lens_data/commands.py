"""What `lens data` can do, as plain functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from lens_core.io.parquet import is_parquet
from lens_core.io.system_files import is_system_file
from lens_core.io.tars import is_tar
from lens_core.types import ConfigError
from lens_data import imports
from lens_data.buckets import LENS_BUCKETS, Buckets, assign
from lens_data.store import Store

_FORMATS: dict[str, Callable[..., imports.ImportReport]] = {
    "folder": imports.import_folder,
    "tars": imports.import_tars,
    "parquet": imports.import_parquet,
}


def import_(
    store: str,
    path: Path,
    *,
    format: str = "auto",
    caption: str = "dense",
    source: str = "",
    update: bool = False,
    image_column: str = "",
    text_column: str = "",
) -> int:
    """Import pictures with captions into a training store; what cannot be used is counted by reason.

    Parameters
    ----------
    store
        The store's folder or URI; made if it is not there.
    path
        A folder of pictures with captions, WebDataset tars, or a Hugging Face dataset folder.
    format
        folder, tars or parquet; auto looks at what is there.
    caption
        What a caption is that does not say so: brief or dense.
    source
        The name of the origin that is noted with each picture; the path's own if not given.
    update
        Replace the captions of pictures that the store has already.
    image_column
        The column of parquet files that holds the pictures; one called image, img, jpg or png if not given.
    text_column
        The column that holds the captions; brief, dense, caption or text if not given.
    """
    if format == "auto":
        format = _format(path)
    if format not in _FORMATS:
        raise ConfigError(f"no import is called {format!r}; known: auto, {', '.join(_FORMATS)}")
    options = {"image_column": image_column, "text_column": text_column}
    columns = {name: column for name, column in options.items() if column}
    if columns and format != "parquet":
        raise ConfigError(f"--{next(iter(columns)).replace('_', '-')}: {format} have no columns; leave it out")
    print(_FORMATS[format](store, path, caption=caption, source=source, update=update, **columns))
    return 0


def info(store: str) -> int:
    """Print what a training store holds: sources, sizes, captions, and the pictures in each bucket of Lens.

    Parameters
    ----------
    store
        The store's folder or URI.
    """
    print(summary(Store(store)))
    return 0


def cache(recipe: Path, *, rank: int = 0, world: int = 1) -> int:
    """Encode once what training by a recipe would encode again and again; killed and run again, it goes on.

    Parameters
    ----------
    recipe
        The YAML file; its dataset is a store that names a cache, its pipeline holds the encoders.
    rank
        Which share of the work to do, of WORLD equal ones.
    world
        How many shares there are; each may run on a machine of its own.
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
    _, cls, config = build(catalog, "dataset", plan.dataset, "$.dataset")
    if not issubclass(cls, StoreDataset):
        raise ConfigError(f"{recipe}: its dataset is {plan.dataset.use!r}, which has no cache; use `store`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)  # as a run does, for encoders that nobody has trained
    pipeline = LensPipeline.from_parts(plan.pipeline, catalog).to(device)
    # As the training loop encodes: in the recipe's precision.
    with torch.autocast(device, torch.bfloat16, enabled=plan.train.precision == "bf16"):
        fill_cache(config, pipeline, rank, world, kind=cls, precision=plan.train.precision)
    return 0


def packing_report(
    recipe: Path | None = None, *, ranks: int = 64, images_per_rank: float = 8.0, samples: int = 10_000
) -> int:
    """Print how evenly a packed training would use its ranks, beside other ways to share the same samples.

    Parameters
    ----------
    recipe
        A YAML file whose dataset is `packed`; its pictures, captions and budget count. Without one: a uniform mixture
        of the 27 sizes with captions of about 109 words.
    ranks
        How many are simulated.
    images_per_rank
        Without a recipe: the budget of a rank, in pictures of 1024x1024.
    samples
        How many samples are looked at.
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
    print(comparison_table(lengths.tolist(), budget, ranks, work))
    return 0


app = App(name="data", help="The training store: fill it, inspect it, encode it once, estimate packing.")
for _name, _command in (("import", import_), ("info", info), ("cache", cache), ("packing-report", packing_report)):
    app.command(_command, name=_name)


def _format(path: Path) -> str:
    for file in [path] if path.is_file() else path.rglob("*"):
        if is_system_file(file.relative_to(path) if file != path else file.name):
            continue
        if is_parquet(file.name):
            return "parquet"
        if is_tar(file.name):
            return "tars"
    return "folder"


def summary(store: Store, buckets: Buckets = LENS_BUCKETS, **limits: Any) -> str:
    """Counts by source, size, caption length and bucket of `buckets`, as text; `limits` are those of `assign`."""
    rows = store.columns("height", "width", "brief", "dense", "source")
    lines = [f"{store.path}: {len(rows)} pictures, version {store.version}"]
    lines += [f"  {count:8}  from {source}" for source, count in sorted(Counter(rows["source"].to_pylist()).items())]
    if not len(rows):
        return lines[0]
    heights, widths = (rows[name].to_numpy().astype(np.int64) for name in ("height", "width"))
    lines += ["", f"{'':20}{'pictures':>9}{'least':>9}{'median':>9}{'most':>9}"]
    lines += [
        _spread("height, px", heights),
        _spread("width, px", widths),
        _spread("sqrt(area), px", (heights * widths) ** 0.5),
    ]
    for name in ("brief", "dense"):
        words = [len(text.split()) for text in rows[name].to_pylist()]
        lines.append(_spread(f"{name} caption, words", [n for n in words if n]))
    assignment = assign(heights, widths, buckets, **limits)
    lines += ["", f"{'bucket':20}{'pictures':>9}"]
    lines += [f"{f'{h}x{w}':20}{len(m):9}" for (h, w), m in zip(assignment.sizes, assignment.members, strict=True)]
    lines += [f"{reason:20}{count:9}" for reason, count in assignment.left_out.items()]
    return "\n".join(lines)


def _spread(name: str, values: Sequence[float] | np.ndarray[Any, Any]) -> str:
    figures = [f"{f(values):9.0f}" for f in (np.min, np.median, np.max)] if len(values) else ["        -"] * 3
    return f"{name:20}{len(values):9}{''.join(figures)}"
