"""What `lens data` can do, as plain functions."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from lens_data import imports
from lens_data.store import Store
from lens_data.summary import summary


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
        The column of parquet files that holds the pictures; one called image, img, jpg, png, jpeg or webp if not given.
    text_column
        The column that holds the captions; brief, dense, caption or text if not given.
    """
    columns = {"image_column": image_column, "text_column": text_column}
    options = {"caption": caption, "source": source, "update": update}
    print(imports.import_path(store, path, format=format, columns=columns, **options))
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
    from lens_data.recipe_tasks import fill_recipe_cache

    fill_recipe_cache(recipe, rank, world)
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
    from lens_data.recipe_tasks import packing_table

    print(packing_table(recipe, ranks, images_per_rank, samples))
    return 0


app = App(name="data", help="The training store: fill it, inspect it, encode it once, estimate packing.")
for _name, _command in (("import", import_), ("info", info), ("cache", cache), ("packing-report", packing_report)):
    app.command(_command, name=_name)
