"""`lens serve` against bad input: each has one clear status, and memory stays bounded."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_serve import guard
from lens_serve.bodies import BodyLimits
from lens_serve.errors import ApiError
from lens_serve.fields import Parsed, parse
from lens_serve.jobs import Limits
from openai import OpenAI
from serving import WAIT, Running, running, until

from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
MIB = 2**20


@pytest.fixture
def server(quick: LensPipeline) -> Iterator[Running]:
    with running(quick, Limits(max_pixels=64 * 64, max_images=4, max_steps=50)) as one:
        yield one


def resident() -> int:
    """Bytes of memory that this process holds, the server's included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says it is so large, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def form(*parts: tuple[str, bytes, str | None]) -> tuple[bytes, dict[str, str]]:
    """A multipart body of (name, data, filename or None), and its header."""
    body = b""
    for name, data, filename in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    return body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


# ---- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "limit"),
    [(GENERATIONS, "application/json", MIB), (EDITS, "multipart/form-data; boundary=b", 32 * MIB)],
)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_of_a_gigabyte_is_413_and_is_never_held(
    server: Running, path: str, kind: str, limit: int, declared: bool
) -> None:
    before, sent = resident(), 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        length = f"Content-Length: {10**9}" if declared else "Transfer-Encoding: chunked"
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n".encode()
        )
        piece = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"x" * 2**18
        answer = http.client.HTTPResponse(connection)
        while sent < 10**9:
            connection.sendall(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
            piece = b"x" * 2**18
            connection.settimeout(0.0)
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except BlockingIOError:
                pass
            finally:
                connection.settimeout(WAIT)
        answer.begin()
        error = json.loads(answer.read())["error"]
        answer.close()
    assert answer.status == 413 and error["code"] == "request_too_large"
    assert error["message"] == f"the body is larger than {limit // MIB} MiB, the most that this server reads"
    assert sent < 4 * limit + 64 * MIB and resident() - before < 80 * MIB
    assert server.ask("GET", "/health")[0] == 200


def test_the_client_gets_the_413_of_a_large_body_that_it_goes_on_sending(server: Running) -> None:
    status, error = server.error("POST", GENERATIONS, {"prompt": "a" * 8 * MIB})
    assert status == 413 and error["type"] == "invalid_request_error"


def test_a_prompt_of_a_megabyte_is_one_clear_line(server: Running) -> None:
    assert server.error("POST", GENERATIONS, {"prompt": "a" * MIB})[0] == 413
    status, error = server.error("POST", GENERATIONS, {"prompt": "a" * (MIB - 100)})
    assert status == 400 and error["param"] == "prompt" and error["message"].startswith("prompt has 1048476 characters")
    body, headers = form(("prompt", b"a" * (MIB + 1), None), ("image", png_header(1, 1), "a.png"))
    status, error = server.error("POST", EDITS, body, headers)
    assert status == 400 and "exceeded maximum size of 1024KB" in error["message"]


def test_a_body_that_does_not_come_ends_with_408(quick: LensPipeline) -> None:
    with running(quick, bodies=BodyLimits(seconds=0.2)) as server:
        for path, kind in ((GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=b")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\n"
                connection.sendall(head.encode() + b"--")
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert answer.status == 408 and json.loads(answer.read())["error"]["code"] == "request_timeout"
                answer.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(server: Running) -> None:
    body, headers = form(("image", b"x" * 3 * MIB, "a.png"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        head = f"POST {EDITS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {headers['Content-Type']}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: 2 * MIB])
    until(lambda: b'path="/v1/images/edits",status="499"} 1' in server.ask("GET", "/metrics")[2])
    assert server.engine.waiting == server.engine.running == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not []"),
        (b'"a"', "must be a JSON object"),
        (b"\xff\xfe{}", "UTF-16"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"prompt": "a", "prompt": "b"}', "a key stands twice"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "NaN is no number"),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', "-Infinity is no number"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "beyond a float's range"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
    ],
)
def test_what_is_no_json_is_400(server: Running, body: bytes, message: str) -> None:
    status, error = server.error("POST", GENERATIONS, body, {"Content-Type": "application/json"})
    assert status == 400 and message in error["message"] and error["code"] == "invalid_json"


def test_the_type_of_a_body_must_be_right(server: Running) -> None:
    for path, kind in ((GENERATIONS, "text/plain"), (GENERATIONS, ""), (EDITS, "application/json")):
        status, error = server.error("POST", path, b"{}", {"Content-Type": kind})
        assert status == 415 and "set Content-Type" in error["message"]


# ---- fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message", "param", "code"),
    [
        ({"step": 4}, "unknown field: 'step'. Did you mean 'steps'?", "step", "unknown_parameter"),
        ({"x" * 5000: 1}, "unknown field: 'xxx", "x" * 80, "unknown_parameter"),
        ({"svg": {}}, "the field 'svg' is not supported", "svg", "unsupported_parameter"),
        ({"strength": 0.5}, "use /v1/images/edits", "strength", "invalid_value"),
        ({"prompt": None}, "the field 'prompt' is missing", "prompt", "missing_required_parameter"),
        ({"prompt": ["a"]}, "prompt must be a text, not ['a']", "prompt", "invalid_type"),
        ({"prompt": ""}, "the prompt is empty", "prompt", "invalid_value"),
        ({"n": 0}, "n must be 1 to 2147483647, not 0", "n", "invalid_value"),
        ({"n": 5}, "n must be at most 4, not 5", "n", "invalid_value"),
        ({"n": "2"}, "n must be a whole number, not '2'", "n", "invalid_type"),
        ({"n": True}, "n must be a whole number", "n", "invalid_type"),
        ({"n": 1.5}, "n must be a whole number", "n", "invalid_type"),
        ({"size": "64"}, "size must be WIDTHxHEIGHT", "size", "invalid_value"),
        ({"size": "0x64"}, "size must be WIDTHxHEIGHT", "size", "invalid_value"),
        ({"size": "99999x99999"}, "16384", "size", "invalid_value"),
        ({"size": "33x32"}, "width 33 is not a multiple of 16 px", "size", "invalid_value"),
        ({"size": "128x64"}, "128x64 px has 8192 pixels, and this server draws at most 4096", "size", "invalid_value"),
        ({"steps": 51}, "steps must be at most 50 on this server, not 51", "steps", "invalid_value"),
        ({"steps": -1}, "steps must be 1 to", "steps", "invalid_value"),
        ({"guidance_scale": 1e300}, "guidance_scale must be -65536 to 65536", "guidance_scale", "invalid_value"),
        ({"seed": 2**64}, "seed must be 0 to", "seed", "invalid_value"),
        ({"sampler": "uler"}, "no sampler is called 'uler'", "sampler", "invalid_value"),
        ({"negative_prompt": 7}, "negative_prompt must be a text", "negative_prompt", "invalid_type"),
        ({"response_format": "png"}, "response_format must be b64_json or url", "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format must be png, jpeg or webp", "output_format", "invalid_value"),
        ({"output_compression": 50}, "no effect on png", "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background must be auto or opaque", "background", "invalid_value"),
        ({"quality": "best"}, "quality must be auto, low", "quality", "invalid_value"),
        ({"user": 5}, "user must be a text", "user", "invalid_type"),
        ({"stream": "true"}, "stream must be true or false", "stream", "invalid_type"),
        ({"partial_images": 4, "stream": True}, "partial_images must be 0 to 3", "partial_images", "invalid_value"),
        ({"partial_images": 1}, "set stream to true", "partial_images", "invalid_value"),
        (
            {"response_format": "url", "stream": True},
            "response_format url cannot be streamed; use b64_json",
            "response_format",
            "unsupported_value",
        ),
        ({"loras": ["a"]}, "loras must be an object", "loras", "invalid_value"),
        ({"loras": {"a": "b"}}, "loras.a must be a number", "loras.a", "invalid_type"),
        ({"loras": {"a": 1}}, "no LoRA is called 'a'", "loras", "invalid_value"),
    ],
)
def test_each_field_is_refused_by_its_name(
    server: Running, fields: dict[str, Any], message: str, param: str | None, code: str
) -> None:
    status, error = server.error("POST", GENERATIONS, {"prompt": "red", **fields})
    assert status == 400 and message in error["message"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert server.engine.counters.batches == 0


def test_another_model_is_404(server: Running) -> None:
    status, error = server.error("POST", GENERATIONS, {"prompt": "red", "model": "gpt-image-2"})
    assert status == 404 and error["code"] == "model_not_found" and "this is 'toy'" in error["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "n", "size", "stream", "partial_images", "loras", "seed", "steps", "guidance_scale", "strength",
     "quality", "user", "output_format", "output_compression", "model", "svg", "x", "négative"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.booleans())
def test_any_fields_are_a_request_or_an_api_error(fields: dict[str, Any], edit: bool) -> None:
    texts = {k: str(v) for k, v in fields.items() if not isinstance(v, dict)}  # as a form has them
    outcome: Parsed | ApiError
    try:
        outcome = parsed = parse({"prompt": "red", **(texts if edit else fields)}, "toy", edit=edit)
    except ApiError as error:
        outcome = error
    if isinstance(outcome, ApiError):
        assert outcome.status in (400, 404) and "\n" not in str(outcome) and len(str(outcome)) <= 500
    else:
        assert isinstance(parsed.draw.prompt, str)
        assert 1 <= parsed.draw.num_images < 2**31 and 0 <= parsed.answer.partial_images <= 3


# ---- forms and pictures -------------------------------------------------------------------------------------------


def test_a_picture_bomb_is_refused_from_its_header(server: Running) -> None:
    before = resident()
    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (4097, 4096)):
        for name in ("image", "mask"):
            first = ("image", png_header(8, 8) if name == "mask" else png_header(width, height), "a.png")
            parts = [first] + ([("mask", png_header(width, height), "m.png")] if name == "mask" else [])
            body, headers = form(("prompt", b"red", None), *parts)
            status, error = server.error("POST", EDITS, body, headers)
            assert status == 400 and error["code"] == "invalid_image" and error["param"] == name, error
            assert f"the {name}: " in error["message"]
    assert resident() - before < 50 * MIB


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(("prompt", b"red", None))[0], "the file 'image' is missing"),
        (form(("image", b"x", "a"))[0], "the field 'prompt' is missing"),
        (form(("prompt", b"red", None), ("prompt", b"blue", None))[0], "'prompt' stands twice"),
        (form(("prompt", b"red", None), ("photo", b"x", "a"), ("image", b"x", "a"))[0], "unknown file: 'photo'"),
        (
            form(("prompt", b"red", None), ("strength", b"nan", None), ("image", b"x", "a"))[0],
            "strength must be a number",
        ),
        (form(("prompt", b"red", None), ("n", b"two", None), ("image", b"x", "a"))[0], "n must be a whole number"),
        (
            form(("prompt", b"red", None), ("loras[a]", b"1", None), ("image", png_header(8, 8), "a"))[0],
            "no LoRA is called",
        ),
        (form(*[(f"f{i}", b"x", None) for i in range(65)])[0], "Too many fields"),
        (form(*[("image", b"x", "a")] * 17)[0], "Too many files"),
        (form(("prompt", b"red", None))[0][:-20], ""),
        (b"no form at all", "Invalid multipart data"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "the form cannot be read"),
        (b"", ""),
    ],
)
def test_faults_of_a_form_are_400(server: Running, body: bytes, message: str) -> None:
    status, error = server.error("POST", EDITS, body, {"Content-Type": "multipart/form-data; boundary=b"})
    assert status == 400 and message in error["message"]


