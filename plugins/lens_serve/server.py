"""The HTTP server around the app: where it listens, and how it stops."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from attrs import field, frozen

from lens_core.types import ConfigError
from lens_core.validators import integer, real
from lens_serve.engine import Engine

if TYPE_CHECKING:
    from fastapi import FastAPI

CONNECTIONS = 1024  # open at once; more are answered with 503


@frozen(kw_only=True)
class ServerOptions:
    """`port` 0: any that is free. `grace`: seconds that accepted requests have when the server is stopped."""

    host: str = "127.0.0.1"
    port: int = field(default=8000, validator=integer(at_least=0, at_most=65_535))
    grace: float = field(default=60.0, validator=real(at_least=0, at_most=86_400))


class Server(uvicorn.Server):
    """Finishes accepted requests on the first SIGTERM or Ctrl-C, and drops them on the second."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_exit: Sequence[Callable[[], None]] = ()) -> None:
        """`on_exit`: called when it is to stop, to end streams that would never end."""
        super().__init__(config)
        self._engine, self._on_exit = engine, on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine.closing:
            self.force_exit = True
        self._engine.refuse()
        for callback in self._on_exit:
            callback()
        self.should_exit = True


def listen(options: ServerOptions) -> socket.socket:
    """A socket at the address. Raises ConfigError where it cannot be had."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=512)
    except OSError as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ConfigError(
            f"cannot listen at {options.host} port {options.port} ({why}); choose another --host or --port"
        ) from error


def make_server(app: FastAPI, engine: Engine, options: ServerOptions) -> Server:
    """The server of an app. `run(sockets=[listen(options)])` serves until a signal, or until `should_exit` is set."""
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(options.grace)),
    )  # fmt: skip
    return Server(config, engine, getattr(app.state, "on_exit", ()))
