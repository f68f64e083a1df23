"""One model in memory behind a queue of requests, for servers and pages.

jobs        a request, its job, and the events of the job
engine      one queue, one thread that draws, batches of requests that agree
live        a batch while it is drawn: cancelled rows, steps and previews
"""

from __future__ import annotations

from lens_core import hookimpl


@hookimpl
def lens_commands() -> dict[str, str]:
    return {}