def test_a_form_without_a_boundary_is_400(server: Running) -> None:
    status, error = server.error("POST", EDITS, b"x", {"Content-Type": "multipart/form-data"})
    assert status == 400 and "Missing boundary" in error["message"]


# ---- the guard ----------------------------------------------------------------------------------------------------

TOKEN = "a-token-of-some-length"


def test_with_a_token_only_those_who_have_it_get_in(
    quick: LensPipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compared = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    with running(quick, token=TOKEN) as server:
        with OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0) as client:
            assert client.images.generate(prompt="red").data
        with OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong") as fault:
                client.images.generate(prompt="red")
            assert fault.value.code == "invalid_api_key"
        assert compared[-1] == (b"wrong", TOKEN.encode())  # in constant time
        basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
        for header, expected in (
            (f"Bearer {TOKEN}", 200), (f"bearer {TOKEN}", 200), (f"Basic {basic}", 200), ("", 401), (TOKEN, 401),
            (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401), ("Bearer ", 401), ("Basic !!", 401),
            ("Bearer é", 401), (f"Basic {base64.b64encode(TOKEN.encode()).decode()}", 401),
        ):  # fmt: skip
            headers = {"Authorization": header.encode("latin-1").decode("latin-1")}
            for path in ("/v1/models", "/metrics", "/outputs/x", "/anything"):
                status, answer, body = server.ask("GET", path, headers=headers)
                assert (status == 401) == (expected == 401), (header, path)
                assert TOKEN.encode() not in body
            assert expected == 200 or answer["www-authenticate"].startswith("Basic")
        assert server.ask("GET", "/health")[0] == 200
        assert (
            server.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {TOKEN}", "Host": "a.example"})[0] == 200
        )
    out = capfd.readouterr()
    assert TOKEN not in out.out + out.err


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Host": "localhost"}, 200, None),
        ({"Host": "127.0.0.1:8000"}, 200, None),
        ({"Host": "[::1]:8000"}, 200, None),
        ({"Host": "rebound.example"}, 403, "host_not_allowed"),
        ({"Host": "127.0.0.1.rebound.example"}, 403, "host_not_allowed"),
        ({"Host": "10.0.0.1"}, 403, "host_not_allowed"),
        ({"Host": "[::"}, 403, "host_not_allowed"),
        ({"Host": ""}, 403, "host_not_allowed"),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200, None),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ({"Host": "localhost", "Origin": "http://localhost:9999"}, 403, "origin_not_allowed"),
        ({"Host": "localhost", "Origin": "null"}, 403, "origin_not_allowed"),
        ({"Host": "localhost", "Origin": "http://["}, 403, "origin_not_allowed"),
    ],
)
def test_pages_of_other_sites_get_nothing(
    server: Running, headers: dict[str, str], status: int, code: str | None
) -> None:
    got, _, body = server.ask("GET", "/v1/models", headers=headers)
    assert got == status and (code is None or json.loads(body)["error"]["code"] == code)


@pytest.mark.parametrize("token", ["short", "with a blank inside", "tokenwithümläuts-long", "line\nbreak-in-the-token"])
def test_a_token_that_cannot_protect_or_be_sent_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="16 characters or more") as fault:
        guard.checked_token(token, "the file")
    assert token not in str(fault.value)


def test_many_clients_at_once_that_send_nothing_do_not_keep_others_out(server: Running) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        begin = time.monotonic()
        assert server.ask("POST", GENERATIONS, {"prompt": "red"})[0] == 200
        assert time.monotonic() - begin < 5 and threading.active_count() < 50
    finally:
        for connection in idle:
            connection.close()
