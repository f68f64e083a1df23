"""The page in a browser: draw, compare, watch runs, read results. `lens serve --ui` mounts it, `lens studio` opens it.

page      the page: its tabs, mounted on the server's app
draw      the tab Draw: a form, a live preview, a gallery with each picture's facts
forms     the form's values as a request, and a dropped picture's facts as the form's values
compare   the tab Compare: one prompt and seed over checkpoints, samplers or step counts
runs      the tab Runs: curves, sample grids and scores of training runs
results   the tab Results: tables and sheets of benchmarks
folders   the folders that the page shows, read within their bounds
commands  `lens studio`
"""

from __future__ import annotations

from lens_core import hookimpl


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_studio import commands  # light; so `lens --help` can describe it

    return {"studio": f"{commands.__name__}:studio"}


@hookimpl
def lens_pages() -> dict[str, str]:
    return {"studio": "lens_studio.page:mount"}
