"""What an HTTP answer of an image API is: pictures, or one of four kinds of failure. Pure functions, no key, no I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from attrs import evolve, field, frozen

from lens_core.io import readers
from lens_core.io.http import Answer
from lens_core.io.retries import retry_after_seconds

Kind = Literal["retry", "refusal", "fatal", "bad_request"]
TRANSIENT = frozenset({408, 409, 425, 429})  # and 5xx: the same request may succeed later
FATAL = frozenset({401, 402, 403, 404, 405, 407, 410, 451})  # the next request will fare no better
UNSURE = frozenset({502, 504, 520, 521, 522, 523, 524})  # a gateway's words: the server behind it may have drawn
MOST_TOKENS = 10**9
RETRY_MS = "retry-after-ms"


@frozen
class Failure:
    """A request without a picture.

    kind      retry: the same request may succeed later; refusal: by the system's policy; fatal: no request will succeed
              (key, quota, model, address); bad_request: this request never will
    billed    it may cost as much as a picture
    lost      a picture may have been drawn and cannot be had: another attempt may pay for it a second time
    wait      seconds that the server asked for
    """

    kind: Kind
    code: str  # as the API names it, or ours; without spaces
    words: str
    billed: bool = False
    lost: bool = False
    wait: float = 0.0
    usage: Mapping[str, int] = field(factory=dict)

    @property
    def reason(self) -> str:
        return f"{self.code}: {self.words}"


@frozen
class Drawn:
    """Pictures that an API has drawn: the first of them in base64, or the address where it is."""

    base64: str = ""
    url: str = ""
    count: int = 1  # of pictures in the answer, which are all paid for
    usage: Mapping[str, int] = field(factory=dict)  # tokens and pictures by the API's names
    revision: str = ""  # of the model, as the API names it
    facts: Mapping[str, Any] = field(factory=dict)


@frozen
class Codes:
    """How an API names its errors: patterns that the code, status and type of an error are searched for, the most
    specific name first; `words` finds a refusal in the message of an error that no name classes."""

    refusal: str
    fatal: str
    retry: str
    bad_request: str
    words: str = (
        r"(?i)(reject|block|violat|denied|flagged).{0,80}(safety|polic|guideline|moderation|sensitive)"
        r"|(safety|content policy|moderation).{0,40}(system|violat|block|reject)"
    )

    def kind(self, name: str) -> Kind | None:
        kinds: tuple[Kind, ...] = ("refusal", "fatal", "retry", "bad_request")
        return next((kind for kind in kinds if re.search(getattr(self, kind), name)), None)


def lost(code: str, words: str, usage: Mapping[str, int] | None = None) -> Failure:
    """The picture may have been drawn and paid for, and there is no way to it."""
    return Failure("retry", code, words, billed=True, lost=True, usage=usage or {})


def parse(answer: Answer) -> Any:
    """The JSON of an answer, or, of a stream, what its events amount to. Raises ValueError where it is neither.

    NaN may stand in it, for a picture that was paid for is not lost over a number beside it; keys that stand twice may
    not, for then nobody knows which picture was meant.
    """
    if "text/event-stream" in answer.content_type:
        return _collected(_events(readers.decode(answer.body)))
    return readers.parse_json(answer.body, finite=False)


def _events(text: str) -> Iterator[Any]:
    """The data of each event of a text/event-stream."""
    for block in re.split(r"\r?\n\r?\n", text):
        data = [line[5:].strip() for line in block.splitlines() if line.startswith("data:")]
        if data and data != ["[DONE]"]:
            yield readers.parse_json("\n".join(data), finite=False)


def _collected(events: Iterator[Any]) -> dict[str, Any]:
    """A stream's events as the one answer that they stand for: final pictures, errors, and usage."""
    whole: dict[str, Any] = {"data": []}
    for event in events:
        if not isinstance(event, dict):
            continue
        kind = str(event.get("type", ""))
        if "partial_image" in kind:
            continue
        if isinstance(event.get("error"), dict):
            whole["data"].append({"error": event["error"]})
        elif event.get("b64_json") or event.get("url"):
            whole["data"].append(event)
        whole |= {k: event[k] for k in ("usage", "model") if k in event}
    return whole


def failure_of_status(answer: Answer, error: Mapping[str, Any], codes: Codes) -> Failure:
    """The failure that an HTTP status other than 2xx is, by the error's own code where that is known."""
    status = answer.status
    if 300 <= status < 400:
        place = f" to {answer.location[:200]}" if answer.location else ""
        words = f"it redirects{place}, which is not followed, for the key would go there too; set base_url"
        return Failure("fatal", f"http_{status}", words)
    failure = failure_of_error(error, codes, status)
    if failure is None:
        page = answer.body[:300].decode("utf-8", "replace")
        words = "a page instead of JSON; check base_url" if _is_page(answer) else page or "an empty answer"
        failure = Failure(_kind_of_status(status), f"http_{status}", words)
    should_retry = answer.headers.get("x-should-retry")
    if should_retry in ("true", "false") and failure.kind in ("retry", "bad_request"):
        failure = evolve(failure, kind="retry" if should_retry == "true" else "bad_request")
    unsure = status in UNSURE and failure.kind == "retry"
    return evolve(failure, billed=unsure, wait=max(failure.wait, wait_of(answer)))


