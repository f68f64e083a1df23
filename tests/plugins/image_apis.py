"""A local server that speaks the protocols of three image APIs, and does whatever a test's script says."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import frozen
from lens_remote.ark_images import ArkImages
from lens_remote.gemini_images import GeminiImages
from lens_remote.openai_images import OpenAIImages
from PIL import Image

from lens_core.types import PictureOutcome, PictureRequest, StopGeneration

KEY = "sk-image-0123456789abcdef"
Step = Callable[[Any], None]


def picture(width: int = 8, height: int = 6, form: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


PICTURE = picture()


class ImageAPI:
    """Answers the POST number i with `script[i]`, then always with `otherwise`; a GET with `stored[path]`, else 404.
    `posts` and `gets` are (path, headers with names in lower case, body) of what came."""

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.otherwise: Step = lambda handler: send(handler, 500, "no script")
        self.stored: dict[str, Step] = {}
        self.posts: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.gets: list[tuple[str, dict[str, str]]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with api.lock:
                    step = api.script.pop(0) if api.script else api.otherwise
                    api.posts.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    api.busy += 1
                    api.most = max(api.most, api.busy)
                self.run(step)
                with api.lock:
                    api.busy -= 1

            def do_GET(self) -> None:
                with api.lock:
                    api.gets.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                self.run(api.stored.get(self.path, lambda handler: send(handler, 404, "not here")))

            def run(self, step: Step) -> None:
                with contextlib.suppress(OSError):  # the client has gone
                    step(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def hang(self, handler: Any) -> None:
        """Never answers while the test runs."""
        self.over.wait(60)

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def send(handler: Any, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def says(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> Step:
    return lambda handler: send(handler, status, body, kind, **headers)


@frozen
class Dialect:
    """How one API says things. `drawn(*codes)` has a picture for each base64; `error(status, code, words)`."""

    name: str
    generator: str
    model: str
    key_header: tuple[str, str]
    path: str
    drawn: Callable[..., dict[str, Any]]
    error: Callable[..., Any]
    refused: Callable[[], Step]
    quota: Callable[[], Step]
    busy: tuple[str, str, str]  # codes of: too many requests, a server's error, a bad request

    def ok(self, data: bytes = PICTURE) -> Step:
        return says(self.drawn(base64.b64encode(data).decode()))

    def fails(self, status: int, code: str = "", words: str = "sorry", **headers: str) -> Step:
        return says(self.error(status, code, words), status, **headers)


def _openai_error(status: int, code: str, words: str) -> dict[str, Any]:
    return {"error": {"message": words, "type": "invalid_request_error", "param": None, "code": code or None}}


def _gemini_drawn(*codes: str, **more: Any) -> dict[str, Any]:
    parts = [{"inlineData": {"mimeType": "image/png", "data": code}} for code in codes]
    return {
        "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 1290, "totalTokenCount": 1297},
        "modelVersion": "gemini-3.1-flash-image-001",
        **more,
    }


def _gemini_error(status: int, code: str, words: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": words, "status": code or "NEW", "details": []}}


def _ark_error(status: int, code: str, words: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": f"{words} Request id: 0217", "param": "", "type": "BadRequest"}}


OPENAI = Dialect(
    "openai", "openai_images", "gpt-image-2", ("authorization", f"Bearer {KEY}"), "/v1/images/generations",
    lambda *codes: {
        "created": 1, "data": [{"b64_json": c} for c in codes], "size": "1024x1024", "quality": "high",
        "usage": {"input_tokens": 9, "output_tokens": 4160, "total_tokens": 4169,
                  "input_tokens_details": {"text_tokens": 9}},
    },
    _openai_error,
    lambda: says({"error": {"message": "Your request was rejected by the safety system. safety_violations=[x]",
                            "type": "image_generation_user_error", "param": None, "code": "moderation_blocked"}}, 400),
    lambda: says({"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "param": None,
                            "code": "insufficient_quota"}}, 429),
    ("rate_limit_exceeded", "server_error", "invalid_value"),
)  # fmt: skip
GEMINI = Dialect(
    "gemini", "gemini_images", "gemini-3.1-flash-image", ("x-goog-api-key", KEY),
    "/v1beta/models/gemini-3.1-flash-image:generateContent", _gemini_drawn, _gemini_error,
    lambda: says({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                  "usageMetadata": {"promptTokenCount": 7, "totalTokenCount": 7}}),
    lambda: says({"error": {"code": 429, "message": "You exceeded your current quota", "status": "RESOURCE_EXHAUSTED",
                            "details": [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure",
         "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier", "quotaValue": "20"}]},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36s"}]}}, 429),
    ("RESOURCE_EXHAUSTED", "INTERNAL", "INVALID_ARGUMENT"),
)  # fmt: skip
ARK = Dialect(
    "ark", "ark_images", "doubao-seedream-4-0-250828", ("authorization", f"Bearer {KEY}"),
    "/api/v3/images/generations",
    lambda *codes: {
        "model": "doubao-seedream-4-0-250828", "created": 1,
        "data": [{"b64_json": c, "size": "1024x1024"} for c in codes],
        "usage": {"generated_images": len(codes), "output_tokens": 4096, "total_tokens": 4096},
    },
    _ark_error,
    lambda: says(_ark_error(400, "OutputImageSensitiveContentDetected", "The output may be sensitive."), 400),
    lambda: says(_ark_error(429, "QuotaExceeded", "Your free quota is used up."), 429),
    ("RateLimitExceeded.EndpointRPMExceeded", "InternalServiceError", "InvalidParameter"),
)  # fmt: skip
DIALECTS = (OPENAI, GEMINI, ARK)
BASES = {"openai": "/v1", "gemini": "/v1beta", "ark": "/api/v3"}
CLASSES: dict[str, Any] = {"openai": OpenAIImages, "gemini": GeminiImages, "ark": ArkImages}
REQUEST = PictureRequest("a red circle", seed=7, prompt_id="000", index=0)
PRICE = 0.04


@pytest.fixture(name="api")
def image_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageAPI]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LENS_TEST_KEY", KEY)
    made = ImageAPI()
    yield made
    made.close()


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def now(self) -> float:
        return sum(self.slept)


def generator(dialect: Dialect, api: ImageAPI, folder: Path, clock: Clock | None = None, **options: Any) -> Any:
    """A generator that sleeps by a clock of its own."""
    cls = CLASSES[dialect.name]
    clock = clock or Clock()
    config = {
        "model": dialect.model, "base_url": api.url + BASES[dialect.name], "key_env": "LENS_TEST_KEY", "timeout": 5.0,
        "retries": 2, "dollars_per_picture": PRICE, "ledger": str(folder), **options,
    }  # fmt: skip
    return cls(cls.Config(**config), clock.sleep, clock.now)


def run(made: Any, requests: Sequence[PictureRequest] = (REQUEST,)) -> tuple[list[PictureOutcome], str | None]:
    """(outcomes, why it stopped)."""
    outcomes: list[PictureOutcome] = []
    try:
        for outcome in made.generate(requests):
            outcomes.append(outcome)
    except StopGeneration as error:
        return outcomes, str(error)
    finally:
        made.close()
    return outcomes, None
