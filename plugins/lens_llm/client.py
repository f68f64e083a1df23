"""The llm `openai`: chat with any OpenAI-compatible endpoint, within a budget, and never twice for the same question.

The key is read from an environment variable when the first call is made, and stands in no config, error or file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from attrs import field, frozen

from lens_core.config import SECRET
from lens_core.io.api_keys import A_NAME, is_variable_name, read_key, required_key
from lens_core.io.http import NotSent, TooLarge, UntrustedHost, check_url, join_url, post
from lens_core.io.redaction import redact_all, redacted_line
from lens_core.io.retries import backoff_seconds
from lens_core.types import ConfigError, LensError, Message
from lens_core.validators import integer, optional, real, text
from lens_llm.budget import Budget, Estimate, LLMError, Spend
from lens_llm.cache import AnswerCache
from lens_llm.completions import Fault, Reply, unpack
from lens_llm.json_answers import clean, read_json, unfit

LOG = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

LARGEST = 4 << 20  # bytes of an answer, decompressed
SECONDS = real(above=0, at_most=86_400)  # up to a day
OFFICIAL = "https://api.openai.com/v1"


class OpenAI:
    """Any chat API that speaks OpenAI's protocol: OpenAI, vLLM, Ollama and others.

    Safe to call from several threads; `map` does so.
    """

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
        # Take a text that was cut off at max_tokens, or is blank, for an answer: as where a picture is to be read.
        as_is: bool = False
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
            if not is_variable_name(self.key_env):  # whoever pastes the key itself must not read it in an error
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
        self.budget = Budget(config.model, config.price_in, config.price_out, config.max_calls, config.max_usd)
        self._cache = AnswerCache(config.cache, config.model)
        self._sleep = sleep

    @property
    def spend(self) -> Spend:
        return self.budget.spend

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
        kept = self._cache.read(key)
        if kept is not None:
            answer, flaw = self._read(kept, schema, check)
            if flaw is None:
                self.budget.count_cached()
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
                raise LLMError(redacted_line(words, self._secret()))
        self._cache.write(key, answer if schema is None else json.dumps(answer))
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
        return Estimate(calls, tokens * calls, most * calls, self.budget.price(tokens, most) * calls)

    def check_requirements(self) -> None:
        """Raise LLMError where there is no key, or no address to send to. Nothing is sent."""
        self._place()
        required_key(self.config.key_env, self.config.model, LLMError)

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _question(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """The turns. Where the request says otherwise in what form to answer, the schema is shown in words."""
        turns = [_as_message(m) for m in messages]
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

    def _url(self) -> str | None:
        return self.config.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def _key(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> str:
        """What decides an answer, hashed: endpoint, model, messages, the hashes of pictures, schema, sampling."""
        parts = {
            "url": self._url(),
            "model": self.config.model,
            "messages": [[m.role, m.text, [hashlib.sha256(i).hexdigest() for i in m.images]] for m in messages],
            "schema": schema,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.config.rename or self.config.request:  # else the key is that of caches from before these options
            parts |= {"rename": self.config.rename, "request": self.config.request}
        if self.config.as_is:
            parts |= {"as_is": True}
        # The schema's order of properties is kept: a model writes them in that order.
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _read(
        self, text: str, schema: Mapping[str, Any] | None, check: Callable[[Any], str | None]
    ) -> tuple[Any, str | None]:
        """(answer, what is wrong with it or None), without the key and without half characters."""
        if schema is None:
            return text, check(text)
        try:
            answer = redact_all(clean(read_json(text)), self._secret())
        except ValueError as error:
            return None, f"it is not JSON: {error}"
        except RecursionError:
            return None, "it is not JSON: it is nested too deeply"
        flaw = unfit(answer, schema)
        return answer, flaw if flaw is not None else check(answer)

    def _ask(self, turns: list[dict[str, Any]], schema: Mapping[str, Any] | None, tokens: int, key: str) -> str:
        """One answer, after as many retries as it takes and is allowed."""
        url = self._place()  # before anything is counted, as is the key: without them nothing is sent
        secret = required_key(self.config.key_env, self.config.model, LLMError)
        body = json.dumps(self._body(turns, schema)).encode()
        words = ""
        for attempt in range(self.config.retries + 1):
            most = self.budget.reserve(tokens, self._most())
            outcome: Reply | Fault | None = None
            try:
                outcome = sent = self._send(url, secret, body, tokens, self.config.as_is and schema is None)
            finally:  # whatever happened, an interrupt included, the reservation must not stay
                self._settle(most, outcome)
            if isinstance(sent, Reply):
                return sent.text
            words = redacted_line(f"{self.config.model}: {sent.words}", secret)
            if not sent.again:
                raise LLMError(words)
            if sent.wait > self.config.patience:
                raise LLMError(f"{words}; it asks to wait {sent.wait:.0f} s, more than patience allows")
            if attempt < self.config.retries:
                self._sleep(sent.wait + backoff_seconds(attempt, key))
        raise LLMError(f"{words} ({self.config.retries + 1} attempts)")

    def _settle(self, reserved: float, outcome: Reply | Fault | None) -> None:
        tokens = outcome.tokens if outcome is not None else None
        self.budget.settle(reserved, tokens, billed=not isinstance(outcome, Fault) or outcome.billed)

    def _secret(self) -> str | None:
        return read_key(self.config.key_env)

    def _place(self) -> str:
        """The address that chats are sent to."""
        url = self._url() or OFFICIAL
        flaw = check_url(url)
        if flaw:
            raise LLMError(f"{self.config.model}: {'base_url' if self.config.base_url else 'OPENAI_BASE_URL'} {flaw}")
        return join_url(url, "/chat/completions")

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

    def _send(self, url: str, secret: str, body: bytes, tokens: int, as_is: bool = False) -> Reply | Fault:
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
            return Fault(f"the connection failed: {error}", again=not isinstance(error, UntrustedHost))
        except TimeoutError:
            return Fault(f"no answer within {c.timeout:g} s", again=True, billed=True)
        except TooLarge as error:
            return Fault(f"unreadable answer: {error}", billed=True)
        except ValueError as error:
            return Fault(f"unreadable answer: {error}", again=True, billed=True)
        except ConnectionError as error:
            return Fault(f"the connection failed: {error}", again=True, billed=True)
        return unpack(answer, secret, tokens, self._most(), as_is)


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


def _guess(text: str) -> int:
    """Tokens. One is seldom fewer than 3 bytes, whatever the script: a guess that rather errs upwards."""
    return len(text.encode("utf-8", "replace")) // 3


def _as_message(message: Message) -> dict[str, Any]:
    """A message as the protocol has it; pictures become data URLs."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
    for image in message.images:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": parts}
