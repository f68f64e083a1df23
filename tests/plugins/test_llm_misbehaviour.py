"""What a server can do wrong, as a table: which fault it is, how often it is asked, what it costs, what is cached."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import socket
import threading
import time
import traceback
import tracemalloc
import urllib.parse
import zlib
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
import torch
from attrs import frozen
from lens_llm.budget import LLMError
from lens_llm.client import LARGEST, OpenAI
from lens_llm.rubric import RubricReward
from test_llm_client import ASK, KEY, SCHEMA, client, endpoint, fault, refuse, reset, send  # noqa: F401  # fixtures

from lens_core.config import structure
from lens_core.io.http import post
from lens_core.io.redaction import redact
from lens_core.io.retries import retry_after_seconds
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, Message, Prompt

PRICES = {"price_in": 1.0, "price_out": 2.0, "max_tokens": 1000}
PAID = 1000e-6 + 100 * 2e-6  # an answer of the endpoint: 1,000 tokens in, 100 out
DEEP = 100_000


def form(content: Any = "ok", usage: Any = "sound", choice: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A chat completion with parts of it changed; `usage` None leaves it out."""
    sound = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    first = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    body = {"id": "1", "object": "chat.completion", "choices": [{**first, **(choice or {})}], **top}
    return body if usage is None else {**body, "usage": sound if usage == "sound" else usage}


