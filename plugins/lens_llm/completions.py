"""What an endpoint answers: the text and tokens of a chat completion, or the fault that it is."""

from __future__ import annotations

import json
import re
from typing import Any

from attrs import frozen

from lens_core.io.http import Answer
from lens_core.io.redaction import LEAST, redact, replace_surrogates
from lens_core.io.retries import retry_after_seconds
from lens_llm.json_answers import parse

TRANSIENT = frozenset({408, 429})  # and 5xx: the same request may succeed later

# How endpoints name the end of an answer. What is in none of these sets is an answer that was not finished.
FINISHED = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "completed", ""})
CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"})
WITHHELD = frozenset({"content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal"})
PASSING = frozenset({"error", "abort", "aborted", "cancelled", "canceled"})
NAMED = {  # errors that are named in words, and the status that stands for them
    "rate_limit": 429,
    "too_many_requests": 429,
    "insufficient_quota": 402,
    "overloaded": 503,
    "unavailable": 503,
    "server_error": 500,
    "internal": 500,
    "timeout": 408,
    "authentication": 401,
    "invalid_api_key": 401,
    "permission": 403,
    "not_found": 404,
    "invalid_request": 400,
}


@frozen
class Fault:
    """An attempt without an answer. `wait`: the seconds that the endpoint asked for; `billed`: it may cost money, and
    what it cost, if the endpoint says so, are `tokens` in and out."""

    words: str
    again: bool = False
    wait: float = 0.0
    billed: bool = False
    tokens: tuple[int, int] | None = None


@frozen
class Reply:
    text: str
    tokens: tuple[int, int] | None  # in, out; None where the endpoint does not say, or nothing that can be true


def unpack(answer: Answer, secret: str, tokens_in: int, tokens_out: int, as_is: bool = False) -> Reply | Fault:
    """What an endpoint's answer is: a reply, without the key, or a fault. About `tokens_in` were sent and at most
    `tokens_out` may come back. `as_is`: a text that was cut off there, or is blank, is a reply too."""
    expected = (tokens_in, tokens_out)
    if 300 <= answer.status < 400:
        place = f" to {answer.location[:200]}" if answer.location else ""
        words = f"HTTP {answer.status}: it redirects{place}, which is not followed, for the key would go there too"
        return Fault(f"{words}; set base_url to where the endpoint is")
    head = answer.body[:2000].decode("utf-8", "replace")
    try:
        data = parse(answer.body.decode("utf-8-sig"))
    except ValueError as error:
        if not 200 <= answer.status < 300:
            return fault_of_status(answer.status, head, answer.retry_after)
        if "json" in answer.content_type:
            return Fault(f"unreadable answer: {error}", again=True, billed=True)
        return Fault(f"not a chat completion; check base_url: {head}", billed=True)
    reported = _error(data)
    if not 200 <= answer.status < 300:
        return fault_of_status(answer.status, reported[1] if reported else head, answer.retry_after)
    if reported is not None:
        status, words = reported
        if status is not None:
            return fault_of_status(status, words, answer.retry_after)
        return Fault(f"the endpoint reports an error: {words}", billed=True, tokens=_usage(data, expected, ""))
    choice = _first(data)
    message = choice.get("message") if choice is not None else None
    if choice is None or not isinstance(message, dict):
        return Fault(f"not a chat completion; check base_url: {head}", billed=True)
    text = _text(message.get("content"))
    tokens = _usage(data, expected, text or "")
    reason, refusal = choice.get("finish_reason"), message.get("refusal")
    reason = "" if reason is None else reason.lower() if isinstance(reason, str) else "?"
    if reason in WITHHELD or (isinstance(refusal, str) and refusal):
        why = refusal if isinstance(refusal, str) and refusal else "content filter"
        return Fault(f"refused: {why}", billed=True, tokens=tokens)
    if reason in CUT and not (as_is and text is not None):
        words = f"the answer was cut off at max_tokens ({tokens_out}); raise max_tokens"
        return Fault(words, billed=True, tokens=tokens)
    if reason not in FINISHED | CUT:
        words = f"the answer was not finished: finish_reason is {reason[:40]!r}"
        return Fault(words, reason in PASSING, billed=True, tokens=tokens)
    if text is None or not (as_is or text.strip()):
        return Fault("the answer has no text", billed=True, tokens=tokens)
    return Reply(redact(text, secret) if len(secret) >= LEAST else text, tokens)


def _usage(data: dict[str, Any], expected: tuple[int, int], text: str) -> tuple[int, int] | None:
    """The tokens in and out that an endpoint says, or None where that cannot be true: then the reservation counts.

    Believed are whole numbers of at least 1 in, at least 1 out for a text, and no more than ten times what was
    expected and 100,000 for what an endpoint adds by itself: hidden instructions, and thoughts.
    """
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None
    sound = 1 <= prompt <= 10 * expected[0] + 100_000 and bool(text) <= completion <= 10 * expected[1] + 100_000
    return (prompt, completion) if sound else None


def _first(data: Any) -> dict[str, Any] | None:
    """The first choice of a chat completion, or None where there is none."""
    choices = data.get("choices") if isinstance(data, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _text(content: Any) -> str | None:
    """The text of a message: a string, or a list of parts of which some are text. Half characters are replaced."""
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, dict) and p.get("type") in ("text", "output_text")]
        texts: list[Any] = [part.get("text") for part in parts]
        content = "".join(texts) if texts and all(isinstance(t, str) for t in texts) else None
    return replace_surrogates(content) if isinstance(content, str) else None


def _error(data: Any) -> tuple[int | None, str] | None:
    """(status or None, words) of an error that stands in a body, of the whole answer or of its first choice."""
    if not isinstance(data, dict):
        return None
    error = data.get("error") or (_first(data) or {}).get("error")
    if not error and "choices" not in data:
        error = {k: data[k] for k in ("message", "detail", "code", "status") if data.get(k)}
    if not error:
        return None
    if not isinstance(error, dict):
        return None, _brief(error)
    words = error.get("message") or error.get("detail") or error
    for name in ("code", "status", "status_code", "http_status", "type"):
        status = _status(error.get(name))
        if status is not None:
            return status, _brief(words)
    return None, _brief(words)


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)[:2000]


def _status(value: Any) -> int | None:
    """The HTTP status of an error that a number, or a name such as rate_limit_exceeded, stands for."""
    if isinstance(value, str):
        name = value.strip().lower()
        if not re.fullmatch(r"[45][0-9][0-9]", name):
            return next((s for known, s in NAMED.items() if known in name), None)
        value = int(name)
    return value if type(value) is int and 400 <= value <= 599 else None


def fault_of_status(status: int, words: str, retry_after: str | None) -> Fault:
    """The fault that a status means."""
    again = status in TRANSIENT or 500 <= status <= 599
    return Fault(f"HTTP {status}: {words}", again, retry_after_seconds(retry_after))
