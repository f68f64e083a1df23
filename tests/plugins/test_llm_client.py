"""The llm openai against a local server that speaks the real protocol, faults included."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from lens_llm.budget import BudgetError, LLMError
from lens_llm.client import OpenAI
from lens_llm.json_answers import unfit

from lens_core.types import ConfigError, LensError, Message

KEY = "sk-secret-0123456789"
ASK = [Message("user", "hello")]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


class Endpoint:
    """Answers request i with `script[i]`, then always with `reply(body)`. A step is text (an answer), or a function of
    the request handler."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.reply: Callable[[dict[str, Any]], str] = lambda body: "ok"
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    step = endpoint.script.pop(0) if endpoint.script else endpoint.reply
                    endpoint.bodies.append(body)
                    endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                    endpoint.busy += 1
                    endpoint.most = max(endpoint.most, endpoint.busy)
                try:
                    if isinstance(step, str):
                        answer(self, step)
                    elif step is endpoint.reply:
                        answer(self, step(body))
                    else:
                        step(self)
                except OSError:
                    pass  # the client has gone
                finally:
                    with endpoint.lock:
                        endpoint.busy -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def hang(self, handler: Any) -> None:
        """Never answers while the test runs."""
        self.over.wait(60)


def send(handler: Any, status: int, body: str, kind: str = "application/json", **headers: str) -> None:
    data = body.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def answer(handler: Any, text: str | None, **message: Any) -> None:
    """A chat completion that used 1,000 tokens in and 100 out."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    form = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    send(handler, 200, json.dumps(form))


def fault(status: int, words: str = "busy", **headers: str) -> Callable[[Any], None]:
    return lambda handler: send(handler, status, json.dumps({"error": {"message": words}}), **headers)


def reset(handler: Any) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def refuse(handler: Any) -> None:
    answer(handler, None, refusal="I will not look at this")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LENS_TEST_KEY", KEY)
    made = Endpoint()
    yield made
    made.over.set()
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Callable[..., OpenAI]]:
    """Makes clients that do not sleep but note in `slept` how long they would have."""
    made: list[OpenAI] = []

    def make(**options: Any) -> OpenAI:
        slept: list[float] = []
        config = OpenAI.Config(**{"model": "m", "base_url": endpoint.url, "key_env": "LENS_TEST_KEY", **options})
        llm = OpenAI(config, slept.append)
        llm.slept = slept  # type: ignore[attr-defined]  # for the tests
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


def test_a_chat_sends_roles_texts_pictures_and_the_key(endpoint, client):
    llm = client(temperature=0.5, max_tokens=77)
    assert llm.chat([Message("system", "be brief"), Message("user", "look", (b"\x89PNG",))]) == "ok"
    (body,) = endpoint.bodies
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    text, image = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "look"}
    assert image["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 77)
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_fault_is_retried_after_what_the_endpoint_asks(endpoint, client, status):
    endpoint.script = [fault(status, Retry_After="7"), fault(status)]
    llm = client()
    assert llm.chat(ASK) == "ok"
    assert llm.spend.calls == len(endpoint.bodies) == 3
    assert 7.5 <= llm.slept[0] <= 8.0
    assert 1.0 <= llm.slept[1] <= 2.0


def test_a_broken_connection_is_opened_again(endpoint, client):
    endpoint.script = [reset]
    llm = client()
    assert llm.chat(ASK) == "ok"
    assert llm.spend.calls == len(endpoint.bodies) == 2


def test_a_slow_answer_is_not_waited_for(endpoint, client):
    endpoint.script = [endpoint.hang]
    with pytest.raises(LLMError, match=r"no answer within 0.3 s \(1 attempts\)"):
        client(timeout=0.3, retries=0).chat(ASK)
    llm = client(timeout=1.0, retries=20)
    endpoint.script = [endpoint.hang]
    assert llm.chat(ASK) == "ok"
    assert llm.spend.calls >= 2


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_lasting_fault_is_reported_in_one_line_and_not_retried(endpoint, client, status):
    endpoint.script = [fault(status, f"no\nwith {KEY}")]
    llm = client()
    with pytest.raises(LLMError, match=rf"^m: HTTP {status}: .*no with \[key\]") as caught:
        llm.chat(ASK)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert len(endpoint.bodies) == 1 and llm.slept == []


def test_retries_end_and_a_long_wait_is_not_waited_for(endpoint, client):
    endpoint.script = [fault(500)] * 3
    with pytest.raises(LLMError, match=r"HTTP 500.*\(3 attempts\)"):
        client(retries=2).chat(ASK)
    endpoint.script = [fault(429, Retry_After="3600")]
    llm = client()
    with pytest.raises(LLMError, match="asks to wait 3600 s"):
        llm.chat(ASK)
    assert llm.slept == [] and len(endpoint.bodies) == 4


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda h: send(h, 200, "<html>Sign in</html>", "text/html"), "not a chat completion; check base_url: <html>"),
        (lambda h: send(h, 200, '{"hello": 1}'), "not a chat completion"),
        (refuse, "refused: I will not look"),
        (lambda h: answer(h, None), "has no text"),
    ],
    ids=["page", "foreign", "refusal", "empty"],
)
def test_what_is_no_answer_is_an_error_and_is_not_cached(endpoint, client, tmp_path, step, words):
    endpoint.script = [step]
    llm = client(cache=str(tmp_path))
    with pytest.raises(LLMError, match=words):
        llm.chat(ASK)
    assert len(endpoint.bodies) == 1 and list(tmp_path.iterdir()) == []


def test_a_wrong_object_is_repaired_once(endpoint, client):
    endpoint.script = ['{"n": ', '{"n": 3}']
    assert client().chat(ASK, SCHEMA) == {"n": 3}
    first, second = endpoint.bodies
    assert first["response_format"]["json_schema"]["schema"] == SCHEMA
    assert second["messages"][1] == {"role": "assistant", "content": '{"n": '}
    assert "not JSON" in second["messages"][2]["content"]
    endpoint.script = ['{"n": "x"}', '{"m": 1}']
    with pytest.raises(LLMError, match=r"after one repair: \$\.n is missing"):
        client().chat(ASK, SCHEMA)
    assert len(endpoint.bodies) == 4


@pytest.mark.parametrize("wrong", [{"n": True}, {"n": 1.5}, {"n": "1"}, {}, [], {"n": 1, "m": 2}])
def test_what_does_not_fit_a_schema_is_reported(wrong):
    assert unfit({"n": 1}, SCHEMA) is None
    assert unfit(wrong, SCHEMA) is not None


def test_a_question_is_asked_once_for_all_who_share_a_cache(endpoint, client, tmp_path):
    endpoint.reply = lambda body: f"answer {len(endpoint.bodies)}"
    picture = [Message("user", "look", (b"a",))]
    assert client(cache=str(tmp_path)).chat(picture) == "answer 1"
    again = client(cache=str(tmp_path), key_env="NOT_THERE")  # what is known needs no key
    assert again.chat(picture) == "answer 1"
    assert (again.spend.calls, again.spend.cached) == (0, 1)
    others = [
        client(cache=str(tmp_path)).chat([Message("user", "look", (b"b",))]),
        client(cache=str(tmp_path), temperature=1.0).chat(picture),
        client(cache=str(tmp_path), model="n").chat(picture),
        client(cache=str(tmp_path), max_tokens=5).chat(picture),
    ]
    assert others == ["answer 2", "answer 3", "answer 4", "answer 5"]


def test_a_damaged_cache_entry_is_asked_anew_and_mended(endpoint, client, tmp_path):
    llm = client(cache=str(tmp_path))
    endpoint.reply = lambda body: '{"n": 1}'
    llm.chat(ASK, SCHEMA)
    (path,) = tmp_path.rglob("*.json")
    for n, damage in enumerate(['{"text": "{', '{"text": 5}', "[]", '{"text": "{\\"n\\": null}"}', "\xff"]):
        path.write_text(damage, encoding="latin-1")
        assert llm.chat(ASK, SCHEMA) == {"n": 1}
        assert len(endpoint.bodies) == n + 2
    assert llm.chat(ASK, SCHEMA) == {"n": 1} and llm.spend.cached == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no unfinished files


def test_map_keeps_the_order_and_the_bound_and_an_error_its_place(endpoint, client):
    def reply(body: dict[str, Any]) -> str:
        n = int(body["messages"][0]["content"])
        time.sleep(0.02 * (6 - n))  # the last is the first to be done
        return "refuse" if n == 2 else str(n)

    endpoint.reply = reply

    def ask(n: int) -> str:
        text = llm.chat([Message("user", str(n))])
        if text == "refuse":
            raise LensError("two")
        return text

    llm = client(concurrency=3)
    results = llm.map(ask, range(6))
    assert [str(f) for f in results] == ["0", "1", "two", "3", "4", "5"]
    assert isinstance(results[2], LensError)
    assert 2 <= endpoint.most <= 3


def test_the_ceiling_of_calls_counts_retries_and_holds_under_threads(endpoint, client):
    endpoint.script = [fault(500)]
    llm = client(max_calls=4)
    results = llm.map(lambda n: llm.chat([Message("user", str(n))]), range(8))
    assert len(endpoint.bodies) == llm.spend.calls == 4
    assert sum(f == "ok" for f in results) == 3
    assert sum(isinstance(f, BudgetError) for f in results) == 5


def test_the_ceiling_of_dollars_stops_before_the_call_that_could_cross_it(endpoint, client):
    # A call is billed 1,000 in and 100 out: $0.0012. It may cost up to 11 in (hello: 1 + 10) and 1,000 out: $0.002011.
    prices = {"price_in": 1.0, "price_out": 2.0, "max_tokens": 1000}
    assert client(**prices).estimate(ASK).usd == pytest.approx(0.002011)
    llm = client(**prices, max_usd=0.0045)
    for n in range(3):
        assert llm.chat([Message("user", f"hell{n}")]) == "ok"
    assert llm.spend.usd == pytest.approx(0.0036)
    with pytest.raises(BudgetError, match=r"could cost \$0\.0020, and \$0\.0036 of max_usd"):
        llm.chat(ASK)
    assert len(endpoint.bodies) == 3


def test_a_lost_answer_counts_at_its_highest_price_and_a_refused_request_at_none(endpoint, client):
    endpoint.script = [reset, fault(429)]
    llm = client(price_in=1.0, price_out=2.0, max_tokens=1000)
    llm.chat(ASK)
    assert llm.spend.usd == pytest.approx(0.002011 + 0.0012)
    assert (llm.spend.tokens_in, llm.spend.tokens_out) == (1000, 100)


def test_an_estimate_sends_nothing(endpoint, client):
    llm = client(price_in=0.4, price_out=1.6, max_tokens=250, image_tokens=1500)
    estimate = llm.estimate([Message("user", "x" * 300, (b"a", b"b"))], calls=1000)
    assert (estimate.calls, estimate.tokens_in, estimate.tokens_out) == (1000, 3_110_000, 250_000)
    assert estimate.usd == pytest.approx(3.11 * 0.4 + 0.25 * 1.6)
    assert endpoint.bodies == []


def test_the_key_is_nowhere_but_in_the_request(endpoint, client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    llm = client(cache=str(tmp_path), retries=1)
    endpoint.script = ["fine", fault(401, f"Incorrect API key provided: {KEY}"), reset, reset]
    llm.chat(ASK)
    messages = []
    for n in range(2):
        with pytest.raises(LLMError) as caught:
            llm.chat([Message("user", str(n))])
        error: BaseException | None = caught.value
        while error is not None:
            messages += [str(error), repr(vars(error))]
            error = error.__cause__ or error.__context__
    files = [p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1 and messages and caplog.text
    assert all(KEY not in text for text in [*messages, *files, caplog.text, repr(llm.config), repr(llm.spend)])
    assert all(KEY in h["authorization"] for h in endpoint.headers)  # the search would have found it


def test_without_a_key_nothing_is_sent_and_the_variable_is_named(endpoint, client):
    llm = client(key_env="LENS_NO_SUCH_KEY")
    with pytest.raises(LLMError, match="LENS_NO_SUCH_KEY is not set"):
        llm.chat(ASK)
    assert llm.spend.calls == 0 and endpoint.bodies == []


def test_a_wrong_config_tells_everything_but_a_pasted_key():
    with pytest.raises(ConfigError) as caught:
        OpenAI.Config(model="", key_env=KEY, timeout=0, concurrency=0, retries=-1, max_usd=1.0)
    assert [p.partition(":")[0] for p in caught.value.problems] == ["model", "timeout", "retries", "concurrency"]
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        OpenAI.Config(model="m", key_env=KEY, max_usd=1.0)
    assert len(caught.value.problems) == 2
    assert KEY not in str(caught.value)
