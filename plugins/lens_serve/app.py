"""The FastAPI app: routes, errors in OpenAI's form, and the guard before them. A page can be mounted on it."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from lens_core import __version__
from lens_serve.bodies import BodyLimits, BodyReader
from lens_serve.engine import Engine
from lens_serve.errors import ApiError
from lens_serve.guard import Guard
from lens_serve.images_api import CLIENT_GONE, ImagesApi
from lens_serve.metrics import CONTENT_TYPE, Metrics
from lens_serve.outputs import Outputs

OUTPUT = "/outputs/{name}"


@frozen(kw_only=True)
class AppOptions:
    """How the app is open to others. `token` None: only to this machine."""

    token: str | None = field(default=None, repr=False)
    outputs: Outputs | None = None
    bodies: BodyLimits = field(factory=BodyLimits)


def make_app(engine: Engine, options: AppOptions | None = None) -> FastAPI:
    """The app over an engine, which the caller closes. `app.state.engine` and `app.state.outputs` are for pages."""
    options = options or AppOptions()
    metrics = Metrics()
    api = ImagesApi(engine, BodyReader(options.bodies), options.outputs, metrics)

    async def health(_: Request) -> Response:
        status = "stopping" if engine.closing else "ok"
        return JSONResponse({"status": status}, 503 if engine.closing else 200)

    async def read_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.text(engine), media_type=CONTENT_TYPE)

    def output(request: Request) -> Response:  # not async: FastAPI runs it in a thread, for it reads a file
        name = request.path_params["name"]
        data = options.outputs.read(name) if options.outputs is not None else None
        if data is None:
            raise ApiError(404, "there is no such picture", "not_found")
        kind = f"image/{name.rpartition('.')[2]}"  # png, jpeg or webp
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=86400"})

    app = FastAPI(
        title="Lens",
        version=__version__,
        # The pages about the API would load scripts from another site.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        routes=[
            Route("/v1/images/generations", api.generations, methods=["POST"]),
            Route("/v1/images/edits", api.edits, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", read_metrics, methods=["GET"]),
            Route(OUTPUT, output, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
        },
    )
    app.state.engine, app.state.outputs = engine, options.outputs
    app.add_middleware(
        Guard, token=options.token, count=lambda path, status: metrics.responses.update([(path, status)])
    )
    return app


async def _api_error(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Any) -> Response:
    """What the router says: no such path, or no such method."""
    what = f"{request.method} {request.url.path[:200]}"
    known = {route.path for route in request.app.routes}  # a mounted page's too
    if request.app.state.outputs is None:
        known.remove(OUTPUT)
    nothing = f"there is nothing at {what}; the server answers at {', '.join(sorted(known))}"
    words = nothing if error.status_code == 404 else f"{what}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, words, "not_found").body(), error.status_code, error.headers)


async def _client_gone(_: Request, __: Any) -> Response:
    return Response(status_code=CLIENT_GONE)
