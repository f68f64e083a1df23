"""The llm `openai`: chat with any OpenAI-compatible endpoint, within a budget, and never twice for the same question.

The key is read from an environment variable when the first call is made, and stands in no config, error or file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from attrs import frozen, mutable

from lens_core.types import ConfigError, LensError, Message

T = TypeVar("T")
R = TypeVar("R")

TRANSIENT = frozenset({408, 429})  # and 5xx: the same request may succeed later
LONGEST = 60.0  # seconds of backoff at most; an endpoint may ask for more, up to `patience`


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
    """An attempt without an answer. `wait`: the seconds that the endpoint asked for; `billed`: it may cost money."""

    words: str
    again: bool = False
    wait: float = 0.0
    billed: bool = False


@frozen
class _Reply:
    text: str
    tokens: tuple[int, int] | None  # in, out; None where the endpoint does not say


class OpenAI:
    """Chat completions. Safe to call from several threads; `map` does so."""

    @frozen
    class Config:
        model: str
        base_url: str | None = None  # None: OPENAI_BASE_URL, or else OpenAI's own
        key_env: str = "OPENAI_API_KEY"  # the NAME of the variable that holds the key
        timeout: float = 60.0  # seconds
        retries: int = 4  # after the first attempt
        patience: float = 120.0  # seconds; an endpoint that asks to wait longer has failed
        concurrency: int = 8  # requests at a time in `map`
        temperature: float = 0.0
        max_tokens: int = 1024  # of an answer
        image_tokens: int = 1500  # of one picture, for estimates
        price_in: float = 0.0  # USD per million tokens
        price_out: float = 0.0
        max_calls: int | None = None  # requests of this client, retries included
        max_usd: float | None = None
        cache: str | None = None  # folder

        def __attrs_post_init__(self) -> None:
            problems = []
            if not self.model:
                problems.append("model is empty; name one that the endpoint offers")
            if not self.key_env.isidentifier():  # whoever pastes the key itself must not read it in an error
                problems.append("key_env must be the name of an environment variable, such as OPENAI_API_KEY")
            if min(self.timeout, self.patience) <= 0:
                problems.append(f"timeout and patience must be positive, not {self.timeout} and {self.patience}")
            if min(self.concurrency, self.max_tokens) < 1:
                problems.append(
                    f"concurrency and max_tokens must be at least 1, not {self.concurrency} and {self.max_tokens}"
                )
            if min(self.retries, self.temperature, self.image_tokens, self.price_in, self.price_out) < 0:
                problems.append("retries, temperature, image_tokens and prices must not be negative")
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
        self._client: Any = None

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
        question = [_turn(m) for m in messages]
        key = self._key(messages, schema)
        kept = self._recall(key)
        if kept is not None:
            answer, flaw = _read(kept, schema, check)
            if flaw is None:
                with self._lock:
                    self.spend.cached += 1
                return answer
        tokens = self._tokens(messages, schema)
        text = self._ask(question, schema, tokens, key)
        answer, flaw = _read(text, schema, check)
        if flaw is not None:
            question += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"That answer cannot be used: {flaw}. Answer again, in full."},
            ]
            text = self._ask(question, schema, tokens + (len(text.encode()) + len(flaw.encode())) // 3 + 50, key)
            answer, flaw = _read(text, schema, check)
            if flaw is not None:
                raise LLMError(f"{self.config.model}: the answer is still wrong after one repair: {flaw}")
        self._keep(key, text)
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
        most = self.config.max_tokens
        return Estimate(calls, tokens * calls, most * calls, self._price(tokens, most) * calls)

    def close(self) -> None:
        """Close the connections. The next call opens them again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _tokens(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> int:
        # A token is seldom fewer than 3 bytes, whatever the script: a guess that rather errs upwards.
        words = sum(len(m.text.encode()) for m in messages) + (len(json.dumps(schema)) if schema else 0)
        return words // 3 + 10 * len(messages) + self.config.image_tokens * sum(len(m.images) for m in messages)

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
        # The schema's order of properties is kept: a model writes them in that order.
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return Path(self.config.cache).expanduser() / key[:2] / f"{key}.json" if self.config.cache else None

    def _recall(self, key: str) -> str | None:
        path = self._path(key)
        try:
            text = json.loads(path.read_text(encoding="utf-8"))["text"] if path else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or damaged: ask again
        return text if isinstance(text, str) else None

    def _keep(self, key: str, text: str) -> None:
        path = self._path(key)
        if path is None:
            return
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"model": self.config.model, "text": text}), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise LLMError(f"the cache {self.config.cache} cannot be written: {error.strerror}") from error

    def _ask(self, turns: list[dict[str, Any]], schema: Mapping[str, Any] | None, tokens: int, key: str) -> str:
        """One answer, after as many retries as it takes and is allowed."""
        self._connect()  # before anything is counted: without a key nothing is sent
        words = ""
        for attempt in range(self.config.retries + 1):
            most = self._reserve(tokens)
            outcome: _Reply | _Fault | None = None
            try:
                outcome = sent = self._send(turns, schema)
            finally:  # whatever happened, an interrupt included, the reservation must not stay
                self._settle(most, outcome)
            if isinstance(sent, _Reply):
                return sent.text
            words = sent.words
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
        most = self._price(tokens, c.max_tokens)
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
            if isinstance(outcome, _Reply) and outcome.tokens is not None:
                self.spend.tokens_in += outcome.tokens[0]
                self.spend.tokens_out += outcome.tokens[1]
                self.spend.usd += self._price(*outcome.tokens)
            elif not isinstance(outcome, _Fault) or outcome.billed:
                self.spend.usd += most  # nobody said what it cost

    def _connect(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise LLMError("the llm 'openai' needs the package openai: pip install 'lens-t2i[llm]'") from error
        with self._lock:
            if self._client is None:
                secret = os.environ.get(self.config.key_env)
                if not secret:
                    raise LLMError(f"{self.config.model}: the environment variable {self.config.key_env} is not set")
                self._client = openai.OpenAI(
                    api_key=secret, base_url=self._url(), timeout=self.config.timeout, max_retries=0
                )
            return self._client

    def _send(self, turns: list[dict[str, Any]], schema: Mapping[str, Any] | None) -> _Reply | _Fault:
        """One request. Faults are returned, not raised: the package's exceptions carry the request and its key."""
        client = self._connect()
        import openai

        form: dict[str, Any] = {}
        if schema is not None:
            form["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            }
        c, name = self.config, self.config.model
        try:
            reply = client.chat.completions.create(
                model=name, messages=turns, temperature=c.temperature, max_tokens=c.max_tokens, **form
            )
        except openai.APITimeoutError:
            return _Fault(f"{name}: no answer within {c.timeout:g} s", again=True, billed=True)
        except openai.APIStatusError as error:
            status = error.status_code
            words = self._clean(f"{name}: HTTP {status}: {error.message}")
            wait = _retry_after(error.response.headers.get("retry-after"))
            return _Fault(words, status in TRANSIENT or status >= 500, wait)
        except openai.APIConnectionError as error:
            return _Fault(self._clean(f"{name}: the connection failed: {error.__cause__ or error}"), True, billed=True)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not the JSON it says it is
            return _Fault(self._clean(f"{name}: unreadable answer: {error}"), again=True, billed=True)
        return self._unpack(reply)

    def _unpack(self, reply: Any) -> _Reply | _Fault:
        name = self.config.model
        choices = getattr(reply, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:  # the package lets foreign bodies through
            start = reply if isinstance(reply, str) else type(reply).__name__
            return _Fault(self._clean(f"{name}: not a chat completion; check base_url: {start}"), billed=True)
        usage, message = getattr(reply, "usage", None), choices[0].message
        asked, told = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        tokens = (asked, told) if isinstance(asked, int) and isinstance(told, int) else None
        refusal = getattr(message, "refusal", None)
        if refusal or choices[0].finish_reason == "content_filter":
            return _Fault(self._clean(f"{name}: refused: {refusal or 'content filter'}"), billed=True)
        if not isinstance(message.content, str):
            return _Fault(f"{name}: the answer has no text", billed=True)
        return _Reply(message.content, tokens)

    def _clean(self, words: str) -> str:
        """One line of at most 300 characters without the key, which some endpoints quote."""
        secret = os.environ.get(self.config.key_env)
        line = " ".join((words.replace(secret, "[key]") if secret else words).split())
        return line if len(line) <= 300 else f"{line[:299]}…"


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
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 where it is absent or unreadable."""
    if not told:
        return 0.0
    try:
        return (
            max(0.0, float(told)) if told.strip().isdecimal() else parsedate_to_datetime(told).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return 0.0


def _read(text: str, schema: Mapping[str, Any] | None, check: Callable[[Any], str | None]) -> tuple[Any, str | None]:
    """(answer, what is wrong with it or None)."""
    if schema is None:
        return text, check(text)
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"it is not JSON: {error}"
    flaw = unfit(answer, schema)
    return answer, flaw if flaw is not None else check(answer)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)
}  # fmt: skip


def unfit(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """The first place where `value` does not fit `schema`, or None. Knows type, enum, properties, required,
    additionalProperties: false, and items: what strict answers are made of."""
    kind = schema.get("type")
    if kind is not None:
        wrong = not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")
        if wrong:
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
                return f"{path}.{name} is unknown"
    if isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            flaw = unfit(inner, schema["items"], f"{path}[{index}]")
            if flaw:
                return flaw
    return None
