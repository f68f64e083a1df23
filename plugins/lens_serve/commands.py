"""`lens serve`, as a plain function; what it needs is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from attrs import frozen
from cyclopts import Parameter

from lens_core.cli.options import DEFAULT_MODEL, ModelGroup
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from lens_serve.bodies import BodyLimits
    from lens_serve.jobs import Limits

TOKEN = "LENS_SERVE_TOKEN"


@frozen
class LimitOptions:
    """The most that one request may ask for.

    Parameters
    ----------
    max_pixels
        Height times width of one picture.
    max_steps
        Sampler steps.
    max_images
        Pictures of one request.
    max_queue
        Requests that wait; another is refused with status 429.
    max_batch
        Pictures that are drawn together, where requests agree.
    max_upload_mb
        MiB of a form with pictures.
    """

    max_pixels: int = 1440 * 1440
    max_steps: int = 100
    max_images: int = 10
    max_queue: int = 64
    max_batch: int = 4
    max_upload_mb: int = 32

    def engine_limits(self) -> Limits:
        from lens_serve.jobs import Limits

        return Limits(
            max_pixels=self.max_pixels, max_steps=self.max_steps, max_images=self.max_images,
            max_queue=self.max_queue, max_batch=self.max_batch,
        )  # fmt: skip

    def body_limits(self) -> BodyLimits:
        from lens_serve.bodies import BodyLimits

        return BodyLimits(max_upload=self.max_upload_mb * 2**20)


@frozen
class PageOptions:
    """The page in a browser.

    Parameters
    ----------
    ui
        Mount the page at /studio. Needs the extra `ui`.
    open_page
        Open it in this machine's browser, once it is served.
    runs
        The folder of training runs that the page shows.
    results
        The folder of benchmark results that the page shows.
    compare
        A checkpoint that the page may load to compare; may be given more than once.
    """

    ui: Annotated[bool, Parameter(negative="")] = False
    open_page: Annotated[bool, Parameter(name="--open", negative="")] = False
    runs: Path = Path("runs")
    results: Path = Path("runs")
    compare: Annotated[list[str] | None, Parameter(negative="")] = None


PageGroup = Annotated[PageOptions, Parameter(name="*")]
DEFAULT_PAGE = PageOptions()
LimitGroup = Annotated[LimitOptions, Parameter(name="*")]
DEFAULT_LIMITS = LimitOptions()


def serve(
    *,
    model: ModelGroup = DEFAULT_MODEL,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    offer_lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    limits: LimitGroup = DEFAULT_LIMITS,
    grace: float = 60.0,
    page: PageGroup = DEFAULT_PAGE,
) -> int:
    """Serve a model over HTTP, by OpenAI's image API. One process, one queue, one model in memory.

    Parameters
    ----------
    host
        The address to listen at. Any but this machine's own needs a token.
    port
        The port to listen at; 0 takes any that is free, and prints it.
    token_file
        A file with the token that clients must send. Without it, the environment variable LENS_SERVE_TOKEN.
    output
        A folder that keeps every picture, from where /outputs serves it. Nothing is kept if not given.
    offer_lora
        A LoRA that requests may name: NAME=PATH. May be given more than once.
    grace
        Seconds that accepted requests have to finish after SIGTERM.
    """
    check_installed()
    from lens_serve import pages
    from lens_serve.app import AppOptions, make_app
    from lens_serve.engine import Engine
    from lens_serve.outputs import Outputs
    from lens_serve.server import ServerOptions, listen, make_server

    token = read_token(token_file)
    check_host(host, token)
    pages.check_installed() if page.ui else None
    loras = parse_offered(offer_lora)
    options = ServerOptions(host=host, port=port, grace=grace)
    outputs = Outputs(output) if output is not None else None
    engine_limits, body_limits = limits.engine_limits(), limits.body_limits()
    listener = listen(options)  # before gigabytes are read
    with listener:
        engine = Engine.load(model.request(), limits=engine_limits, loras=loras)
        app = make_app(engine, AppOptions(token=token, outputs=outputs, bodies=body_limits))
        address = f"[{host}]" if ":" in host else host
        needs = "" if token is None else ", with the token"
        place = f"http://{address}:{listener.getsockname()[1]}"
        if page.ui:
            pages.add_page(app, engine, outputs, page, body_limits.max_upload, place)
        print(f"lens: {engine.name} is served at {place}/v1{needs}; Ctrl-C stops it", file=sys.stderr, flush=True)
        try:
            make_server(app, engine, options).run(sockets=[listener])
        finally:
            engine.close(0)
    return 0


def check_installed() -> None:
    """Raise ConfigError where the extra is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"lens serve needs {', '.join(missing)}: pip install 'lens-t2i[serve]'")


def check_host(host: str, token: str | None) -> None:
    """Raise ConfigError for an address that others can reach, without a token."""
    from lens_serve.guard import is_local

    if token is None and not is_local(host):
        raise ConfigError(
            f"--host {host}: others can reach this address, so a token is needed; set {TOKEN} or use --token-file"
        )


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; None where there is none. Raises ConfigError without showing it."""
    from lens_core.io import readers
    from lens_core.io.api_keys import read_key
    from lens_serve.guard import checked_token

    if file is not None:
        return checked_token(readers.read_text(file, 4096).strip(), str(file))
    return checked_token(read_key(TOKEN), f"the environment variable {TOKEN}")


def parse_offered(options: list[str] | None) -> dict[str, Path]:
    """NAME=PATH, several times. Raises ConfigError."""
    offered: dict[str, Path] = {}
    for text in options or ():
        name, equals, path = text.partition("=")
        if not equals or not name or name in offered:
            raise ConfigError(f"--offer-lora {text[:120]!r} must be NAME=PATH, each name once")
        if not Path(path).exists():
            raise ConfigError(f"{path}: there is no such LoRA; give a .safetensors file or its folder")
        offered[name] = Path(path)
    return offered
