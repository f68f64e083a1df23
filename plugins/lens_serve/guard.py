"""What stands before every route: the token, and protection from pages of other sites in a browser on this machine.

Without a token the server answers only to the names of this machine, or a site could reach it by a name of its own that
resolves to 127.0.0.1. With or without one, a request that a page of another site made is refused.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lens_core.types import ConfigError, LensError
from lens_serve.errors import ApiError

LOG = logging.getLogger("lens_serve")
OPEN_PATHS = ("/health",)  # for whoever starts and restarts the server
COUNTED = ("/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics")


class Guard:
    """ASGI middleware around the whole app, pages that are mounted on it included."""

    def __init__(self, app: ASGIApp, token: str | None, count: Callable[[str, int], None]) -> None:
        self.app, self._token, self._count = app, token, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # lifespan
            await self.app(scope, receive, send)
            return
        problem = self._problem(scope)
        if scope["type"] == "websocket":
            if problem is None:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": str(problem)[:100]})
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(_label(scope["path"], COUNTED), message["status"])
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            if problem is None:
                await self.app(scope, receive, counted)
        except Exception as error:
            if begun:
                raise  # the connection is closed, so the client sees that something is missing
            LOG.exception("a request failed")
            message = f"{type(error).__name__}: this is a fault of Lens, please report it; the server's log has more"
            problem = ApiError(500, str(error) if isinstance(error, LensError) else message, "internal_error")
        if problem is not None:
            await JSONResponse(problem.body(), problem.status, problem.headers())(scope, receive, counted)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._token is None and not is_local(_hostname(host)):
            return ApiError(
                403, "this server has no token and answers only to localhost and 127.0.0.1; start it with a token to "
                "reach it by another name", "host_not_allowed",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and _site(origin) != host.lower():
            return ApiError(403, "a page of another site made this request, which is not allowed", "origin_not_allowed")
        if self._token is None or scope["path"] in OPEN_PATHS or self._is_right(headers.get("authorization", "")):
            return None
        return ApiError(401, "the token is missing or wrong; send Authorization: Bearer TOKEN", "invalid_api_key")

    def _is_right(self, authorization: str) -> bool:
        """Whether a header has the token: as Bearer, or as the password of Basic, for which browsers ask."""
        kind, _, credentials = authorization.partition(" ")
        sent = credentials.strip().encode()
        if kind.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != "bearer":
            return False
        assert self._token is not None
        return hmac.compare_digest(sent, self._token.encode())  # in a time that does not depend on where they differ


def is_local(name: str) -> bool:
    """Whether a host's name or address is this machine's own, to itself alone."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _hostname(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _site(origin: str) -> str:
    """The name and port in an Origin header; "" where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _label(path: str, known: Collection[str]) -> str:
    """A path for a count, of which there must be few."""
    return path if path in known else "/outputs" if path.startswith("/outputs/") else "other"


def checked_token(token: str | None, source: str) -> str | None:
    """A token that can be sent in a header, or None. Raises ConfigError, which does not show it."""
    if token is None:
        return None
    if len(token) < 16 or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{source}: a token must have 16 characters or more, printable ASCII without spaces")
    return token
