"""One HTTP POST under one deadline, with a bound on the answer's size. Redirects are not followed.

Each request has a connection of its own: an answer can never be taken for that of another request, and no connection
can be half closed when the next request needs it. A chat takes seconds, the connection milliseconds.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from attrs import frozen

CHUNK = 1 << 16


class NotSent(OSError):
    """The connection could not be made, so nothing was sent and nothing can be billed."""


class TooLarge(ValueError):
    """The answer is larger than the caller takes."""


@frozen
class Answer:
    status: int
    kind: str  # Content-Type, in lower case
    retry_after: str | None
    location: str | None
    body: bytes


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; TimeoutError when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left


class _Reader(io.RawIOBase):
    """What a socket receives. The timeout of each read is what is left of the whole: a socket's own timeout starts
    anew with every byte."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left())
        return self._sock.recv_into(buffer)


class _Source:
    """The one thing that `http.client.HTTPResponse` asks of a socket."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._reader = io.BufferedReader(_Reader(sock, deadline), CHUNK)

    def makefile(self, *_: Any) -> io.BufferedReader:
        return self._reader


def check_url(url: str) -> str | None:
    """What is wrong with the address of an endpoint, or None. The address is not quoted: it may hold a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # ValueError where it is no port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must begin with http:// or https:// and name a host"
    if parts.username is not None or parts.password is not None:
        return "must not hold a user or a password; put the key into the variable that key_env names"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "holds a space or a character that no URL has"
    return None


def post(url: str, headers: Mapping[str, str], body: bytes, timeout: float, most: int) -> Answer:
    """Send `body` and return the answer, of at most `most` bytes after decompression.

    `timeout`, in seconds, bounds everything after the look-up of the host's address. Raises TimeoutError when it has
    passed; NotSent where no connection comes about, ssl.SSLCertVerificationError where the host is not who it says;
    OSError or http.client.HTTPException where the connection breaks; TooLarge; and ValueError for a body that cannot
    be decompressed.
    """
    deadline = _Deadline(timeout)
    parts = urllib.parse.urlsplit(url)
    try:
        sock, by_proxy = _connect(parts, deadline)
    except ssl.SSLCertVerificationError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host that IDNA cannot encode
        late = isinstance(error, TimeoutError)
        raise NotSent(f"no connection within {timeout:g} s" if late else _reason(error)) from None
    with sock:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        target, own = (url, _credentials(by_proxy)) if by_proxy and parts.scheme == "http" else (path, {})
        lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
        fixed = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        lines += [f"{name}: {value}" for name, value in {**fixed, **own, **headers}.items()]
        # An endpoint may refuse a request before it has read it: its answer, if there is one, says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            _send(sock, "\r\n".join([*lines, "", ""]).encode("ascii") + body, deadline)
        response = http.client.HTTPResponse(_Source(sock, deadline), method="POST")  # type: ignore[arg-type]
        response.begin()
        kind = (response.getheader("content-type") or "").lower()
        asks, location = response.getheader("retry-after"), response.getheader("location")
        return Answer(response.status, kind, asks, location, _body(response, most))


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text if isinstance(text, str) and text else type(error).__name__


def _connect(
    parts: urllib.parse.SplitResult, deadline: _Deadline
) -> tuple[socket.socket, urllib.parse.SplitResult | None]:
    """A socket to the endpoint, and the proxy that it goes through, if the environment names one."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxies = urllib.request.getproxies()
    name = proxies.get(parts.scheme) or proxies.get("all")
    if not name or urllib.request.proxy_bypass(f"{host}:{port}"):
        sock, proxy = _dial(host, port, deadline), None
    else:
        proxy = urllib.parse.urlsplit(name if "://" in name else f"http://{name}")
        if proxy.scheme != "http" or not proxy.hostname:
            raise OSError(f"a proxy of the kind {proxy.scheme!r} cannot be used; name one with http://")
        sock = _dial(proxy.hostname, proxy.port or 80, deadline)
    try:
        if parts.scheme == "https":
            if proxy is not None:
                _tunnel(sock, proxy, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", deadline)
            sock.settimeout(deadline.left())
            sock = _certificates().wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise
    return sock, proxy


def _dial(host: str, port: int, deadline: _Deadline) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError = OSError("the host has no address")
    for number, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            # An address that does not answer must leave time for the next one.
            sock.settimeout(deadline.left() / (len(found) - number))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _credentials(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _tunnel(sock: socket.socket, proxy: urllib.parse.SplitResult, place: str, deadline: _Deadline) -> None:
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}", *(f"{k}: {v}" for k, v in _credentials(proxy).items())]
    _send(sock, "\r\n".join([*lines, "", ""]).encode("ascii"), deadline)
    response = http.client.HTTPResponse(_Source(sock, deadline), method="CONNECT")  # type: ignore[arg-type]
    response.begin()
    if response.status != 200:
        raise OSError(f"the proxy answers HTTP {response.status}")


@lru_cache(1)
def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not {"SSL_CERT_FILE", "SSL_CERT_DIR"} & os.environ.keys():
        try:  # some Pythons bring no authorities of their own
            import certifi

            context.load_verify_locations(certifi.where())
        except ImportError:
            pass
    return context


def _send(sock: socket.socket, data: bytes, deadline: _Deadline) -> None:
    view = memoryview(data)
    while view:
        sock.settimeout(deadline.left())
        view = view[sock.send(view[:CHUNK]) :]


def _body(response: http.client.HTTPResponse, most: int) -> bytes:
    """The whole body, decompressed piece by piece so that a small one cannot unfold beyond `most` bytes."""
    kind = (response.getheader("content-encoding") or "identity").strip().lower()
    if kind not in ("identity", "gzip", "x-gzip", "deflate"):
        raise ValueError("it is compressed in a way that was not asked for")
    unfold = None if kind == "identity" else zlib.decompressobj(wbits=47)  # 47: gzip or zlib, by its header
    found = bytearray()
    try:
        while piece := response.read(CHUNK):
            while piece:
                found += piece if unfold is None else unfold.decompress(piece, most + 1 - len(found))
                if len(found) > most:
                    raise TooLarge(f"it is larger than {most:,} bytes")
                piece = b"" if unfold is None else unfold.unconsumed_tail
    except zlib.error as error:
        raise ValueError("it cannot be decompressed") from error
    if response.length or (unfold is not None and not unfold.eof):
        raise http.client.IncompleteRead(b"")
    return bytes(found)
