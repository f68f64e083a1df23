"""The llm `openai`: chat with any OpenAI-compatible endpoint, within a budget, and never twice for the same question.

The key is read from an environment variable when the first call is made, and stands in no config, error or file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from attrs import field, frozen, mutable

from lens_core.http import Answer, NotSent, TooLarge, UntrustedHost, check_url, post
from lens_core.structuring import SECRET
from lens_core.types import ConfigError, LensError, Message
from lens_core.validators import integer, optional, real, text
from lens_llm.redaction import LEAST, redact, redact_all

LOG = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

TRANSIENT = frozenset({408, 429})  # and 5xx: the same request may succeed later
LONGEST = 60.0  # seconds of backoff at most; an endpoint may ask for more, up to `patience`
LARGEST = 4 << 20  # bytes of an answer, decompressed; also of a cache entry
SECONDS = real(above=0, at_most=86_400)  # up to a day
OFFICIAL = "https://api.openai.com/v1"
A_NAME = "must be the name of an environment variable, such as OPENAI_API_KEY"

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


class LLMError(LensError):
    """A language model gave no usable answer."""


class BudgetError(LLMError):
    """The next call could cross a ceiling, so it was not made."""


@mutable
class Spend:
    """What was sent: `calls` are requests, retries included; `usd` counts lost answers at their highest price."""

    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0


@frozen
class Estimate:
    """What chats will cost at most, without retries and repairs."""

    calls: int
    tokens_in: int
    tokens_out: int
    usd: float


@frozen
class _Fault:
    """An attempt without an answer. `wait`: the seconds that the endpoint asked for; `billed`: it may cost money, and
    what it cost, if the endpoint says so, are `tokens` in and out."""

    words: str
    again: bool = False
    wait: float = 0.0
    billed: bool = False
    tokens: tuple[int, int] | None = None


@frozen
class _Reply:
    text: str
    tokens: tuple[int, int] | None  # in, out; None where the endpoint does not say, or nothing that can be true


class OpenAI:
    """Chat completions. Safe to call from several threads; `map` does so."""

    @frozen
    class Config:
        model: str = field(validator=text())
        # None: OPENAI_BASE_URL, or OpenAI's own.
        base_url: str | None = field(default=None, validator=optional(text()), metadata={SECRET: "must be a URL"})
        key_env: str = field(default="OPENAI_API_KEY", metadata={SECRET: A_NAME})  # the NAME of the key's variable
        # Seconds for a whole request, from the look-up of the address to the last byte read.
        timeout: float = field(default=60.0, validator=SECONDS)
        retries: int = field(default=4, validator=integer(at_least=0))  # after the first attempt
        # Seconds; an endpoint that asks to wait longer has failed.
        patience: float = field(default=120.0, validator=SECONDS)
        concurrency: int = field(default=8, validator=integer(at_least=1, at_most=1000))  # requests at a time in `map`
        temperature: float = field(default=0.0, validator=real(at_least=0))
        max_tokens: int = field(default=1024, validator=integer(at_least=1, at_most=10**7))  # of an answer
        image_tokens: int = field(default=1500, validator=integer(at_least=0))  # of one picture, for estimates
        price_in: float = field(default=0.0, validator=real(at_least=0))  # USD per million tokens
        price_out: float = field(default=0.0, validator=real(at_least=0))
        # Requests of this client, retries included.
        max_calls: int | None = field(default=None, validator=optional(integer(at_least=0)))
        max_usd: float | None = field(default=None, validator=optional(real(at_least=0)))
        cache: str | None = field(default=None, validator=optional(text()))  # folder
        rename: dict[str, str] = field(factory=dict)  # fields of a request, as in {max_tokens: max_completion_tokens}
        request: dict[str, Any] = field(factory=dict)  # fields to set, as in {top_p: 0.9}; null leaves a field out

        def __attrs_post_init__(self) -> None:
            problems = [*_of_request(self)]
            if not _is_name(self.key_env):  # whoever pastes the key itself must not read it in an error
                problems.append(f"key_env {A_NAME}")
            flaw = check_url(self.base_url) if self.base_url else None
            if flaw:
                problems.append(f"base_url {flaw}")
            if self.cache is not None and "\0" in self.cache:
                problems.append("cache is no name of a folder: it holds a NUL")
            if self.max_usd is not None and not self.price_in + self.price_out:
                problems.append("max_usd needs price_in and price_out, in USD per million tokens")
            if problems:
                raise ConfigError([f"openai: {p}" for p in problems])

    def __init__(self, config: Config, sleep: Callable[[float], None] = time.sleep) -> None:
        self.config = config
        self.spend = Spend()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._reserved = 0.0  # USD of requests under way
        self._warned = False  # that the cache cannot be written

    def chat(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None = None,
        check: Callable[[Any], str | None] = lambda answer: None,
    ) -> Any:
        """The answer as text or, with a JSON `schema`, as an object that fits it.

        `check` says what else is wrong with an answer. A wrong one is sent back once, with the reason; LLMError if it
        stays wrong or none comes, BudgetError where the call could cross a ceiling. Only good answers are cached.
        """
        question = self._question(messages, schema)
        key = self._key(messages, schema)
        kept = self._recall(key)
        if kept is not None:
            answer, flaw = self._read(kept, schema, check)
            if flaw is None:
                with self._lock:
                    self.spend.cached += 1
                return answer
        tokens = self._tokens(messages, schema)
        text = self._ask(question, schema, tokens, key)
        answer, flaw = self._read(text, schema, check)
        if flaw is not None:
            question += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"That answer cannot be used: {flaw}. Answer again, in full."},
            ]
            text = self._ask(question, schema, tokens + _guess(text) + _guess(flaw) + 50, key)
            answer, flaw = self._read(text, schema, check)
            if flaw is not None:
                words = f"{self.config.model}: the answer is still wrong after one repair: {flaw}"
                raise LLMError(_line(words, self._secret()))
        self._keep(key, answer if schema is None else json.dumps(answer))
        return answer

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R | LensError]:
        """`function` of each item, up to `concurrency` at a time, in the order of the items. A LensError takes the
        place of its result."""

        def safe(item: T) -> R | LensError:
            try:
                return function(item)
            except LensError as error:
                return error

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(safe, items))

    def estimate(
        self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None, calls: int = 1
    ) -> Estimate:
        """What `calls` chats like this one cost at most. Sends nothing; tokens are guessed from characters."""
        tokens = self._tokens(messages, schema)
        most = self._most()
        return Estimate(calls, tokens * calls, most * calls, self._price(tokens, most) * calls)

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _question(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """The turns. Where the request says otherwise in what form to answer, the schema is shown in words."""
        turns = [_turn(m) for m in messages]
        if schema is not None and "response_format" in self.config.request:
            turns.append({"role": "user", "content": f"Answer with JSON alone, of this schema: {json.dumps(schema)}"})
        return turns

    def _tokens(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> int:
        words = sum(_guess(m.text) for m in messages) + (_guess(json.dumps(schema)) if schema else 0)
        return words + 10 * len(messages) + self.config.image_tokens * sum(len(m.images) for m in messages)

    def _most(self) -> int:
        """The tokens that an answer may have: `max_tokens`, or what the request says instead under one of its names."""
        said = [v for k, v in self.config.request.items() if k in LIMITS and type(v) is int]
        return max([self.config.max_tokens, *said])

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6

    def _url(self) -> str | None:
        return self.config.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def _key(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> str:
        """What decides an answer, hashed: endpoint, model, messages, the hashes of pictures, schema, sampling."""
        told = {
            "url": self._url(),
            "model": self.config.model,
            "messages": [[m.role, m.text, [hashlib.sha256(i).hexdigest() for i in m.images]] for m in messages],
            "schema": schema,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.config.rename or self.config.request:  # else the key is that of caches from before these options
            told |= {"rename": self.config.rename, "request": self.config.request}
        # The schema's order of properties is kept: a model writes them in that order.
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return Path(self.config.cache).expanduser() / key[:2] / f"{key}.json" if self.config.cache else None

    def _recall(self, key: str) -> str | None:
        path = self._path(key)
        try:
            if path is None or not path.is_file() or path.stat().st_size > LARGEST:
                return None
            text = _parse(path.read_text(encoding="utf-8"))["text"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or damaged: ask again
        return text if isinstance(text, str) else None

    def _keep(self, key: str, text: str) -> None:
        """Put an answer into the cache. Where that fails, the answer has been paid for all the same: one warning."""
        path = self._path(key)
        if path is None:
            return
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps({"model": self.config.model, "text": text}), encoding="utf-8")
                os.replace(part, path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            with self._lock:
                first, self._warned = not self._warned, True
            if first:
                warnings.warn(
                    f"the cache {self.config.cache} cannot be written ({error.strerror or type(error).__name__}); "
                    "answers are used but not kept, and the same question will be paid for again",
                    stacklevel=3,
                )

    def _read(
        self, text: str, schema: Mapping[str, Any] | None, check: Callable[[Any], str | None]
    ) -> tuple[Any, str | None]:
        """(answer, what is wrong with it or None), without the key and without half characters."""
        if schema is None:
            return text, check(text)
        try:
            answer = redact_all(_whole(_answer(text)), self._secret())
        except ValueError as error:
            return None, f"it is not JSON: {error}"
        except RecursionError:
            return None, "it is not JSON: it is nested too deeply"
        flaw = unfit(answer, schema)
        return answer, flaw if flaw is not None else check(answer)

    def _ask(self, turns: list[dict[str, Any]], schema: Mapping[str, Any] | None, tokens: int, key: str) -> str:
        """One answer, after as many retries as it takes and is allowed."""
        url, secret = self._place(), self._needed()  # before anything is counted: without a key nothing is sent
        body = json.dumps(self._body(turns, schema)).encode()
        words = ""
        for attempt in range(self.config.retries + 1):
            most = self._reserve(tokens)
            outcome: _Reply | _Fault | None = None
            try:
                outcome = sent = self._send(url, secret, body, tokens)
            finally:  # whatever happened, an interrupt included, the reservation must not stay
                self._settle(most, outcome)
            if isinstance(sent, _Reply):
                return sent.text
            words = _line(f"{self.config.model}: {sent.words}", secret)
            if not sent.again:
                raise LLMError(words)
            if sent.wait > self.config.patience:
                raise LLMError(f"{words}; it asks to wait {sent.wait:.0f} s, more than patience allows")
            if attempt < self.config.retries:
                # The jitter comes from the question, so that requests which failed together do not return together.
                jitter = int(hashlib.sha256(f"{key} {attempt}".encode()).hexdigest()[:8], 16) / 2**32
                self._sleep(sent.wait + min(LONGEST, 2.0**attempt) * (0.5 + jitter / 2))
        raise LLMError(f"{words} ({self.config.retries + 1} attempts)")

    def _reserve(self, tokens: int) -> float:
        """Count a request and hold back its highest price, or raise BudgetError if a ceiling could be crossed."""
        c = self.config
        most = self._price(tokens, self._most())
        with self._lock:
            if c.max_calls is not None and self.spend.calls >= c.max_calls:
                raise BudgetError(f"{c.model}: max_calls ({c.max_calls}) is reached; raise it to go on")
            held = self.spend.usd + self._reserved
            if c.max_usd is not None and held + most > c.max_usd:
                raise BudgetError(
                    f"{c.model}: the next call could cost ${most:.4f}, and ${held:.4f} of max_usd "
                    f"(${c.max_usd:.4f}) is spent; raise it to go on"
                )
            self.spend.calls += 1
            self._reserved += most
        return most

    def _settle(self, most: float, outcome: _Reply | _Fault | None) -> None:
        with self._lock:
            self._reserved -= most
            if outcome is not None and outcome.tokens is not None:
                self.spend.tokens_in += outcome.tokens[0]
                self.spend.tokens_out += outcome.tokens[1]
                self.spend.usd += self._price(*outcome.tokens)
            elif not isinstance(outcome, _Fault) or outcome.billed:
                self.spend.usd += most  # nobody said what it cost

    def _secret(self) -> str | None:
        """The key as it stands in the environment, without blanks around it, such as the end of a line."""
        return os.environ.get(self.config.key_env, "").strip() or None

    def _needed(self) -> str:
        """The key, or LLMError, which names the variable, where there is none that could be sent."""
        secret, name = self._secret(), self.config.key_env
        if secret is None:
            raise LLMError(f"{self.config.model}: the environment variable {name} is not set")
        if not (secret.isascii() and secret.isprintable()) or " " in secret:
            raise LLMError(
                f"{self.config.model}: the environment variable {name} holds a space, a line's end or another "
                "character that no key has; set it to the key alone"
            )
        return secret

    def _place(self) -> str:
        """The address that chats are sent to."""
        url = self._url() or OFFICIAL
        flaw = check_url(url)
        if flaw:
            raise LLMError(f"{self.config.model}: {'base_url' if self.config.base_url else 'OPENAI_BASE_URL'} {flaw}")
        parts = urlsplit(url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions", fragment=""))

    def _body(self, turns: list[dict[str, Any]], schema: Mapping[str, Any] | None) -> dict[str, Any]:
        c = self.config
        body: dict[str, Any] = {
            "model": c.model,
            "messages": turns,
            "temperature": c.temperature,
            "max_tokens": c.max_tokens,
        }
        if schema is not None:
            form = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        body |= c.request
        return {c.rename.get(name, name): value for name, value in body.items() if value is not None}

    def _send(self, url: str, secret: str, body: bytes, tokens: int) -> _Reply | _Fault:
        """One request of about so many `tokens`. Whatever an endpoint does, the worst is a fault of this request."""
        c = self.config
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Authorization": f"Bearer {secret}",
        }
        for variable, header in (("OPENAI_ORG_ID", "OpenAI-Organization"), ("OPENAI_PROJECT_ID", "OpenAI-Project")):
            value = os.environ.get(variable, "").strip()
            if value and value.isascii() and value.isprintable():
                headers[header] = value
        begun = time.monotonic()
        try:
            answer = post(url, headers, body, c.timeout, LARGEST)
            LOG.debug(
                "%s: HTTP %d, %d bytes in %.1f s",
                c.model,
                answer.status,
                len(answer.body),
                time.monotonic() - begun,
            )
        except NotSent as error:
            return _Fault(f"the connection failed: {error}", again=not isinstance(error, UntrustedHost))
        except TimeoutError:
            return _Fault(f"no answer within {c.timeout:g} s", again=True, billed=True)
        except TooLarge as error:
            return _Fault(f"unreadable answer: {error}", billed=True)
        except ValueError as error:
            return _Fault(f"unreadable answer: {error}", again=True, billed=True)
        except ConnectionError as error:
            return _Fault(f"the connection failed: {error}", again=True, billed=True)
        return self._unpack(answer, secret, tokens)

    def _unpack(self, answer: Answer, secret: str, guess: int) -> _Reply | _Fault:
        if 300 <= answer.status < 400:
            place = f" to {answer.location[:200]}" if answer.location else ""
            words = f"HTTP {answer.status}: it redirects{place}, which is not followed, for the key would go there too"
            return _Fault(f"{words}; set base_url to where the endpoint is")
        head = answer.body[:2000].decode("utf-8", "replace")
        try:
            data = _parse(answer.body.decode("utf-8-sig"))
        except ValueError as error:
            if not 200 <= answer.status < 300:
                return _of_status(answer.status, head, answer.retry_after)
            if "json" in answer.content_type:
                return _Fault(f"unreadable answer: {error}", again=True, billed=True)
            return _Fault(f"not a chat completion; check base_url: {head}", billed=True)
        error = _error(data)
        if not 200 <= answer.status < 300:
            return _of_status(answer.status, error[1] if error else head, answer.retry_after)
        if error is not None:
            status, words = error
            if status is not None:
                return _of_status(status, words, answer.retry_after)
            return _Fault(f"the endpoint reports an error: {words}", billed=True, tokens=self._usage(data, guess, ""))
        choice = _first(data)
        message = choice.get("message") if choice is not None else None
        if choice is None or not isinstance(message, dict):
            return _Fault(f"not a chat completion; check base_url: {head}", billed=True)
        text = _text(message.get("content"))
        tokens = self._usage(data, guess, text or "")
        reason, refusal = choice.get("finish_reason"), message.get("refusal")
        reason = "" if reason is None else reason.lower() if isinstance(reason, str) else "?"
        if reason in WITHHELD or (isinstance(refusal, str) and refusal):
            why = refusal if isinstance(refusal, str) and refusal else "content filter"
            return _Fault(f"refused: {why}", billed=True, tokens=tokens)
        if reason in CUT:
            words = f"the answer was cut off at max_tokens ({self._most()}); raise max_tokens"
            return _Fault(words, billed=True, tokens=tokens)
        if reason not in FINISHED:
            words = f"the answer was not finished: finish_reason is {reason[:40]!r}"
            return _Fault(words, reason in PASSING, billed=True, tokens=tokens)
        if text is None or not text.strip():
            return _Fault("the answer has no text", billed=True, tokens=tokens)
        return _Reply(redact(text, secret) if len(secret) >= LEAST else text, tokens)

    def _usage(self, data: dict[str, Any], guess: int, text: str) -> tuple[int, int] | None:
        """The tokens in and out that an endpoint says, or None where that cannot be true: then the reservation counts.

        Believed are whole numbers of at least 1 in, at least 1 out for a text, and no more than ten times what was
        expected and 100,000 for what an endpoint adds by itself: hidden instructions, and thoughts.
        """
        usage = data.get("usage")
        if not isinstance(usage, dict):
            return None
        asked, told = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if type(asked) is not int or type(told) is not int:
            return None
        sound = 1 <= asked <= 10 * guess + 100_000 and bool(text) <= told <= 10 * self._most() + 100_000
        return (asked, told) if sound else None


# The names under which endpoints take the limit of an answer.
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")


def _of_request(c: OpenAI.Config) -> Iterator[str]:
    """What is wrong with the fields of a request that a config renames, sets or leaves out."""
    try:
        size = len(json.dumps([c.rename, c.request], allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        yield "request must hold what JSON can: text, finite numbers, true, false, null, lists and mappings"
        return
    names = [*c.rename, *c.rename.values(), *c.request]
    if not all(isinstance(n, str) and n for n in names):
        yield "rename and request are mappings from names of fields"
        return
    if size > 100_000:
        yield "rename and request are longer than 100,000 characters"
    if "messages" in c.request:
        yield "request must not set messages: they are the question"
    if c.request.get("stream"):
        yield "request must not ask for a stream: an answer is read as a whole"
    if c.request.get("n", 1) not in (None, 1):
        yield "request must not ask for more than n: 1 answers: one is read"
    for name, value in c.request.items():
        if name in LIMITS and value is not None and (type(value) is not int or not 1 <= value <= 10**7):
            yield f"request sets {name} to {str(value)[:40]}; it must be a whole number in [1, 10,000,000]"
    after = [c.rename.get(n, n) for n in {"model", "messages", "temperature", "max_tokens", *c.request, *c.rename}
             if n not in c.request or c.request[n] is not None]  # fmt: skip
    if len(set(after)) < len(after):
        yield "rename gives two fields of a request one name; leave one out with request: {NAME: null}"


def _is_name(text: Any) -> bool:
    """Whether `text` is the name of a variable, and no key pasted in its place: upper case, in words, few digits."""
    if not isinstance(text, str):
        return False
    words = text.split("_")
    return (
        re.fullmatch(r"[A-Z_][A-Z0-9_]*", text) is not None
        and len(text) <= 64
        and all(len(w) <= 16 and sum(c.isdigit() for c in w) <= 4 for w in words)
    )


def _guess(text: str) -> int:
    """Tokens. One is seldom fewer than 3 bytes, whatever the script: a guess that rather errs upwards."""
    return len(text.encode("utf-8", "replace")) // 3


def _line(words: str, secret: str | None) -> str:
    """One line of at most 300 characters without the key, which some endpoints quote."""
    line = " ".join(redact(_half(words[:4000]), secret).split())
    return line if len(line) <= 300 else f"{line[:299]}…"


def _half(text: str) -> str:
    """Text in which half characters (lone surrogates), which no file can hold, are replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _whole(value: Any) -> Any:
    """What JSON can hold, with `_half` of its strings."""
    if isinstance(value, str):
        return _half(value)
    if isinstance(value, list):
        return [_whole(v) for v in value]
    if isinstance(value, dict):
        return {_half(k): _whole(v) for k, v in value.items()}
    return value


