"""`lens data curate` and `lens data why`, as plain functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.types import ConfigError, LensError


def curate(
    recipe: Path,
    *,
    output: str,
    preview: int | None = None,
    prune: Annotated[bool, Parameter(negative="")] = False,
    runner: str | None = None,
    workers: int | None = None,
    report: Path | None = None,
) -> int:
    """Fill a training store from raw pictures by a recipe: filters, deduplication, captions. Run again, it goes on.

    Parameters
    ----------
    recipe
        The YAML file: sources, filters with thresholds, duplicates, captions.
    output
        The store's folder or URI; made if it is not there.
    prune
        Remove pictures from the store that a curation put there and that their source no longer has.
    preview
        Curate a sample of so many pictures, write the report of it, and leave the store alone.
    runner
        native: the processes of this machine. ray: a Ray cluster. serial: this process, without Daft. Without one, what
        DAFT_RUNNER says, or else native.
    workers
        Processes that read pictures; as many as this machine has cores if not given.
    report
        The folder for report.html and report.json; OUTPUT if not given, OUTPUT/preview for a preview.
    """
    from lens_curate.curation import curate as run
    from lens_curate.engine import default_runner
    from lens_curate.recipe import read_spec

    if preview is not None and not 1 <= preview <= 100_000:
        raise ConfigError(f"--preview is {preview}; ask for 1 to 100,000 pictures")
    if workers is not None and not 1 <= workers <= 4096:
        raise ConfigError(f"--workers is {workers}; it must be 1 to 4096")
    if report is None and "://" in output:
        raise ConfigError(f"{output}: a report needs a folder on a disk; name one with --report")
    made = run(
        read_spec(recipe), output, runner=runner or default_runner(), workers=workers, preview=preview, prune=prune
    )
    folder = report or (Path(output) / "preview" if preview is not None else Path(output))
    print(made)
    print(made.write(folder))
    return 1 if made.waiting else 0


def why(store: str, id: str) -> int:
    """Print every verdict of a curation on one picture: of each stage, with scores and thresholds.

    Parameters
    ----------
    store
        The store's folder or URI.
    id
        The picture's id in the store or its first digits (six at least), or its name in its source.
    """
    from lens_core.catalog import Catalog
    from lens_curate.verdicts import explain

    lines = explain(store, id, Catalog.installed())
    if not lines:
        raise LensError(f"{store}: no record has the id or the name {id[:120]!r}; ids are in report.html")
    print("\n".join(lines))
    return 0
