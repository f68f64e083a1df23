"""`lens serve`: one model in memory behind a queue, and OpenAI's image API before it.

jobs        a request, its job, and the events of the job
engine      one queue, one thread that draws, batches of requests that agree
live        a batch while it is drawn: cancelled rows, steps and previews
fields      the fields of OpenAI's image requests, validated
bodies      request bodies, read with a bound: JSON, and forms with pictures
pictures    uploads for an edit, and finished pictures as files
outputs     the folder of finished pictures, and nothing else that can be read
images_api  generations, edits, and their streams
errors      errors in OpenAI's form
guard       the token, and protection from pages of other sites
metrics     `/metrics`
app         the FastAPI app of all of these
server      uvicorn: where it listens, and how it stops
commands    `lens serve`
"""

from __future__ import annotations

from lens_core import hookimpl


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_serve import commands  # light; so `lens --help` can describe it

    return {"serve": f"{commands.__name__}:serve"}
