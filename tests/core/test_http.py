"""One HTTP request: its deadline, its bounds, and whether it was sent, against local servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import logging
import os
import select
import signal
import socket
import ssl
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lens_core.io import http
from lens_core.io.http import BadAnswer, NotSent, TooLarge, UntrustedHost, get, post

SECRET = "sk-secret-0123456789"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzDVSLSbNogLeo5dw
yPsT/vN1+WxE7gSNB7HU36dYYDehRANCAAR63ZOb3IIM6pt0DNaB1A3yYTqabbBa
CqC7JsSu4BjkQP+pe9pN7py7c4czT7hOF/BxBsCkeVQg9kxxwTTYN5HO
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUTMK6P37QZaQ7IRoUVQ6vtUFQa8AwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjExMjIxOVoYDzIxMjYxMTAy
MTEyMjE5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR63ZOb3IIM6pt0DNaB1A3yYTqabbBaCqC7JsSu4BjkQP+pe9pN7py7
c4czT7hOF/BxBsCkeVQg9kxxwTTYN5HOo28wbTAdBgNVHQ4EFgQUrLdcNNZWOVU0
7VjKUALTJhP+IFMwHwYDVR0jBBgwFoAUrLdcNNZWOVU07VjKUALTJhP+IFMwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgNgdKWxmbF6+x7MCT5OgoU1zFf5H7MTChdhvGkFhTXxcCIE3X
a4zVNyCgMy4eUE1W0OCXThdugQqx0Kf5Ja31bsOd
-----END CERTIFICATE-----
"""  # of localhost, by itself, until 2126; it guards nothing


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that has `talk` with whoever connects."""

    def meet(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            talk(sock)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=meet, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # ends accept


def heard(sock: socket.socket) -> bytes:
    """A request, with its body, as the server receives it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def answers(data: bytes, requests: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    def talk(sock: socket.socket) -> None:
        request = heard(sock)
        if requests is not None:
            requests.append(request)
        sock.sendall(data)

    return talk


def silent(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    http._tls.cache_clear()
    yield
    http._tls.cache_clear()


@contextmanager
def within(low: float, high: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert low < time.monotonic() - begun < high


def test_get_and_post_send_what_they_are_given():
    requests: list[bytes] = []
    head = b"HTTP/1.1 418 x\r\nContent-Type: Text/HTML\r\nRetry-After: 7\r\nLocation: /x\r\nContent-Length: 2\r\n\r\nok"
    with serving(answers(head, requests)) as port:
        answer = get(f"http://127.0.0.1:{port}/a?b=c", {"X-Key": SECRET}, 20, 100)
        assert answer == http.Answer(418, "text/html", "7", "/x", b"ok")
        post(f"http://127.0.0.1:{port}/", {}, b"1234", 20, 100)
    assert requests[0].startswith(b"GET /a?b=c HTTP/1.1\r\n") and f"x-key: {SECRET}".encode() in requests[0].lower()
    assert requests[1].startswith(b"POST / HTTP/1.1\r\n") and requests[1].endswith(b"\r\n\r\n1234")
    assert all(b"accept-encoding: identity\r\n" in r.lower() and b"connection: close" in r.lower() for r in requests)


@pytest.mark.parametrize("place", ["/other", "http://host:99999999/"])
def test_a_redirect_is_an_answer(place):
    requests: list[bytes] = []
    with serving(
        answers(f"HTTP/1.1 302 x\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode(), requests)
    ) as port:
        answer = get(f"http://127.0.0.1:{port}/", {}, 20, 100)
    assert (answer.status, answer.location, len(requests)) == (302, place, 1)


def test_a_name_that_is_never_resolved_ends_at_the_deadline(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(60))
    try:
        with within(0.25, 5), pytest.raises(NotSent, match=r"no connection within 0\.3 s"):
            get("http://nobody.invalid/", {}, 0.3, 100)
        assert [t.daemon for t in threading.enumerate() if "look_up" in t.name] == [True]  # an exit does not wait
    finally:
        over.set()


def test_a_name_that_does_not_exist_is_not_sent(monkeypatch):
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NotSent, match=r"^Name or service not known$"):
        get("http://nobody.invalid/", {}, 20, 100)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_deadline_that_passes_in_the_handshake_is_not_sent_and_one_that_passes_later_is(scheme):
    kind, words = (NotSent, "no connection") if scheme == "https" else (TimeoutError, "no answer")
    with serving(silent) as port, within(0.25, 5), pytest.raises(kind, match=rf"{words} within 0\.3 s") as caught:
        post(f"{scheme}://127.0.0.1:{port}/", {}, b"x", 0.3, 100)
    assert isinstance(caught.value, NotSent) == (scheme == "https")
    gc.collect()  # a socket that was left open would warn here


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", b"what?\r\n\r\n"])
def test_a_connection_that_breaks_after_the_request_may_have_delivered_it(data):
    with serving(answers(data)) as port, pytest.raises(ConnectionError) as caught:
        post(f"http://127.0.0.1:{port}/", {}, b"x", 20, 100)
    assert not isinstance(caught.value, NotSent)


def test_nobody_at_home_is_not_sent():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(NotSent, match=r"^Connection refused$"):
            post(f"http://{host}:{port}/", {}, b"x", 20, 100)


def test_a_caller_with_an_event_loop_can_call():
    async def call(port: int) -> bytes:
        return get(f"http://127.0.0.1:{port}/", {}, 20, 100).body

    with serving(answers(OK)) as port:
        assert asyncio.run(call(port)) == b"ok"


def test_many_threads_can_call_at_once():
    def echo(sock: socket.socket) -> None:
        body = heard(sock).partition(b"\r\n\r\n")[2]
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    bodies = [str(n).encode() * (n % 7 + 1) for n in range(48)]
    with serving(echo) as port, ThreadPoolExecutor(16) as pool:
        bodies_received = pool.map(lambda body: post(f"http://127.0.0.1:{port}/", {}, body, 60, 1000).body, bodies)
        assert list(bodies_received) == bodies


def test_an_interrupt_ends_a_call():
    def talk(sock: socket.socket) -> None:
        heard(sock)
        os.kill(os.getpid(), signal.SIGINT)
        silent(sock)

    with serving(talk) as port, within(0, 30), pytest.raises(KeyboardInterrupt):
        get(f"http://127.0.0.1:{port}/", {}, 60, 100)


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip"])
def test_a_bomb_costs_bounded_memory(coding):
    data = gzip.compress(bytes(256 << 20), 1)
    data = gzip.compress(data) if "," in coding else data
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(data)}\r\n\r\n"
    with serving(answers(head.encode() + data)) as port:
        get_answer = lambda: get(f"http://127.0.0.1:{port}/", {}, 60, 1 << 20)  # noqa: E731
        with pytest.raises(TooLarge, match="larger than 1,048,576 bytes"):
            get_answer()  # what is imported at the first call is not counted
        tracemalloc.start()
        with pytest.raises(TooLarge):
            get_answer()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20


def test_the_bound_is_what_may_come():
    with serving(answers(OK)) as port:
        assert get(f"http://127.0.0.1:{port}/", {}, 20, 2).body == b"ok"
        with pytest.raises(TooLarge, match="larger than 1 bytes"):
            get(f"http://127.0.0.1:{port}/", {}, 20, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok",
        b"X: " + b"y" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_an_answer_that_cannot_be_used_is_a_bad_one(data):
    with serving(answers(b"HTTP/1.1 200 OK\r\n" + data)) as port, pytest.raises(BadAnswer):
        get(f"http://127.0.0.1:{port}/", {}, 20, 1000)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (f"Bearer {SECRET}\n", OK),
        (f"Bearer {SECRET}\u00fc\u4f60", OK),
        (SECRET, f"HTTP/1.1 {SECRET}\r\n\r\n".encode()),
        (SECRET, f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode()),
        (SECRET, f"HTTP/1.1 200 OK\r\nX: {SECRET}\x00\r\n\r\n".encode()),
        (SECRET, f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n".encode()),
        (SECRET, f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nX: {SECRET}\r\n\r\n{SECRET}".encode()),
    ],
)
def test_no_error_and_no_log_shows_a_header(value, data, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(answers(data)) as port, pytest.raises((OSError, ValueError)) as caught:
        get(f"http://127.0.0.1:{port}/?{SECRET}", {"Authorization": value}, 20, 1000)
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in text and "\n" not in str(caught.value) and 0 < len(str(caught.value)) <= 100


def secure(sock: socket.socket, folder: Path) -> ssl.SSLSocket:
    (folder / "host.pem").write_text(PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "host.pem")
    return context.wrap_socket(sock, server_side=True)


def test_only_a_host_with_a_trusted_certificate_is_spoken_to(tmp_path, monkeypatch):
    requests: list[bytes] = []

    def talk(sock: socket.socket) -> None:
        with secure(sock, tmp_path) as safe:
            answers(OK, requests)(safe)

    with serving(talk) as port:
        with pytest.raises(UntrustedHost, match="self-signed certificate"):
            get(f"https://localhost:{port}/", {"Authorization": SECRET}, 20, 100)
        assert requests == []
        http._tls.cache_clear()
        (tmp_path / "trusted.pem").write_text(PEM[PEM.index("-----BEGIN CERT") :])
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
        assert get(f"https://localhost:{port}/", {"Authorization": SECRET}, 20, 100).body == b"ok"
    assert len(requests) == 1


# Proxies, as the environment names them.


def test_a_proxy_receives_the_request_and_its_own_password(monkeypatch):
    requests: list[bytes] = []
    with serving(answers(OK, requests)) as port:
        monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{port}")
        assert post("http://far.invalid/x", {}, b"1", 20, 100).body == b"ok"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert get(f"http://127.0.0.1:{port}/direct", {}, 20, 100).body == b"ok"
    assert requests[0].startswith(b"POST http://far.invalid/x HTTP/1.1\r\n")
    assert b"proxy-authorization: basic " + base64.b64encode(b"me:p@ss").lower() in requests[0].lower()
    assert requests[1].startswith(b"GET /direct ") and b"proxy-authorization" not in requests[1].lower()


def test_a_tunnel_carries_the_request_and_the_proxy_sees_none_of_it(tmp_path, monkeypatch):
    seen: list[bytes] = []
    inside: list[bytes] = []

    def host(sock: socket.socket) -> None:
        with secure(sock, tmp_path) as safe:
            answers(OK, inside)(safe)

    def tunnel(sock: socket.socket) -> None:
        seen.append(heard(sock))
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection(("127.0.0.1", hosted)) as other:
            while True:
                for ready in select.select([sock, other], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    seen.append(data)
                    (other if ready is sock else sock).sendall(data)

    (tmp_path / "trusted.pem").write_text(PEM[PEM.index("-----BEGIN CERT") :])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    with serving(host) as hosted, serving(tunnel) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        answer = post("https://localhost/x", {"Authorization": SECRET}, b"body", 20, 100)
    assert answer.body == b"ok" and SECRET.encode() in inside[0] and inside[0].endswith(b"body")
    assert seen[0].startswith(b"CONNECT localhost:443 ") and not any(SECRET.encode() in piece for piece in seen)


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        (answers(b"HTTP/1.1 407 Authentication Required\r\nContent-Length: 0\r\n\r\n"), "407 Authentication Required"),
        (answers(b""), "disconnected"),
        (silent, "no connection within"),
    ],
)
def test_a_tunnel_that_does_not_come_about_is_not_sent(monkeypatch, proxy, words):
    with serving(proxy) as port:
        monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@127.0.0.1:{port}")
        with pytest.raises(NotSent, match=words) as caught:
            post("https://far.invalid/", {"Authorization": SECRET}, b"x", 0.5 if proxy is silent else 20, 100)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", ["socks4", "ftp"])
def test_a_proxy_of_an_unknown_kind_is_one_line_without_its_password(monkeypatch, kind):
    monkeypatch.setenv("http_proxy", f"{kind}://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(NotSent) as caught:
        get("http://far.invalid/", {}, 20, 100)
    assert "\n" not in str(caught.value) and SECRET not in "".join(traceback.format_exception(caught.value))
