"""`lens train`: train what a recipe describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.catalog import Catalog


def train(
    recipe: Path,
    *,
    output: Path | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    allow_changed: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train what a recipe describes, or resume the run in --output.

    Parameters
    ----------
    recipe
        The YAML file.
    output
        The run's folder; runs/NAME-OF-RECIPE if not given.
    set_
        PATH=VALUE, which overrides the recipe, as in --set train.lr=1e-4; may be given more than once.
    allow_changed
        Resume with a recipe that differs from the run's; the differences are printed.
    dry_run
        Print the recipe with all its defaults and the memory that the run needs, and start nothing.
    """
    from lens_core.recipe import read_recipe

    catalog = Catalog.installed()
    plan = read_recipe(recipe, catalog, set_)
    if dry_run:
        from lens_core.training.memory_estimate import describe

        print(describe(plan, catalog))
        return 0
    from lens_core.training.trainer import Trainer

    report = Trainer(plan, catalog, output or Path("runs") / recipe.stem, allow_changed=allow_changed).train()
    if report.model is None:
        return 130
    print(f"{report.model}  {report.steps} steps, {report.seconds / 60:.1f} minutes this time")
    return 0
