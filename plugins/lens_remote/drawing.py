"""One call of `generate`: each picture from its request to its outcome, with the ledger written around every step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lens_core.io import http
from lens_core.io.redaction import LEAST, redact_all, redacted_line, replace_surrogates
from lens_core.io.retries import backoff_seconds
from lens_core.types import LensError, PictureOutcome, PictureRequest
from lens_remote import pictures
from lens_remote.answers import Drawn, Failure, lost
from lens_remote.config import RemoteConfig
from lens_remote.ledger import Ledger, Limits, Line, TooSoon
from lens_remote.protocol import Call, ImageProtocol, understand

LOG = logging.getLogger(__name__)
LARGEST_ANSWER = 96 << 20  # bytes, decompressed: the base64 of the largest picture, and what stands around it
REQUEST_IDS = ("x-request-id", "x-tt-logid")  # headers by which a vendor finds a request again
RESEND = "set resend_lost to send it again, which may be paid for a second time"
LONGEST_FACT = 4000  # characters
LARGEST_FACTS = 2**15


class Drawing:
    """Draws pictures, from several threads, until one finds that no further will succeed: then it is `stopped`, and
    `reason` says why. `sleep` replaces the waits, for tests."""

    def __init__(
        self, protocol: ImageProtocol, config: RemoteConfig, ledger: Ledger, key: str, base_url: str,
        sleep: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        self.protocol, self.config, self.ledger = protocol, config, ledger
        self.stopped = threading.Event()
        self.reason: str | None = None
        spacing = 60 / config.pictures_per_minute if config.pictures_per_minute else 0.0
        self._limits = Limits(config.budget_dollars, config.budget_pictures, spacing)
        self._key, self._base_url = key, base_url
        self._sleep = sleep or self.stopped.wait
        self._held_until = -math.inf  # by the ledger's clock: an API has asked to wait
        self._failures = 0  # in a row
        self._lock = threading.Lock()

    def draw(self, request: PictureRequest) -> PictureOutcome | None:
        """The outcome of a request; None where the run was stopped before there was one."""
        try:
            return self._draw(request)
        except LensError as error:  # the ledger cannot be used, or a ceiling of the budget is reached
            self.stop(str(error))
            return None

    def stop(self, reason: str) -> None:
        """Let no further request begin."""
        with self._lock:
            self.reason = self.reason or redacted_line(f"{self.config.model}: {reason}", self._key, 600)
        self.stopped.set()

    def _draw(self, request: PictureRequest) -> PictureOutcome | None:
        c = self.config
        call = self.protocol.call(c, request)
        key = self._fingerprint(call, request)
        line = self.ledger.find(key)
        if line is not None and not (c.resend_lost and line.state in ("sent", "lost")):
            return self._known(request, line)
        failure, seconds = Failure("retry", "not_sent", "nothing was sent"), 0.0
        for attempt in range(c.retries + 1):
            begun_line = self._begin(key, request, again=c.resend_lost or attempt > 0)
            if begun_line is None:
                return None
            line, is_new = begun_line
            if not is_new:
                return self._known(request, line)
            begun = time.monotonic()
            answer, facts = self._send(call)
            taken = self._take(answer, line, begun, facts)
            seconds = time.monotonic() - begun
            if not isinstance(taken, Failure):
                return self._ok(request, taken, seconds, facts)
            failure = taken
            if not self._is_worth_another(failure) or attempt == c.retries:
                break
            with self._lock:
                self._held_until = max(self._held_until, self.ledger.now() + failure.wait)
            self._sleep(failure.wait + backoff_seconds(attempt, key))
        return self._unsuccessful(request, failure, seconds)

    def _fingerprint(self, call: Call, request: PictureRequest) -> str:
        """What decides a picture, hashed: the API, its request, and which of the prompt's pictures it is."""
        parts = [self._base_url, call.path, call.body, request.seed, request.prompt_id, request.index]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _begin(self, key: str, request: PictureRequest, again: bool) -> tuple[Line, bool] | None:
        """`Ledger.begin` as soon as a request may begin; None where none may any more."""
        c = self.config
        while not self.stopped.is_set():
            wait = self._held_until - self.ledger.now()
            if wait <= 0:
                try:
                    prompt = replace_surrogates(request.prompt)
                    return self.ledger.begin(
                        key, c.model, prompt, c.dollars_per_picture, c.timeout, self._limits, again
                    )
                except TooSoon as soon:
                    wait = soon.seconds
            self._sleep(wait)
        return None

    def _is_worth_another(self, failure: Failure) -> bool:
        """Whether to send a request again. What was drawn and cannot be fetched waits for the next run."""
        if failure.kind != "retry" or failure.wait > self.config.patience or failure.code == "no_download":
            return False
        return self.config.resend_lost or not failure.lost

    # ---- one request --------------------------------------------------------------------------------------------

    def _send(self, call: Call) -> tuple[Drawn | Failure, dict[str, Any]]:
        """(what came back, facts about it) of one request. Whatever a server does, the worst is a failure."""
        c = self.config
        url = http.join_url(self._base_url, call.path)
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.protocol.headers(self._key)}
        try:
            answer = http.post(url, headers, json.dumps(call.body).encode(), c.timeout, LARGEST_ANSWER)
        except http.UntrustedHost as error:
            return Failure("fatal", "untrusted_host", f"the host cannot prove who it is: {error}"), {}
        except http.NotSent as error:
            return Failure("retry", "no_connection", f"the connection failed: {error}"), {}
        except TimeoutError:
            return lost("timeout", f"no answer within {c.timeout:g} s; it may have been billed"), {}
        except ValueError as error:
            return lost("unreadable", f"the answer cannot be read: {error}"), {}
        except ConnectionError as error:
            return lost("no_answer", f"the connection broke: {error}; it may have been billed"), {}
        LOG.debug("%s: HTTP %d, %d bytes", c.model, answer.status, len(answer.body))
        result = understand(answer, self.protocol)
        identity = next((answer.headers[name] for name in REQUEST_IDS if name in answer.headers), None)
        facts: dict[str, Any] = {"request_id": identity} if identity else {}
        if isinstance(result, Drawn):
            facts |= result.facts
            facts |= {"revision": result.revision} if result.revision else {}
            facts |= {"pictures": result.count} if result.count > 1 else {}
        if result.usage:
            facts["usage"] = dict(result.usage)
        return result, self._clean(facts)

    def _take(
        self, answer: Drawn | Failure, line: Line, begun: float, facts: Mapping[str, Any]
    ) -> pictures.Checked | Failure:
        """The picture of an answer, kept in the ledger; or the failure, settled there."""
        count = 1
        if isinstance(answer, Failure):
            result: pictures.Checked | Failure = answer
        else:
            count = max(1, answer.count)
            data = self._bytes(answer, line, count, begun, facts)
            result = data if isinstance(data, Failure) else self._check(data)
        seconds = time.monotonic() - begun
        if isinstance(result, Failure):
            if result.code != "no_download":  # the address stays, and is tried again by the next run
                self._settle_failure(line, result, count, seconds, facts)
            return result
        try:
            place = self.ledger.keep(result.data, result.suffix)
            self.ledger.settle(line, "drawn", pictures=count, seconds=seconds, place=place, facts=facts)
        except LensError as error:  # the picture is here and paid for: it is handed on, and nothing more is sent
            self.stop(str(error))
        return result

    def _settle_failure(
        self, line: Line, failure: Failure, count: int, seconds: float, facts: Mapping[str, Any]
    ) -> None:
        billed = failure.billed or failure.lost
        state = "refused" if failure.kind == "refusal" else "lost" if billed else "free"
        self.ledger.settle(
            line, state, pictures=count if billed else 0, seconds=seconds, reason=self._line(failure), facts=facts
        )

    def _bytes(self, drawn: Drawn, line: Line, count: int, begun: float, facts: Mapping[str, Any]) -> bytes | Failure:
        if drawn.base64:
            return pictures.decode(drawn.base64)
        flaw = pictures.flaw_of_address(drawn.url, self._is_plain, self._key)
        if flaw is not None:
            return flaw
        seconds = time.monotonic() - begun
        try:
            self.ledger.settle(line, "address", pictures=count, seconds=seconds, place=drawn.url, facts=facts)
        except LensError as error:
            self.stop(str(error))
        return self._fetch(drawn.url)

    @property
    def _is_plain(self) -> bool:
        return self._base_url.startswith("http://")

    def _fetch(self, url: str) -> bytes | Failure:
        for attempt in range(self.config.retries + 1):
            data = pictures.fetch(url, self.config.timeout, self._is_plain, self._key)
            if not isinstance(data, Failure) or data.kind != "retry" or data.lost or attempt == self.config.retries:
                break
            self._sleep(backoff_seconds(attempt, url))
        return data

    def _check(self, data: bytes) -> pictures.Checked | Failure:
        if len(self._key) >= LEAST and self._key.encode() in data:
            return lost("bad_picture", "the picture's file holds the key")
        return pictures.check(data)

    # ---- outcomes -----------------------------------------------------------------------------------------------

    def _ok(
        self, request: PictureRequest, checked: pictures.Checked, seconds: float, facts: Mapping[str, Any]
    ) -> PictureOutcome:
        with self._lock:
            self._failures = 0
        usd = self.config.dollars_per_picture * facts.get("pictures", 1)
        return PictureOutcome(request, "ok", checked.data, seconds=seconds, usd=usd, facts=facts)

    def _unsuccessful(self, request: PictureRequest, failure: Failure, seconds: float) -> PictureOutcome | None:
        """The outcome of a picture that there is none of; or the end of the run, where the next will fare no better."""
        reason = self._line(failure)
        if failure.kind == "refusal":
            with self._lock:
                self._failures = 0
            return PictureOutcome(request, "refused", reason=reason, seconds=seconds)
        if failure.kind == "fatal":
            self.stop(reason + self.protocol.hint(self.config.model))
            return None
        if failure.wait > self.config.patience:
            self.stop(f"{reason}; it asks to wait {failure.wait:.0f} s, more than patience allows")
            return None
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= self.config.stop_after:
            self.stop(f"{failures} pictures in a row failed; the last one: {reason}")
        return self._failed(request, failure, reason, seconds)

    def _failed(self, request: PictureRequest, failure: Failure, reason: str, seconds: float) -> PictureOutcome:
        hint = f"; {RESEND}" if failure.lost or failure.billed else ""
        return PictureOutcome(request, "failed", reason=f"{reason}{hint}", seconds=seconds)

    def _known(self, request: PictureRequest, line: Line) -> PictureOutcome:
        """The outcome that the ledger has of a picture; nothing is sent to the API."""
        if line.state == "refused":
            return PictureOutcome(request, "refused", reason=line.reason, seconds=line.seconds)
        if line.state == "sent":
            left = line.deadline - self.ledger.now()
            reason = (
                f"under_way: it was sent before, and may be answered yet; try again in {left:.0f} s" if left > 0 else
                f"no_answer: it was sent before and never answered, and may have been billed; {RESEND}"
            )  # fmt: skip
            return PictureOutcome(request, "failed", reason=reason)
        if line.state == "lost":
            return PictureOutcome(request, "failed", reason=f"{line.reason}; {RESEND}", seconds=line.seconds)
        data: bytes | Failure | None = self.ledger.picture(line)
        if line.state == "address":
            data = self._fetch(line.place)
        if data is None:
            data = lost("picture_gone", "it was paid for, and its file is gone from the ledger, or changed")
        checked = data if isinstance(data, Failure) else self._check(data)
        if isinstance(checked, Failure):
            if checked.lost:
                self._settle_failure(line, checked, line.pictures, line.seconds, line.facts)
            return self._failed(request, checked, self._line(checked), line.seconds)
        if line.state == "address":
            place = self.ledger.keep(checked.data, checked.suffix)
            self.ledger.settle(
                line, "drawn", pictures=line.pictures, seconds=line.seconds, place=place, facts=line.facts
            )
        return self._ok(request, checked, line.seconds, line.facts)

    def _line(self, failure: Failure) -> str:
        return redacted_line(failure.reason, self._key)

    def _clean(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Facts without the key, and of bounded size."""
        cleaned: dict[str, Any] = redact_all(dict(facts), self._key)
        for name, value in cleaned.items():
            if isinstance(value, str):
                cleaned[name] = redacted_line(value, self._key, LONGEST_FACT)
        return cleaned if len(json.dumps(cleaned)) <= LARGEST_FACTS else {}
