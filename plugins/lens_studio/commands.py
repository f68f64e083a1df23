"""`lens studio`, as a plain function: `lens serve --ui --open`, found through the catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.cli.options import DEFAULT_MODEL, ModelGroup
from lens_core.types import ConfigError


def studio(
    *,
    model: ModelGroup = DEFAULT_MODEL,
    port: int = 7860,
    output: Annotated[Path, Parameter(alias="-o")] = Path("pictures"),
    runs: Path = Path("runs"),
    results: Path = Path("runs"),
    compare: Annotated[list[str] | None, Parameter(negative="")] = None,
    offer_lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    open_page: Annotated[bool, Parameter(name="--open")] = True,
) -> int:
    """Open the page in this machine's browser: draw, compare, watch runs, read results.

    Parameters
    ----------
    port
        The port to listen at, of 127.0.0.1 alone; 0 takes any that is free.
    output
        The folder that keeps every picture.
    runs
        The folder of training runs that the page shows.
    results
        The folder of benchmark results that the page shows.
    compare
        A checkpoint that the page may load to compare; may be given more than once.
    offer_lora
        A LoRA that the page offers: NAME=PATH. May be given more than once.
    open_page
        Open the browser; with --no-open print the address only.
    """
    from inspect import signature
    from typing import get_args, get_type_hints

    from lens_core.catalog import Catalog, resolve

    place = Catalog.installed().commands().get("serve")
    if place is None:
        raise ConfigError("lens studio needs the plugin lens_serve, which is not there; see lens plugins")
    serve = resolve(place)
    assert "page" in signature(serve).parameters
    options = get_args(get_type_hints(serve, include_extras=True)["page"])[0]
    page = options(ui=True, open_page=open_page, runs=runs, results=results, compare=compare)
    return int(serve(model=model, port=port, output=output, offer_lora=offer_lora, page=page))
