"""`lens components`, `lens show` and `lens new-plugin`. Whatever is heavy is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.catalog import Catalog


def components(
    kind: str | None = None,
    *,
    markdown: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """List every component that is installed, with a line on each. `lens show NAME` describes one.

    Parameters
    ----------
    kind
        vae, text_encoder, backbone, sampler, reward, reasoner, method, dataset, curator, benchmark, generator,
        perceiver or llm.
    markdown
        Write the reference pages, one a kind, into this folder instead.
    json_
        Print JSON instead of a table.
    """
    from attrs import asdict

    from lens_core.cli.terminal import print_error
    from lens_tools import reference, reference_pages

    catalog = Catalog.installed()
    rows = reference.list_components(catalog, kind)
    if disabled := catalog.disabled().strip():
        print_error(disabled)
    if markdown is not None:
        for path in reference_pages.write(catalog, markdown):
            print(path)
    elif json_:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(reference_pages.listing(rows))
    return 0


def show(
    name: str,
    *,
    kind: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Describe a component: what it does, its options with types, defaults and ranges, and a line of YAML to name it.

    Parameters
    ----------
    name
        As a recipe has it: flux2, or lens_flux2:flux2.
    kind
        Only the component of this kind, where several have the name.
    json_
        Print JSON instead of text.
    """
    from attrs import asdict

    from lens_tools import reference, reference_pages

    components = reference.describe(Catalog.installed(), name, kind)
    if json_:
        print(json.dumps([asdict(each) for each in components], indent=2))
    else:
        print("\n\n".join(reference_pages.as_text(each) for each in components))
    return 0


def new_plugin(
    name: str,
    *,
    kind: Annotated[list[str], Parameter(negative="")],
    output: Path = Path(),
) -> int:
    """Write a package with a component that works, its hooks and its tests, to start a plugin from.

    Parameters
    ----------
    name
        The package's name, such as lens-sparkle. A folder of this name is made.
    kind
        What it offers: vae, text_encoder, backbone, sampler, reward, reasoner, method, dataset, curator, benchmark,
        generator, perceiver or llm. May be given more than once.
    output
        The folder in which the package's folder is made.
    """
    from lens_tools.scaffold import write_plugin

    for path in write_plugin(name, kind, output):
        print(path)
    return 0