def _parse(text: str) -> Any:
    """JSON, and nothing that only Python takes for it. ValueError where it is none, or nested too deeply."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _answer(text: str) -> Any:
    """The JSON in a model's answer: all of it, or what stands after its thoughts, in a fence, or between braces."""
    try:
        return _parse(text.strip().removeprefix("\ufeff"))
    except ValueError as error:
        first = error
    said = text.rpartition("</think>")[2]  # some templates open the thoughts themselves, so the answer only ends them
    fences = said.split("```")[1::2]
    inner = [f.partition("\n")[2] if "\n" in f else f for f in reversed(fences)]
    bare = [said[said.index("{") : said.rindex("}") + 1]] if "{" in said and "}" in said else []
    for part in (said, *inner[:8], *bare):
        try:
            return _parse(part.strip())
        except ValueError:
            continue
    raise first


def _first(data: Any) -> dict[str, Any] | None:
    """The first choice of a chat completion, or None where there is none."""
    choices = data.get("choices") if isinstance(data, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _text(content: Any) -> str | None:
    """The text of a message: a string, or a list of parts of which some are text. Half characters are replaced."""
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") in ("text", "output_text")]
        content = "".join(texts) if texts and all(isinstance(t, str) for t in texts) else None
    return _half(content) if isinstance(content, str) else None


def _error(data: Any) -> tuple[int | None, str] | None:
    """(status or None, words) of an error that stands in a body, of the whole answer or of its first choice."""
    if not isinstance(data, dict):
        return None
    told = data.get("error") or (_first(data) or {}).get("error")
    if not told and "choices" not in data:
        told = {k: data[k] for k in ("message", "detail", "code", "status") if data.get(k)}
    if not told:
        return None
    if not isinstance(told, dict):
        return None, _brief(told)
    words = told.get("message") or told.get("detail") or told
    for name in ("code", "status", "status_code", "http_status", "type"):
        status = _status(told.get(name))
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


def _of_status(status: int, words: str, retry_after: str | None) -> _Fault:
    """The fault that a status means."""
    again = status in TRANSIENT or 500 <= status <= 599
    return _Fault(f"HTTP {status}: {words}", again, _retry_after(retry_after))


def _turn(message: Message) -> dict[str, Any]:
    """A message as the protocol has it; pictures become data URLs."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
    for image in message.images:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": parts}


def _retry_after(told: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 where it is absent, unreadable, not a
    number or past."""
    try:
        wait = float(told or 0)
    except ValueError:
        try:
            wait = parsedate_to_datetime(str(told)).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return 0.0
    return wait if wait > 0 else 0.0  # not a number is not above 0


_KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)
}  # fmt: skip


def unfit(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """The first place where `value` does not fit `schema`, or None. Knows type, enum, properties, required,
    additionalProperties: false, and items: what strict answers are made of."""
    kind = schema.get("type")
    if kind is not None:
        wrong = not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            return f"{path} must be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{path}.{name} is missing"
        for name, inner in value.items():
            if name in known:
                flaw = unfit(inner, known[name], f"{path}.{name}")
                if flaw:
                    return flaw
            elif schema.get("additionalProperties") is False:
                return f"{path} has the unknown field {json.dumps(name[:60])}"
    if isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            flaw = unfit(inner, schema["items"], f"{path}[{index}]")
            if flaw:
                return flaw
    return None
