"""A server over any pipeline, in a thread, for the tests of `lens serve`; and a gate that holds its backbone."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import define
from lens_serve.app import AppOptions, make_app
from lens_serve.engine import Engine
from lens_serve.jobs import Limits
from lens_serve.server import ServerOptions, listen, make_server

from lens_core.inference.pipeline import LensPipeline

WAIT = 60.0  # seconds, for what takes milliseconds on a quiet machine


class Gate:
    """Holds every pass of the backbone until it is opened, or let through one by one."""

    def __init__(self, pipeline: LensPipeline) -> None:
        self.passes = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)
        self.always = False
        pipeline.backbone.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.reached.release()
        if not self.always:
            assert self.passes.acquire(timeout=WAIT)

    def open(self) -> None:
        self.always = True
        self.passes.release(1000)

    def arrived(self) -> None:
        """Wait until a pass has begun."""
        assert self.reached.acquire(timeout=WAIT)


@define
class Running:
    """A server that runs: its engine and its port."""

    engine: Engine
    port: int
    token: str | None = None
    on_exit: Sequence[Callable[[], object]] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one plain request; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def error(self, *request: Any, **more: Any) -> tuple[int, dict[str, Any]]:
        """The status of a request that fails, and its error object."""
        status, _, body = self.ask(*request, **more)
        (error,) = json.loads(body).values()
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        assert len(error["message"]) < 600
        return status, error


@contextmanager
def running(
    pipeline: LensPipeline,
    limits: Limits | None = None,
    mount: Callable[[Any, Engine], object] = lambda app, engine: None,
    **options: Any,
) -> Iterator[Running]:
    """A server at a free port of 127.0.0.1; `options` are those of the app, on which `mount` may put a page. The
    engine's thread has ended after it."""
    engine = Engine(pipeline, name="toy", limits=limits or Limits(max_batch=8))
    listener = listen(ServerOptions(port=0))
    app = make_app(engine, AppOptions(**options))
    mount(app, engine)
    server = make_server(app, engine, ServerOptions(grace=WAIT))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(engine, listener.getsockname()[1], options.get("token"), getattr(app.state, "on_exit", ()))
    finally:
        for callback in getattr(app.state, "on_exit", ()):  # as a signal does
            callback()
        server.should_exit = True
        thread.join(WAIT)
        assert engine.close(WAIT) and not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = WAIT) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
