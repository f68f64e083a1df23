"""`lens plugins`: what is installed, what each plugin offers, and what is disabled."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any

from cyclopts import Parameter

from lens_core.catalog import Catalog
from lens_core.cli.options import CORE_COMMANDS
from lens_core.protocols import KINDS


def plugins(
    *,
    check: Annotated[bool, Parameter(negative="")] = False,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """List what is installed, what each plugin offers, and what is disabled and why.

    Parameters
    ----------
    check
        Ask each plugin for all that it offers, commands and pages too, and list what is wrong; exit 1 if anything is.
    json_
        Print JSON instead of a table.
    """
    rows = describe_plugins(Catalog.installed(), check=CORE_COMMANDS if check else None)
    problems = sum(len(row.get("problems", ())) for row in rows)
    if json_:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_row(row)
        if check:
            print(f"{problems} problem{'s' * (problems != 1)}" if problems else "every plugin keeps its contract")
    return 1 if problems else 0


def describe_plugins(catalog: Catalog, check: Collection[str] | None = None) -> list[dict[str, Any]]:
    """One row a plugin: name, distribution, version, offers, error, and a note for a file that offers nothing. With
    `check`, the names of the core's commands, every hook of each plugin is called, and its row has `problems`."""
    problems = catalog.check(check) if check is not None else {}
    rows = []
    for plugin in catalog.plugins:
        # A hook's presence is enough: calling it would import models.
        hooks = [k for k, (hook, _) in KINDS.items() if hasattr(plugin.module, hook)]
        hooks += [
            r for r in ("lens_commands", "lens_pages", "lens_fetch", "lens_describe") if hasattr(plugin.module, r)
        ]
        row: dict[str, Any] = {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
        row |= {"offers": hooks, "error": plugin.error}
        row |= {"note": plugin.note} if plugin.note else {}
        rows.append(row | ({"problems": problems[plugin.name]} if check is not None else {}))
    return rows


def _print_row(row: dict[str, Any]) -> None:
    what = f"disabled: {row['error']}" if row["error"] else row.get("note") or ", ".join(row["offers"])
    print(f"{row['name']:16} {row['distribution']} {row['version']:10} {what}")
    for problem in row.get("problems", ()):
        if problem != row["error"]:
            print(f"{'':16} wrong: {problem}")
