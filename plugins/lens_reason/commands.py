"""What `lens reason` can do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter


def search(
    recipe: Path,
    *,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Search for the system prompt with which a reasoner's pictures score best. Nothing is trained.

    Stopped or killed, the same command goes on and pays for nothing twice. Writes best.txt, which --reasoner takes,
    candidates.json, report.md and progress.png.

    Parameters
    ----------
    recipe
        A YAML file: reasoner, benchmark, dev, heldout, reflector and budget; see docs/reasoner.md.
    output
        The folder to write; runs/search-NAME for the recipe NAME.yaml if not given.
    set_
        PATH=VALUE changes a field of the recipe, as in budget.pictures=500; may be given more than once.
    """
    from lens_core.catalog import Catalog
    from lens_reason import report
    from lens_reason.recipe import read_search
    from lens_reason.search import run_search

    catalog = Catalog.installed()
    search_recipe = read_search(recipe, catalog, set_ or [])
    folder = output or Path("runs") / f"search-{recipe.stem}"
    result = run_search(
        search_recipe, folder, catalog=catalog, log=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(f"{report.summary(result)}\n{folder}: best.txt, candidates.json, report.md, progress.png")
    return 0


app = App(name="reason", help="Reasoners: the search for their system prompt.")
app.command(search)