def _kind_of_status(status: int) -> Kind:
    if status in TRANSIENT or 500 <= status <= 599:
        return "retry"
    return "fatal" if status in FATAL or not 400 <= status <= 499 else "bad_request"


def _is_page(answer: Answer) -> bool:
    return "html" in answer.content_type or answer.body[:200].lstrip().lower().startswith((b"<!doctype", b"<html"))


def wait_of(answer: Answer) -> float:
    """Seconds that the headers ask to wait."""
    try:
        milliseconds = float(answer.headers.get(RETRY_MS, ""))
    except ValueError:
        return retry_after_seconds(answer.retry_after)
    return milliseconds / 1000 if milliseconds > 0 else 0.0


def failure_of_error(error: Any, codes: Codes, status: int | None = None) -> Failure | None:
    """The failure that an error object stands for, {code, status, type, message, wait}; None where it is none. What no
    name of it classes is classed by the HTTP `status`; without that it is a bad request, for nothing says that another
    attempt would help."""
    if isinstance(error, str) and error:
        error = {"message": error}
    if not isinstance(error, dict) or not error:
        return None
    names = [str(error[k]) for k in ("code", "status", "type") if isinstance(error.get(k), str | int) and error[k]]
    words = error.get("message") or error.get("detail") or error
    words = words if isinstance(words, str) else json.dumps(words)[:1000]
    classed = [(kind, name) for name in names if (kind := codes.kind(name)) is not None]
    if status is not None and _kind_of_status(status) != "bad_request":
        # OpenAI's type of most errors is invalid_request_error, that of a wrong key too: the status says more.
        classed = [(kind, name) for kind, name in classed if kind != "bad_request"]
    if classed:
        kind, code = classed[0]
    else:
        number = status or next((int(n) for n in names if re.fullmatch("[45][0-9][0-9]", n)), None)
        kind = _kind_of_status(number) if number else "bad_request"
        code = next((n for n in names if not n.isdigit()), f"http_{number}" if number else "error")
    if kind == "bad_request" and re.search(codes.words, words):
        kind = "refusal"
    if status is not None and code != f"http_{status}":
        words = f"HTTP {status}: {words}"
    wait = error.get("wait", 0.0)
    return Failure(kind, re.sub(r"\s+", "_", code)[:80], words, wait=wait if isinstance(wait, float) else 0.0)


def whole_numbers(usage: Any) -> dict[str, int]:
    """What an API counts, by its own names: only whole numbers that can be true are believed."""
    counts: dict[str, int] = {}
    for name, value in usage.items() if isinstance(usage, dict) else ():
        if type(value) is int and 0 <= value <= MOST_TOKENS and len(counts) < 20:
            counts[str(name)[:40]] = value
    return counts


def read_items(data: Any, codes: Codes, facts: Sequence[str] = ()) -> Drawn | Failure:
    """Pictures in the form that OpenAI's and Ark's answers share: {"data": [{"b64_json" | "url" | "error"}], "usage"}.
    `facts` are the fields to keep."""
    if not isinstance(data, dict):
        return lost("no_picture", "the answer is no JSON object; check base_url")
    usage = whole_numbers(data.get("usage"))
    error = data.get("error")
    items = data.get("data")
    items = [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []
    pictures = [i for i in items if _text(i, "b64_json") or _text(i, "url")]
    if pictures:
        first = next((i for i in pictures if _text(i, "b64_json")), pictures[0])
        kept = {k: data[k] for k in facts if isinstance(data.get(k), str | int)}
        kept |= {k: first[k] for k in ("size", "revised_prompt") if isinstance(first.get(k), str)}
        revision = data["model"] if isinstance(data.get("model"), str) else ""
        return Drawn(_text(first, "b64_json"), _text(first, "url"), len(pictures), usage, revision, kept)
    errors = [i["error"] for i in items if i.get("error")] or ([error] if error else [])
    failure = next((f for f in (failure_of_error(e, codes) for e in errors) if f is not None), None)
    none_drawn = usage.get("generated_images") == 0 or usage.get("output_tokens") == 0
    if failure is None:
        return lost("no_picture", "the answer has no picture", usage)
    return after_error(failure, none_drawn, usage)


def after_error(failure: Failure, none_drawn: bool, usage: Mapping[str, int]) -> Failure:
    """The failure of an error within an answer with status 200. What is refused may have been drawn first, and an error
    that nothing classes may mean anything; the others mean, as a status does, that nothing was drawn."""
    billed = failure.kind in ("refusal", "bad_request") and not none_drawn
    return evolve(failure, billed=billed, usage=usage)


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    return value if isinstance(value, str) else ""