def says(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> Callable[[Any], None]:
    text = body if isinstance(body, str) else json.dumps(body)
    return lambda handler: send(handler, status, text, kind, **headers)


def used(tokens_in: Any, tokens_out: Any = 100) -> Callable[[Any], None]:
    return says(form(usage={"prompt_tokens": tokens_in, "completion_tokens": tokens_out}))


def raw(*pieces: bytes, pause: float = 0.0) -> Callable[[Any], None]:
    """Bytes as they are, from the status line on, and then the end of the connection."""

    def step(handler: Any) -> None:
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return step


def packed(data: bytes, coding: str, length: int | None = None) -> Callable[[Any], None]:
    size = len(data) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: {coding}\r\n"
    return raw(f"{head}Content-Length: {size}\r\n\r\n".encode() + data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
GOOD = json.dumps(form()).encode()


def endless(handler: Any) -> None:
    handler.wfile.write(HEAD + b"\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


def endless_chunks(handler: Any) -> None:
    handler.wfile.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        handler.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")


def endless_headers(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X: y\r\n" * 1000)


def moved(handler: Any) -> None:
    send(handler, 302, "", Location=f"http://127.0.0.1:{handler.server.server_port}/elsewhere")


BOMBS = {"gzip": gzip.compress(b" " * (64 << 20), 1), "deflate": zlib.compress(b" " * (64 << 20), 1)}


@frozen
class Case:
    """`words` of the error, or None where the chat succeeds with `answer`; `calls` it took; `usd` it cost, where
    "reserved" is the highest price of a call; whether the answer is `cached`."""

    name: str
    step: Any
    words: str | None = None
    calls: int = 1
    usd: Any = PAID
    answer: Any = "ok"
    schema: Any = None

    @property
    def cached(self) -> bool:
        return self.words is None


R = "reserved"
N = {"n": 3}


def passing(name: str, step: Any, usd: float | str = R) -> Case:
    """A fault that may pass: asked again, and answered then."""
    return Case(name, step, calls=2, usd=(usd, PAID))


def lasting(name: str, step: Any, words: str, usd: Any = R, schema: Any = None) -> Case:
    """A fault that will not pass: an error after one call."""
    return Case(name, step, words, usd=usd, schema=schema)


def read(name: str, content: str) -> Case:
    """JSON that is read although something is around it, without another call."""
    return Case(name, says(form(content)), answer=N, schema=SCHEMA)


def unsaid(name: str, *usage: Any) -> Case:
    """An answer whose usage cannot be true: it is used, and its reservation charged."""
    return Case(name, used(*usage), usd=R)


NOT = "not a chat completion"
CASES = [
    # the connection and HTTP
    passing("drips its body", raw(HEAD + b"Content-Length: 99\r\n\r\n", *[b" "] * 40, pause=0.05)),
    passing("drips its headers", raw(*[bytes([b]) for b in HEAD[:40]], pause=0.05)),
    passing("drips chunks", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 40, pause=0.05)),
    passing("goes on and on with 100 Continue", raw(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 40, pause=0.05)),
    lasting("never ends its body", endless, "larger than"),
    lasting("never ends its chunks", endless_chunks, "larger than"),
    passing("never ends its headers", endless_headers),
    lasting("gzip bomb", packed(BOMBS["gzip"], "gzip"), "larger than"),
    lasting("deflate bomb", packed(BOMBS["deflate"], "deflate"), "larger than"),
    Case("gzip, though not asked for", packed(gzip.compress(GOOD), "gzip")),
    passing("half a gzip", packed(gzip.compress(GOOD)[:-12], "gzip")),
    passing("gzip that is none", packed(b"hello", "gzip")),
    passing("an encoding that nobody asked for", packed(b"hello", "br")),
    passing("closes before it answers", raw()),
    passing("resets the connection", reset),
    passing("a body shorter than it says", packed(GOOD, "identity", 10_000)),
    passing("chunks that are none", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n")),
    passing("speaks no HTTP", raw(b"\x00\xff\xfe" * 50 + b"\r\n")),
    passing("a status that is no number", raw(b"HTTP/1.1 two OK\r\n\r\n")),
    passing("a header of 100 KB", raw(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n")),
    passing("an empty body", says("")),
    passing("a length that is no number", raw(HEAD + b"Content-Length: x\r\n\r\n" + GOOD)),  # RFC 9112, 6.3: discard it
    lasting("redirects", moved, "redirects", 0),
    lasting("answers 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), NOT),
    # statuses and Retry-After
    passing("429, asks to wait since 1970", fault(429, Retry_After=formatdate(0)), 0),
    passing("503, asks to wait nan", fault(503, Retry_After="nan"), 0),
    passing("503, asks to wait -5", fault(503, Retry_After="-5"), 0),
    passing("429, asks to wait until Febtember", fault(429, Retry_After="Mon, 99 Febtember 20000"), 0),
    passing("429, asks to wait 7.5", fault(429, Retry_After="7.5"), 0),
    lasting("429, asks to wait 400 digits", fault(429, Retry_After="9" * 400), "more than patience", 0),
    lasting("429, asks to wait until 9999", fault(429, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT"), "patience", 0),
    lasting("a status of 999", fault(999), "HTTP 999", 0),
    lasting("401 with a body nested deep", says("[" * DEEP, 401), "HTTP 401", 0),
    passing("500 with a body that is no text", raw(b"HTTP/1.1 500 x\r\nContent-Length: 2\r\n\r\n\xff\xfe"), 0),
    passing("200 and error 429", says({"error": {"code": 429, "message": "slow"}}), 0),
    passing("200 and error '503'", says({"error": {"code": "503", "message": "busy"}}), 0),
    passing("200 and rate_limit_exceeded", says({"error": {"code": "rate_limit_exceeded"}}), 0),
    lasting("200 and error 401", says({"error": {"code": 401, "message": "who are you"}}), "HTTP 401: who are you", 0),
    lasting("200 and error 200", says({"error": {"code": 200, "message": "odd"}}), "reports an error: odd"),
    lasting("200 and an error of words", says({"error": "no such luck"}), "reports an error: no such luck"),
    passing("an error in its choice", says(form(None, choice={"error": {"code": 502, "message": "x"}})), 0),
    # the form of an answer
    lasting("choices is a number", says({"choices": 5}), NOT),
    lasting("choices is empty", says({"choices": []}), NOT),
    lasting("choices is an object", says({"choices": {"0": 1}}), NOT),
    lasting("a choice is a number", says({"choices": [1]}), NOT),
    lasting("a message is text", says({"choices": [{"message": "a"}]}), NOT),
    lasting("a list", says([1, 2]), NOT),
    lasting("null", says("null"), NOT),
    lasting("a page", says("<html>Sign in</html>", kind="text/html"), "check base_url: <html>"),
    passing("JSON nested deep", says("[" * DEEP)),
    passing("objects nested deep", says('{"a":' * DEEP)),
    passing("half of the JSON", says(json.dumps(form())[:-9])),
    passing("a number of 10,000 digits", says('{"choices": ' + "9" * 10_000 + "}")),
    lasting("content is a number", says(form(5)), "has no text", PAID),
    lasting("content is blank", says(form("  \n")), "has no text", PAID),
    lasting("a refusal", refuse, "refused: I will not look", PAID),
    lasting("a refusal by filter", says(form("ha", choice={"finish_reason": "content_filter"})), "refused", PAID),
    lasting("cut off", says(form("half a", choice={"finish_reason": "length"})), r"max_tokens \(1000\)", PAID),
    lasting("cut JSON", says(form('{"n": ', choice={"finish_reason": "length"})), "max_tokens", PAID, SCHEMA),
    lasting("calls a tool", says(form("x", choice={"finish_reason": "tool_calls"})), "'tool_calls'", PAID),
    lasting("a reason that is a list", says(form("x", choice={"finish_reason": [1]})), "not finished", PAID),
    passing("was aborted", says(form("x", choice={"finish_reason": "abort"})), PAID),
    Case("content in parts", says(form([{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]))),
    Case("half a character", says(form("ok \ud800")), answer="ok \ufffd"),
    Case("its key in the answer", says(form(f"it is {KEY}")), answer="it is [key]"),
    # JSON with something around it
    read("in a fence", '```json\n{"n": 3}\n```'),
    read("after words, in a fence", 'Here it is:\n```\n{"n": 3}\n```\nDone.'),
    read("after thoughts", '<think>{"n": 1}? No.</think>\n{"n": 3}'),
    read("after thoughts, in a fence", '<think>\n```json\n{"n": 1}\n```\n</think>```json\n{"n": 3}```'),
    read("after thoughts that the template opened", 'So 3.</think>{"n": 3}'),
    read("after words", 'The answer is {"n": 3}.'),
    read("with a BOM", '\ufeff{"n": 3}'),
    Case(
        "JSON nested deep for an answer",
        says(form("[" * DEEP)),
        "still wrong after one repair",
        2,
        PAID + PAID,
        schema=SCHEMA,
    ),
    Case("NaN for a number", says(form('{"n": NaN}')), "still wrong after one repair", 2, PAID + PAID, schema=SCHEMA),
    # usage
    unsaid("usage is negative", -1_000_000_000),
    unsaid("usage is negative, out", 1000, -5),
    unsaid("usage is nothing", 0, 0),
    unsaid("usage is a fraction", 10.5),
    unsaid("usage is true", True),
    unsaid("usage is text", "1000"),
    unsaid("usage is absurd", 10**12),
    unsaid("usage is absurd, out", 1000, 10**15),
    Case("usage is a list", says(form(usage=[1])), usd=R),
    Case("usage is absent", says(form(usage=None)), usd=R),
    passing("usage is NaN", says(json.dumps(form(usage={"prompt_tokens": float("nan"), "completion_tokens": 1})))),
]


def test_the_table_has_sixty_rows_and_no_name_twice():
    assert len({c.name for c in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_misbehaviour_is_a_fault_of_its_call(case, endpoint, client, tmp_path):  # noqa: F811
    endpoint.script = [case.step]
    llm = client(retries=1, timeout=0.8, cache=str(tmp_path), **PRICES)
    begun = time.monotonic()
    if case.words is None:
        assert llm.chat(ASK, case.schema) == case.answer
    else:
        with pytest.raises(LLMError, match=case.words) as caught:
            llm.chat(ASK, case.schema)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and KEY not in str(caught.value)
    assert time.monotonic() - begun < 10  # of which a drip takes its second; nothing is waited out
    assert len(endpoint.bodies) == llm.spend.calls == case.calls
    reserved = llm.estimate(ASK, case.schema).usd
    costs = case.usd if isinstance(case.usd, tuple) else (case.usd,)
    assert llm.spend.usd == pytest.approx(sum(reserved if c == R else c for c in costs))
    assert llm.budget.reserved == 0
    files = [p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == case.cached and not any(KEY in f for f in files)
    if case.cached:
        again = client(cache=str(tmp_path), **PRICES)
        assert again.chat(ASK, case.schema) == case.answer and again.spend.calls == 0


@pytest.mark.parametrize(
    ("content", "reason", "answer"),
    [("half a", "length", "half a"), ("", "stop", ""), ("  \n", "stop", "  \n"), ("", "max_tokens", "")],
)
def test_a_text_that_is_cut_off_or_blank_is_an_answer_as_it_is(content, reason, answer, endpoint, client, tmp_path):  # noqa: F811
    endpoint.reply = lambda body: ""
    endpoint.script = [says(form(content, choice={"finish_reason": reason}))] * 2
    assert client(as_is=True, cache=str(tmp_path), **PRICES).chat(ASK) == answer
    assert client(as_is=True, cache=str(tmp_path), **PRICES).chat(ASK) == answer and len(endpoint.bodies) == 1
    with pytest.raises(LLMError, match=r"cut off|has no text"):
        client(cache=str(tmp_path), retries=0, **PRICES).chat(ASK)
    assert len(endpoint.bodies) == 2, "its cache is another"


def test_thoughts_alone_a_refusal_and_cut_json_are_no_answers_as_they_are(endpoint, client):  # noqa: F811
    for content, choice, schema in [
        (None, {"finish_reason": "length"}, None),
        ("x", {"finish_reason": "content_filter"}, None),
        ('{"n": ', {"finish_reason": "length"}, SCHEMA),
    ]:
        endpoint.script = [says(form(content, choice=choice))]
        with pytest.raises(LLMError):
            client(as_is=True, retries=0).chat(ASK, schema)


def test_an_answer_without_end_costs_bounded_memory(endpoint, client):  # noqa: F811
    for step in (endless, endless_chunks, packed(BOMBS["gzip"], "gzip")):
        endpoint.script = [step]
        tracemalloc.start()
        with pytest.raises(LLMError, match="larger than"):
            client(retries=0).chat(ASK)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * LARGEST


def test_a_call_ends_at_its_deadline_whatever_the_server_does(endpoint, client):  # noqa: F811
    for pause in (0.02, 0.3):
        endpoint.script = [raw(HEAD + b"\r\n", *[b" "] * 200, pause=pause)]
        begun = time.monotonic()
        with pytest.raises(LLMError, match=r"no answer within 0\.5 s"):
            client(retries=0, timeout=0.5).chat(ASK)
        assert 0.45 < time.monotonic() - begun < 1.5


def test_a_server_that_does_not_read_is_left_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            post(f"http://127.0.0.1:{deaf.getsockname()[1]}/", {}, b"x" * (32 << 20), 0.5, 1000)
        assert time.monotonic() - begun < 2


def test_nobody_at_home_costs_nothing(client):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    llm = client(base_url=f"http://127.0.0.1:{port}/v1", retries=1, **PRICES)
    with pytest.raises(LLMError, match=r"connection failed: .*refused.*\(2 attempts\)"):
        llm.chat(ASK)
    assert llm.spend.usd == 0 and llm.spend.calls == 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("", 0), ("x", 0), ("nan", 0), ("-3", 0), ("2.5", 2.5), ("9" * 400, float("inf")), (formatdate(0), 0),
     ("Mon, 01 Jan 0001 00:00:00 -9999", 0), ("1 2 3 4 5 6 7", 0), ("\u0663", 3)],
)  # fmt: skip
def test_a_header_that_asks_to_wait_is_a_number_of_seconds_or_nothing(header, seconds):
    assert retry_after_seconds(header) == seconds


def test_a_budget_cannot_be_talked_away(endpoint, client):  # noqa: F811
    endpoint.reply = lambda body: "never"
    endpoint.script = [used(-1_000_000_000)] * 20
    llm = client(**PRICES, max_usd=0.01)
    done = llm.map(lambda n: llm.chat([Message("user", f"{n:05}")]), range(20))
    assert len(endpoint.bodies) == 4  # 4 x $0.002011 fit into a cent, and a fifth does not
    assert llm.spend.usd == pytest.approx(4 * 0.002011) and done.count("ok") == 4


DAMAGED = [
    b"[" * DEEP,
    b'{"text": ' + b"[" * DEEP,
    b"5",
    b'{"text": NaN}',
    b'{"text": "\\ud800"}',
    b"\xff\xfe",
    b" " * 5_000_000,
]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_cache_entry_is_asked_anew(endpoint, client, tmp_path, damage):  # noqa: F811
    endpoint.reply = lambda body: '{"n": 1}'
    llm = client(cache=str(tmp_path))
    llm.chat(ASK, SCHEMA)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damage)
    assert llm.chat(ASK, SCHEMA) == {"n": 1} and len(endpoint.bodies) == 2
    path.write_bytes(json.dumps({"text": "[" * DEEP}).encode())
    assert llm.chat(ASK, SCHEMA) == {"n": 1} and len(endpoint.bodies) == 3
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        assert llm.chat(ASK, SCHEMA) == {"n": 1}


def test_a_cache_that_cannot_be_written_is_warned_of_once_and_answers_are_used(endpoint, client, tmp_path):  # noqa: F811
    file = tmp_path / "file"
    file.write_text("")
    llm = client(cache=str(file / "cache"))
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        assert llm.map(lambda n: llm.chat([Message("user", str(n))]), range(9)) == ["ok"] * 9
    assert len(caught) == 1 and llm.spend.calls == 9


def test_a_full_disk_leaves_no_unfinished_file(endpoint, client, tmp_path, monkeypatch):  # noqa: F811
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lens_llm.cache.os.replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert client(cache=str(tmp_path)).chat(ASK) == "ok"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_any_field_of_a_request_can_be_renamed_set_or_left_out(endpoint, client):  # noqa: F811
    llm = client(
        max_tokens=77, rename={"max_tokens": "max_completion_tokens"}, request={"temperature": None, "top_p": 0.5}
    )
    llm.chat(ASK)
    (body,) = endpoint.bodies
    assert body == {"model": "m", "messages": body["messages"], "max_completion_tokens": 77, "top_p": 0.5}
    llm = client(
        request={"max_tokens": None, "max_completion_tokens": 5000, "response_format": {"type": "json_object"}}
    )
    endpoint.reply = lambda body: '{"n": 1}'
    llm.chat(ASK, SCHEMA)
    body = endpoint.bodies[1]
    assert body["max_completion_tokens"] == 5000 and "max_tokens" not in body
    assert body["response_format"] == {"type": "json_object"} and json.dumps(SCHEMA) in body["messages"][-1]["content"]
    assert llm.estimate(ASK).tokens_out == 5000


def test_the_fields_of_a_request_are_another_question_to_a_cache(endpoint, client, tmp_path):  # noqa: F811
    endpoint.reply = lambda body: f"answer {len(endpoint.bodies)}"
    for options in ({}, {"request": {"top_p": 0.5}}, {"rename": {"max_tokens": "max_completion_tokens"}}):
        client(cache=str(tmp_path), **options).chat(ASK)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request": {"messages": []}}, "messages"),
        ({"request": {"stream": True}}, "stream"),
        ({"request": {"n": 5}}, "n: 1"),
        ({"request": {"max_tokens": -1}}, "max_tokens"),
        ({"request": {"x": float("nan")}}, "JSON"),
        ({"request": {"x": {1, 2}}}, "JSON"),
        ({"rename": {"max_tokens": "temperature"}}, "one name"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"max_usd": float("nan"), "price_in": 1.0}, "max_usd"),
        ({"max_usd": -1.0, "price_in": 1.0}, "max_usd"),
        ({"max_calls": -1}, "max_calls"),
        ({"price_in": float("nan")}, "price_in"),
        ({"temperature": float("inf")}, "temperature"),
        ({"concurrency": 10**9}, "concurrency"),
        ({"base_url": "ftp://x/"}, "base_url"),
        ({"base_url": "http://x:99999999/"}, "base_url"),
        ({"base_url": "http://a b/"}, "base_url"),
        ({"cache": "a\0b"}, "NUL"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        OpenAI.Config("m", **options)


def test_a_redirect_is_not_followed_and_the_key_goes_nowhere(endpoint, client):  # noqa: F811
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as thief:
        thief.settimeout(0.5)
        for status in (301, 302, 303, 307, 308):
            place = f"http://127.0.0.1:{thief.getsockname()[1]}/"
            endpoint.script = [lambda h, s=status, p=place: send(h, s, "", Location=p)]
            with pytest.raises(LLMError, match=f"HTTP {status}: it redirects to http"):
                client().chat(ASK)
        with pytest.raises(TimeoutError):
            seen.append(thief.accept()[0].recv(9999))
    assert seen == []


# The key: in no text that leaves the process.

OTHER = 'sk/a+b"c&\\d=0123456789'  # all that quoting changes


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize(
    "spelling",
    [
        str,
        repr,
        json.dumps,
        urllib.parse.quote,
        lambda k: urllib.parse.quote(k, safe=""),
        urllib.parse.quote_plus,
        lambda k: base64.b64encode(k.encode()).decode(),
        lambda k: base64.b64encode(f":{k}".encode()).decode(),
        lambda k: base64.b64encode(f"user:{k}".encode()).decode(),
        lambda k: base64.urlsafe_b64encode(f"{k}:".encode()).decode(),
        lambda k: k.encode().hex(),
        lambda k: k.upper(),
        lambda k: f"Bearer {k[:12]}",
        lambda k: f"...{k[6:]}",
        lambda k: f"{k[:6]}********{k[-4:]}",
        lambda k: f"{k[:4]}...",
        lambda k: "".join(f"\\u{ord(c):04x}" for c in k),
    ],
)  # fmt: skip
def test_no_spelling_of_the_key_passes(key, spelling):
    text = f"it says {spelling(key)} here"
    clean = redact(text, key)
    assert clean.startswith("it says ") and clean.endswith(" here") and "[key]" in clean
    shown = clean.replace("[key]", "\0")
    for form in {key, spelling(key)}:
        assert not any(form[i : i + 8] in shown for i in range(len(form) - 7))


def test_redaction_leaves_other_texts_alone():
    for text in ("wait... for it", "a **bold** word", "0123 4567", "", "sk- is how keys begin", "你好 …"):
        assert redact(text, KEY) == text
    assert redact("the box is not EMPTY: EMPTYING", "EMPTY") == "the box is not [key]: EMPTYING"


def test_a_key_with_the_end_of_a_line_is_stripped(endpoint, client, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LENS_TEST_KEY", f" {KEY}\n")
    endpoint.script = [fault(401, f"no: {KEY} or {KEY!r}")]
    with pytest.raises(LLMError) as caught:
        client().chat(ASK)
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}" and KEY not in str(caught.value)


@pytest.mark.parametrize(
    "inside",
    ["sk-secret\n0123456789", "sk-secret 0123456789", "sk-secret\r\nX: y", "sk-schlüssel0123", "sk\x00secret01234"],
)
def test_a_key_that_cannot_be_one_is_refused_by_its_variable_before_a_connection(endpoint, client, monkeypatch, inside):  # noqa: F811
    if "\0" in inside:
        monkeypatch.setattr("lens_llm.client.os.environ", {"LENS_TEST_KEY": inside})
    else:
        monkeypatch.setenv("LENS_TEST_KEY", inside)
    llm = client()
    with pytest.raises(LLMError, match="LENS_TEST_KEY holds a space") as caught:
        llm.chat(ASK)
    assert "secret" not in str(caught.value) and "schl" not in str(caught.value)
    assert endpoint.bodies == [] and llm.spend.calls == 0


@pytest.mark.parametrize(
    "pasted", ["sk_abc0123456789", "sk-abc", "AIzaSyA0123456789", "hf_QqWwEeRrTt", "ABCDEF0123456789ABCDEF", "A" * 40]
)
def test_a_key_pasted_for_its_name_is_not_echoed(pasted):
    with pytest.raises(ConfigError, match="key_env must be the name") as caught:
        OpenAI.Config("m", key_env=pasted)
    assert pasted not in str(caught.value)
    assert OpenAI.Config("m", key_env="MY_API_KEY_2").key_env == "MY_API_KEY_2"


@pytest.mark.parametrize(
    "pasted",
    [12345678901234567890, 1234567890.5, True, None, [KEY], {KEY: None}, {"key": KEY}, [[{KEY: KEY}]]],
    ids=str,
)
def test_a_key_that_yaml_takes_for_no_text_is_not_echoed(pasted):
    shown = {KEY, "1234567890"}
    with pytest.raises(ConfigError) as caught:
        structure(OpenAI.Config, {"model": "m", "key_env": pasted, "timeout": "soon"}, "$.llm")
    words = "must be the name of an environment variable, such as OPENAI_API_KEY"
    assert list(caught.value.problems) == [f"$.llm.key_env: {words}", "$.llm.timeout: must be a number, not 'soon'"]
    assert not any(part in str(caught.value) for part in shown)
    with pytest.raises(ConfigError, match="key_env must be the name") as again:
        OpenAI.Config("m", key_env=pasted)
    assert not any(part in str(again.value) for part in shown)
    if pasted is not None:
        with pytest.raises(ConfigError, match=r"\$\.base_url: must be a URL$"):
            structure(OpenAI.Config, {"model": "m", "base_url": pasted})


def test_a_password_in_an_address_is_refused_and_not_echoed(client, monkeypatch):  # noqa: F811
    with pytest.raises(ConfigError, match="base_url must not hold") as caught:
        OpenAI.Config("m", base_url=f"https://me:{KEY}@host/v1")
    assert KEY not in str(caught.value)
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://me:{KEY}@host/v1")
    with pytest.raises(LLMError, match="OPENAI_BASE_URL must not hold") as seen:
        client(base_url=None).chat(ASK)
    assert KEY not in str(seen.value)


def test_the_key_stands_in_no_evidence_cache_log_or_traceback(endpoint, client, tmp_path, caplog, capfd):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    hidden = "".join(f"\\u{ord(c):04x}" for c in KEY)
    schema = {"type": "object", "properties": {"e": {"type": "string"}}, "required": ["e"]}
    endpoint.script = [f'{{"e": "{KEY}"}}', f'{{"e": "{hidden}", "{KEY}": 1}}']
    llm = client(cache=str(tmp_path), retries=0)
    for n in range(2):
        assert llm.chat([Message("user", str(n))], schema)["e"] == "[key]"
    texts = [repr(llm), repr(vars(llm)), repr(llm.config)]
    wrong = json.dumps({KEY: 1})
    strict = {**SCHEMA, "properties": {}}
    for script in ([fault(500, KEY)], [reset], [raw(f"HTTP/1.1 {KEY}\r\n\r\n".encode())], [wrong, wrong]):
        endpoint.script = list(script)
        with pytest.raises(LLMError) as caught:
            llm.chat([Message("user", "x")], {**strict, "required": []})
        texts.append("".join(traceback.format_exception(caught.value)))
    files = [p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 2 and caplog.text
    out = capfd.readouterr()
    assert not any(KEY in text or hidden in text for text in [*files, *texts, caplog.text, out.out, out.err])
    assert all(KEY not in json.dumps(body) for body in endpoint.bodies)  # a repair does not say it either


def test_requests_of_threads_do_not_mix(endpoint, client):  # noqa: F811
    endpoint.reply = lambda body: body["messages"][0]["content"]
    llm = client(concurrency=16)
    texts = [f"{n} " * (n % 7 + 1) for n in range(64)]
    assert llm.map(lambda t: llm.chat([Message("user", t)]), texts) == texts
    assert threading.active_count() < 40


def test_no_misbehaviour_reaches_a_rollout_as_anything_but_a_failed_picture(endpoint, client):  # noqa: F811
    quick = [c for c in CASES if "drips" not in c.name and "goes on and on" not in c.name]
    data = {"rubrics": [{"id": "r0", "q": "Is it red?"}], "global": {"id": "g", "q": "Is it whole?"}}
    good = json.dumps({"verdicts": [{"id": i, "evidence": "", "v": "yes"} for i in ("r0", "g")]})
    endpoint.reply = lambda body: good
    endpoint.script = [step for case in quick for step in [case.step] * 2]  # a repair meets the same fault
    reward = RubricReward(RubricReward.Config(ComponentSpec("openai")), client(retries=0, timeout=5.0, concurrency=1))
    prompts = [Prompt(f"p{n}", n, data=data) for n in range(2 * len(quick) + 1)]
    scores = reward.score(torch.zeros(len(prompts), 3, 4, 4, dtype=torch.uint8), prompts)
    assert endpoint.script == [] and scores[-1].value == 1.0
    assert all(s.status == "ok" if s.value == 1.0 else s.status == "failed" and s.evidence for s in scores)
    assert sum(s.status == "failed" for s in scores) >= 60
