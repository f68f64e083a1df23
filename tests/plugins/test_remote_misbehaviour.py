"""What an image API can do wrong, as a table: the picture's outcome, how often it is sent, what the ledger counts."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen
from image_apis import (
    ARK,
    DIALECTS,
    GEMINI,
    KEY,
    OPENAI,
    PICTURE,
    PRICE,
    Dialect,
    ImageAPI,
    Step,
    generator,
    image_api,  # noqa: F401  # the fixture `api`
    picture,
    run,
    says,
)
from lens_remote import drawing
from lens_remote.ledger import read_lines

CODED = base64.b64encode(PICTURE).decode()


# ---- steps of the server ------------------------------------------------------------------------------------------


def raw(*pieces: bytes, pause: float = 0.0) -> Step:
    """Bytes as they are, from the status line on, and then the end of the connection."""

    def step(handler: Any) -> None:
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return step


def endless(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        handler.wfile.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")


def reset(handler: Any) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def compressed(data: bytes, coding: str) -> Step:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: {coding}\r\n"
    return raw(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def bomb(megabytes: int) -> bytes:
    """Zeros as gzip: `megabytes` of them in a thousandth of that."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def huge_png() -> bytes:
    """A PNG whose header says 30000x30000."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = bomb(drawing.LARGEST_ANSWER // (1 << 20) + 1)


# ---- the table ----------------------------------------------------------------------------------------------------


@frozen
class Case:
    """`steps` of the server, after which it draws; the outcome's `status` ("stop": the run ends) and the start of its
    reason; how often it was `sent`; how many pictures the ledger counts as paid for."""

    name: str
    steps: Callable[[Dialect], list[Step]]
    status: str = "ok"
    reason: str = ""
    sent: int = 1
    counted: int = 1
    dialects: tuple[Dialect, ...] = DIALECTS
    options: dict[str, Any] = field(factory=dict)


def retried(name: str, *steps: Callable[[Dialect], Step], **more: Any) -> Case:
    """A failure that costs nothing and passes: sent again, and drawn then."""
    return Case(name, lambda d: [s(d) for s in steps], sent=1 + len(steps), **more)


def lost(name: str, step: Callable[[Dialect], Step], reason: str, **more: Any) -> Case:
    """What may have been drawn and cannot be had: failed after one request, and counted."""
    return Case(name, lambda d: [step(d)], "failed", reason, **more)


def refused(name: str, step: Callable[[Dialect], Step], reason: str, counted: int = 0, **more: Any) -> Case:
    return Case(name, lambda d: [step(d)], "refused", reason, counted=counted, **more)


def fatal(name: str, step: Callable[[Dialect], Step], reason: str, **more: Any) -> Case:
    return Case(name, lambda d: [step(d)], "stop", reason, counted=0, **more)


def bad(name: str, step: Callable[[Dialect], Step], reason: str, **more: Any) -> Case:
    return Case(name, lambda d: [step(d)], "failed", reason, counted=0, **more)


def gemini(finish: str, *parts: dict[str, Any], tokens: int = 0, **more: Any) -> Callable[[Dialect], Step]:
    candidate = {"content": {"parts": list(parts)}, "finishReason": finish, **more}
    usage = {"promptTokenCount": 7, **({"candidatesTokenCount": tokens} if tokens else {})}
    return lambda d: says({"candidates": [candidate], "usageMetadata": usage})


def stream(*events: Any) -> Step:
    return says("".join(f"event: x\ndata: {json.dumps(e)}\n\n" for e in events), kind="text/event-stream")


ONLY_GEMINI, ONLY_OPENAI, ONLY_ARK, ITEMS = (GEMINI,), (OPENAI,), (ARK,), (OPENAI, ARK)
SLOW = {"timeout": 0.4}
IMAGE = {"inlineData": {"mimeType": "image/png", "data": CODED}}
OTHER = {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(picture(seed=1)).decode()}}
SAFETY = "Your request was rejected as a result of our safety system."
RISK = {"code": "OutputImageSensitiveContentDetected", "message": "The output may be sensitive."}

CASES = [
    Case("draws", lambda d: []),
    # the class retry
    retried("429 without a header", lambda d: d.fails(429, d.busy[0])),
    retried("429 with Retry-After", lambda d: d.fails(429, d.busy[0], Retry_After="7")),
    retried("429 with retry-after-ms", lambda d: d.fails(429, d.busy[0], Retry_After_Ms="1500")),
    retried("429 with a date that is past", lambda d: d.fails(429, d.busy[0], Retry_After=formatdate(0))),
    retried("429 with a page", lambda d: says("<html>slow down</html>", 429, "text/html")),
    retried("429 with nothing", lambda d: says("", 429)),
    retried("500, then 503", lambda d: d.fails(500, d.busy[1]), lambda d: d.fails(503)),
    retried("500 with a page", lambda d: says("<!doctype html><h1>Oops", 500, "text/html")),
    retried("408", lambda d: d.fails(408)),
    retried("409", lambda d: d.fails(409)),
    retried("502, which may have been drawn", lambda d: says("<html>Bad gateway", 502, "text/html"), counted=2),
    retried("504, which may have been drawn", lambda d: d.fails(504), counted=2),
    Case("503 for ever", lambda d: [d.fails(503)] * 3, "failed", ".*HTTP 503|http_503", 3, 0),
    fatal("429, asks to wait for an hour", lambda d: d.fails(429, d.busy[0], Retry_After="3600"), "more than patience"),
    bad("500 that should not be retried", lambda d: d.fails(500, X_Should_Retry="false"), ".*HTTP 500|http_500"),
    retried("400 that should be retried", lambda d: d.fails(400, d.busy[2], X_Should_Retry="true")),
    retried("RetryInfo in the details", lambda d: says({"error": {
        "code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow", "details": [{"retryDelay": "19s"}]}}, 429),
        dialects=ONLY_GEMINI),
    retried("an error in a list of one", lambda d: says([d.error(503, "UNAVAILABLE", "overloaded")], 503),
            dialects=ONLY_GEMINI),
    retried("429 in a 200", lambda d: says(d.error(429, d.busy[0], "slow down"))),
    retried("a server's error in a 200", lambda d: says(d.error(500, d.busy[1], "oops"))),
    fatal("a wrong key in a 200", lambda d: says(d.error(401, {
        "openai": "invalid_api_key", "gemini": "UNAUTHENTICATED", "ark": "AuthenticationError"}[d.name], "no")), "no"),
    Case("an error that nobody knows, in a 200", lambda d: [says({"error": {"message": "odd"}})], "failed", "error: o"),
    retried("the checker of contents fails", lambda d: d.fails(400, "ContentSecurityDetectionError"),
            dialects=ONLY_ARK),
    retried("server overloaded", lambda d: d.fails(429, "ServerOverloaded"), dialects=ONLY_ARK),
    # the class fatal
    fatal("401", lambda d: d.fails(401, "", f"Incorrect API key provided: {KEY}."), r"\[key\]"),
    fatal("401 with a page", lambda d: says("<html>Sign in", 401, "text/html"), "http_401: a page instead of JSON"),
    fatal("402", lambda d: d.fails(402), ".*HTTP 402|http_402"),
    fatal("403", lambda d: d.fails(403), ".*HTTP 403|http_403"),
    fatal("404", lambda d: d.fails(404), ".*HTTP 404|http_404"),
    fatal("404 with a page", lambda d: says("<html>no", 404, "text/html"), "check base_url"),
    fatal("no quota, as a 429", lambda d: d.quota(), "(?i)quota"),
    fatal("a redirect", lambda d: says("", 307, Location="http://127.0.0.1:9/elsewhere"), "redirects to .*base_url"),
    fatal("a redirect to nowhere", lambda d: says("", 302), "it redirects, which is not followed"),
    fatal("a page instead of an API", lambda d: says("<html>Welcome</html>", 200, "text/html"), "not_an_api"),
    fatal("a status of 999", lambda d: d.fails(999), ".*HTTP 999|http_999"),
    fatal("the hard limit of the bill, as a 400", lambda d: d.fails(400, "billing_hard_limit_reached"),
          "billing_hard_limit_reached", dialects=ONLY_OPENAI),
    fatal("a model that is no more", lambda d: d.fails(404, "model_not_found", "The model does not exist"),
          "model_not_found", dialects=ONLY_OPENAI),
    fatal("a wrong key, as a 400", lambda d: says({"error": {
        "code": 400, "status": "INVALID_ARGUMENT", "message": "API key not valid.",
        "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}}, 400),
        "API_KEY_INVALID", dialects=ONLY_GEMINI),
    fatal("a quota of zero", lambda d: says({"error": {
        "code": 429, "status": "RESOURCE_EXHAUSTED", "message": "limit: 0",
        "details": [{"violations": [{"quotaId": "ImagesPerMinute", "quotaValue": "0"}]}]}}, 429),
        "QUOTA_IS_ZERO", dialects=ONLY_GEMINI),
    fatal("a country without free pictures", lambda d: d.fails(400, "FAILED_PRECONDITION"), "FAILED_PRECONDITION",
          dialects=ONLY_GEMINI),
    fatal("a model that is not opened", lambda d: d.fails(404, "ModelNotOpen"), "ModelNotOpen", dialects=ONLY_ARK),
    fatal("an account in debt", lambda d: d.fails(403, "AccountOverdueError"), "AccountOverdue", dialects=ONLY_ARK),
    # the class bad request
    bad("400", lambda d: d.fails(400, d.busy[2], "size is wrong"), "[iI][nN][vV][aA].*size is wrong"),
    bad("400 without a code", lambda d: d.fails(400), ".*HTTP 400|http_400"),
    bad("413", lambda d: d.fails(413), ".*HTTP 413|http_413"),
    bad("422 with a page", lambda d: says("<html>", 422, "text/html"), "http_422"),
    bad("400 with an error of words", lambda d: says({"error": "no such luck"}, 400), "http_400: no such luck"),
    bad("400 with a number", lambda d: says("5", 400), "http_400: 5"),
    bad("400 with JSON nested deep", lambda d: says("[" * 100_000, 400), "http_400"),
    # refusals in their disguises
    refused("refuses", lambda d: d.refused(), "moderation_blocked|PROHIBITED_CONTENT|OutputImageSensitive"),
    refused("refuses in words alone", lambda d: d.fails(400, "", SAFETY), ".*HTTP 400|http_400"),
    refused("refuses by type", lambda d: says({"error": {"message": "no", "type": "image_generation_user_error",
            "code": None}}, 400), "image_generation_user_error", dialects=ONLY_OPENAI),
    refused("refuses with 403", lambda d: d.fails(403, "content_policy_violation"), "content_policy_violation",
            dialects=ONLY_OPENAI),
    refused("refuses with 200", lambda d: says(d.error(200, "moderation_blocked", SAFETY)), "moderation_blocked", 1,
            dialects=ONLY_OPENAI),
    refused("refuses in a stream", lambda d: stream({"type": "error", "error": {"code": "moderation_blocked",
            "message": "blocked"}}), "moderation_blocked: blocked", 1, dialects=ONLY_OPENAI),
    refused("refuses in a stream with 400", lambda d: says('data: {"error": {"code": "moderation_blocked"}}\n\n', 400,
            "text/event-stream"), "moderation_blocked", dialects=ONLY_OPENAI),
    refused("refuses the text", lambda d: d.fails(400, "InputTextSensitiveContentDetected"), "InputText",
            dialects=ONLY_ARK),
    refused("a severe violation", lambda d: d.fails(400, "SensitiveContentDetected.SevereViolation"), "Sensitive",
            dialects=ONLY_ARK),
    refused("another checker refuses", lambda d: d.fails(400, "OutputImageRiskDetection"), "OutputImageRisk",
            dialects=ONLY_ARK),
    refused("refuses one item of a 200", lambda d: says({"data": [{"error": RISK}], "usage": {"generated_images": 0}}),
            "OutputImageSensitiveContentDetected: The output", dialects=ONLY_ARK),
    refused("refuses in a stream of Ark's", lambda d: stream(
        {"type": "image_generation.partial_failed", "image_index": 0, "error": RISK},
        {"type": "image_generation.completed", "usage": {"generated_images": 0}}), "OutputImage", dialects=ONLY_ARK),
    *[refused(f"stops for {reason}", gemini(reason), reason, dialects=ONLY_GEMINI) for reason in (
        "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "PROHIBITED_CONTENT", "NO_IMAGE", "SAFETY")],
    refused("stops after it has drawn", gemini("IMAGE_SAFETY", tokens=1290, finishMessage="unsafe"),
            "IMAGE_SAFETY: unsafe", 1, dialects=ONLY_GEMINI),
    refused("blocks the prompt for another reason", lambda d: says({"promptFeedback": {
        "blockReason": "OTHER", "blockReasonMessage": "why not"}}), "OTHER: why not", dialects=ONLY_GEMINI),
    refused("talks instead", gemini("STOP", {"text": "I cannot draw that."}, tokens=9),
            "text_instead_of_a_picture: I cannot draw that", 1, dialects=ONLY_GEMINI),
    refused("thinks a picture and talks", gemini("STOP", {"thought": True, **IMAGE}, {"text": "No."}),
            "text_instead_of_a_picture: No", dialects=ONLY_GEMINI),
    # pictures in odd clothes
    Case("two pictures for one", lambda d: [says(d.drawn(CODED, OTHER["inlineData"]["data"]))], counted=2),
    Case("base64 without padding", lambda d: [says(d.drawn(CODED.rstrip("=")))]),
    Case("base64 in lines", lambda d: [says(d.drawn("\n".join([CODED[:60], CODED[60:]])))]),
    Case("base64 for URLs", lambda d: [says(d.drawn(base64.urlsafe_b64encode(PICTURE).decode()))]),
    Case("base64 as a data URL", lambda d: [says(d.drawn(f"data:image/jpeg;base64,{CODED}"))]),
    Case("a byte order mark", lambda d: [says("\ufeff" + json.dumps(d.drawn(CODED)))]),
    Case("gzip, though not asked for", lambda d: [
        compressed(gzip.compress(json.dumps(d.drawn(CODED)).encode()), "gzip")]),
    Case("usage is NaN", lambda d: [says(json.dumps({**d.drawn(CODED), "usage": {"output_tokens": float("nan")},
                                                     "usageMetadata": {"candidatesTokenCount": float("inf")}}))]),
    Case("usage is absurd", lambda d: [says({**d.drawn(CODED), "usage": {"generated_images": 10**12, "x": -1},
                                             "usageMetadata": [1]})]),
    Case("a thought first", lambda d: [
        gemini("STOP", {"thought": True, **OTHER}, {"text": "Here:"}, IMAGE, tokens=9)(d)],
         dialects=ONLY_GEMINI),
    Case("snake case", lambda d: [gemini("STOP", {"inline_data": IMAGE["inlineData"]}, tokens=9)(d)],
         dialects=ONLY_GEMINI),
    Case("a type that is wrong", lambda d: [
        gemini("STOP", {"inlineData": {"mimeType": "text/html", "data": CODED}})(d)],
         dialects=ONLY_GEMINI),
    Case("the picture in a stream", lambda d: [stream(
        {"type": "image_generation.partial_image", "b64_json": OTHER["inlineData"]["data"]},
        {"type": "image_generation.completed", "b64_json": CODED, "usage": {"output_tokens": 5}})], dialects=ITEMS),
    Case("an error beside the picture", lambda d: [says({"data": [{"error": RISK}, {"b64_json": CODED}]})],
         dialects=ITEMS),
    # what was drawn and is no use
    lost("a 200 without a picture", lambda d: says(d.drawn()), "no_picture"),
    lost("an empty object", lambda d: says({}), "no_picture"),
    lost("null", lambda d: says("null"), "no_picture"),
    lost("a list of numbers", lambda d: says([1, 2]), "no_picture"),
    lost("an empty body", lambda d: says(""), "unreadable"),
    lost("half of the JSON", lambda d: says(json.dumps(d.drawn(CODED))[:-9]), "unreadable"),
    lost("a key that stands twice", lambda d: says(
        json.dumps(d.drawn(CODED))[:-1] + ', "data": [], "candidates": []}' ), "unreadable: .*twice"),
    lost("JSON nested deep", lambda d: says("[" * 100_000), "unreadable"),
    lost("base64 that is none", lambda d: says(d.drawn(CODED[:30] + "!" + CODED[30:])), "bad_base64"),
    lost("base64 of a cut length", lambda d: says(d.drawn(CODED.rstrip("=")[: len(CODED) // 4 * 4 - 7])), "bad_"),
    lost("half a picture", lambda d: d.ok(PICTURE[:-40]), "bad_picture"),
    lost("a page for a picture", lambda d: d.ok(b"<!DOCTYPE html><p>no"), "bad_picture: .*HTML"),
    lost("an SVG", lambda d: d.ok(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "bad_picture: .*SVG"),
    lost("a GIF", lambda d: d.ok(picture(form="GIF")), "bad_picture: .*GIF"),
    lost("nothing for a picture", lambda d: says(d.drawn("====")), "bad_picture"),
    lost("a picture of 30000x30000", lambda d: d.ok(huge_png()), "bad_picture: .*too large"),
    lost("its key in the picture", lambda d: d.ok(PICTURE + KEY.encode()), "bad_picture: .*holds the key"),
    lost("cut off", gemini("MAX_TOKENS", tokens=100), "MAX_TOKENS", dialects=ONLY_GEMINI),
    lost("stops for another reason", gemini("IMAGE_OTHER"), "IMAGE_OTHER", dialects=ONLY_GEMINI),
    lost("numbers for pictures", lambda d: says({"data": [1, None, {"b64_json": 5}, {"url": ["x"]}]}), "no_picture",
         dialects=ITEMS),
    lost("a number for parts", lambda d: says({"candidates": [{"content": {"parts": 5}}, 7]}), "no_picture",
         dialects=ONLY_GEMINI),
    # the connection
    lost("never answers", lambda d: raw(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 20, pause=0.1), "timeout: .*billed",
         options=SLOW),
    lost("drips its body", lambda d: raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b" "] * 20, pause=0.1),
         "timeout", options=SLOW),
    lost("closes before it answers", lambda d: raw(), "no_answer: .*billed"),
    lost("resets the connection", lambda d: reset, "no_answer"),
    lost("a body shorter than it says", lambda d: raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"), "no_answer"),
    lost("speaks no HTTP", lambda d: raw(b"\x00\xff\xfe\r\n"), "no_answer"),
    lost("half a gzip", lambda d: compressed(gzip.compress(json.dumps(d.drawn(CODED)).encode())[:-12], "gzip"),
         "unreadable"),
    lost("a gzip bomb", lambda d: compressed(BOMB, "gzip"), "unreadable: .*larger than", dialects=ONLY_OPENAI),
    lost("never ends its chunks", lambda d: endless, "unreadable: .*larger than", dialects=ONLY_OPENAI),
    Case("a timeout that may be paid twice", lambda d: [raw(b"H", b"T", pause=0.6)], sent=2, counted=2,
         options={**SLOW, "resend_lost": True}),
]  # fmt: skip
TABLE = [(case, dialect) for case in CASES for dialect in case.dialects]


def test_the_table_has_a_hundred_rows_and_no_name_twice() -> None:
    assert len({c.name for c in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize(("case", "dialect"), TABLE, ids=lambda value: value.name)
def test_a_misbehaviour_is_an_outcome_of_its_picture(
    case: Case, dialect: Dialect, api: ImageAPI, tmp_path: Path
) -> None:
    api.script = case.steps(dialect)
    api.otherwise = dialect.ok()
    made = generator(dialect, api, tmp_path, **case.options)
    outcomes, stopped = run(made)
    assert len(api.posts) == case.sent
    assert all(headers[dialect.key_header[0]] == dialect.key_header[1] for _, headers, _ in api.posts)
    lines = read_lines(tmp_path)
    assert sum(line.pictures for line in lines) == case.counted
    assert sum(line.dollars for line in lines) == pytest.approx(PRICE * case.counted)
    if case.status == "stop":
        assert outcomes == [] and stopped is not None
        said = stopped
        assert re.search(case.reason, said), said
    else:
        (outcome,) = outcomes
        assert stopped is None and outcome.status == case.status, outcome.reason
        said = outcome.reason
        assert re.match(case.reason, said), said
        assert (outcome.image == PICTURE) == (case.status == "ok")
    assert "\n" not in said and len(said) < 700
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written and KEY not in said + json.dumps([dict(o.facts) for o in outcomes])
    # The next run pays for nothing that this one knows the end of: a picture, a refusal, a loss.
    api.posts.clear()
    again, _ = run(generator(dialect, api, tmp_path))
    settled = case.status in ("ok", "refused") or case.counted
    assert len(api.posts) == (0 if settled else 1)
    if settled and case.status != "stop":
        assert [o.status for o in again] == [case.status] and again[0].image == outcomes[0].image
