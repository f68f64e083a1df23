"""One HTTP request under one deadline, with a bound on the size of its answer. Redirects are not followed.

httpx2 does the connection, TLS by the system's certificates, the proxies that the environment names (http_proxy,
https_proxy, all_proxy, no_proxy) and decompression. Every request has a connection of its own, so an answer is never
taken for that of another request. Safe to call from several threads, and from a thread that runs an event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from attrs import field, frozen

MAX_HEADER_BYTES = 1 << 16  # of an answer's header


class NotSent(ConnectionError):
    """No connection was made, so nothing of the request was sent and nothing can be billed."""


class UntrustedHost(NotSent):
    """The host cannot prove that it is who it says; another attempt ends in the same way."""


class BadAnswer(ValueError):
    """The answer cannot be decompressed, or its header is too large."""


class TooLarge(BadAnswer):
    """The answer has more bytes than the caller accepts."""


@frozen
class Answer:
    status: int
    content_type: str  # in lower case
    retry_after: str | None
    location: str | None
    body: bytes  # decompressed
    headers: Mapping[str, str] = field(factory=dict, eq=False)  # all of them; names in lower case


def check_url(url: str) -> str | None:
    """What is wrong with the address of an endpoint, or None. The address is not quoted: it may hold a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError where it is no port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must begin with http:// or https:// and name a host"
    if parts.username is not None or parts.password is not None:
        return "must not hold a user or a password; a key belongs into an environment variable"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "holds a space or a character that no URL has"
    return None


def join_url(base: str, path: str) -> str:
    """`path` below the address of an endpoint, whose query stays."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}{path}", fragment=""))


def get(url: str, headers: Mapping[str, str], timeout: float, max_bytes: int) -> Answer:
    """`post` without a body, as a GET."""
    return _request("GET", url, headers, None, timeout, max_bytes)


def post(url: str, headers: Mapping[str, str], body: bytes, timeout: float, max_bytes: int) -> Answer:
    """Send `body` and return the answer, whatever its status.

    `timeout`, in seconds, bounds the whole call: the look-up of the address, the connection, sending and all reading.
    `max_bytes` bounds the body after decompression. No error quotes the address, a header or the answer.

    Raises NotSent (UntrustedHost for a certificate) where nothing was sent. After that the request may have been
    received: TimeoutError when the time is over, TooLarge, BadAnswer, and ConnectionError for all else.
    """
    return _request("POST", url, headers, body, timeout, max_bytes)


def _request(*request: Any) -> Answer:
    def run() -> Answer:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            return runner.run(_exchange(*request))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with ThreadPoolExecutor(1) as pool:  # a thread can run only one event loop
        return pool.submit(run).result()


class _Loop(asyncio.SelectorEventLoop):
    """Looks up addresses in daemon threads: the system's resolver cannot be interrupted, and neither the end of a call
    nor that of the process may wait for it."""

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        addresses: Future[Any] = Future()
        addresses.set_running_or_notify_cancel()  # from here on it cannot be cancelled under the thread's hands

        def look_up() -> None:
            try:
                addresses.set_result(socket.getaddrinfo(host, port, **options))
            except BaseException as error:
                addresses.set_exception(error)

        threading.Thread(target=look_up, daemon=True).start()
        return await asyncio.wrap_future(addresses)


async def _exchange(
    method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeout: float, max_bytes: int
) -> Answer:
    import httpx2

    sent, streams = False, []

    async def trace(event: str, info: Mapping[str, Any]) -> None:
        nonlocal sent
        if event == "connection.connect_tcp.complete":
            streams.append(info["return_value"])
        # CONNECT only asks a proxy for a tunnel: it carries nothing of the request.
        sent |= event.endswith("send_request_headers.started") and info["request"].method != b"CONNECT"

    headers = {"Accept-Encoding": "identity", "Connection": "close", **headers}
    try:
        async with (
            asyncio.timeout(timeout),
            httpx2.AsyncClient(verify=_tls(), timeout=None, follow_redirects=False) as client,
            client.stream(method, url, headers=headers, content=body, extensions={"trace": trace}) as response,
        ):
            return await _read(response, max_bytes)
    except BadAnswer:
        raise
    except TimeoutError:
        if sent:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        raise NotSent(f"no connection within {timeout:g} s") from None
    except httpx2.DecodingError:
        raise BadAnswer("it cannot be decompressed") from None
    except httpx2.LocalProtocolError:
        raise NotSent("a header of the request holds a character that HTTP forbids") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        # ValueError and ImportError: a host that IDNA cannot encode, a proxy of a kind that is not supported.
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise UntrustedHost(cause.verify_message) from None
        raise (ConnectionError if sent else NotSent)(_reason(error)) from None
    finally:
        for stream in streams:  # httpx2 leaves it open where the deadline passes during a TLS handshake
            await stream.aclose()


async def _read(response: Any, max_bytes: int) -> Answer:
    if sum(len(name) + len(value) for name, value in response.headers.raw) > MAX_HEADER_BYTES:
        raise BadAnswer(f"its header is larger than {MAX_HEADER_BYTES:,} bytes")
    body = bytearray()
    async for piece in response.aiter_bytes():  # httpx2 decompresses at most 1 MiB at a time
        body += piece
        if len(body) > max_bytes:
            raise TooLarge(f"it is larger than {max_bytes:,} bytes")
    headers = {name.lower(): value for name, value in response.headers.items()}
    kind = headers.get("content-type", "").lower()
    waits, place = headers.get("retry-after"), headers.get("location")
    return Answer(response.status_code, kind, waits, place, bytes(body), headers)


@lru_cache(1)
def _tls() -> ssl.SSLContext:
    """Made once, for it reads all certificates of the system, and with it the library's loggers are set up: in their
    debug messages, which quote what a host answers, a key could stand. Whoever sets their levels still gets them."""
    import httpx2

    for logger in (logging.getLogger("httpx2"), logging.getLogger("httpcore2")):
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    return httpx2.create_ssl_context()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it; of several attempts the first."""
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Why there is no connection: the system's words, or the library's up to where it quotes what it received."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            resolver_or_tls = isinstance(cause, socket.gaierror | ssl.SSLError)  # their numbers are not the system's
            return str(cause.strerror) if resolver_or_tls else os.strerror(cause.errno)
    words = re.split(r":| b['\"]", str(error))[0].strip()[:100]
    return words or type(error).__name__
