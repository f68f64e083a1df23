"""The options that the three remote generators share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from lens_core.config import SECRET
from lens_core.io.api_keys import A_NAME, is_variable_name
from lens_core.io.http import check_url
from lens_core.types import ConfigError
from lens_core.validators import integer, matching, optional, real, text

SECONDS = real(above=0, at_most=86_400)  # up to a day
MODEL = matching(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}", "the id of a model: letters, digits and . _ : @ / -")
MICRO = 1e-6  # USD; the ledger counts in whole millionths


@frozen(kw_only=True)
class RemoteConfig:
    model: str = field(validator=MODEL)  # its id at the API
    # None: the vendor's own.
    base_url: str | None = field(default=None, validator=optional(text()), metadata={SECRET: "must be a URL"})
    # Seconds for a whole request, from the look-up of the address to the last byte read.
    timeout: float = field(default=300.0, validator=SECONDS)
    retries: int = field(default=5, validator=integer(at_least=0, at_most=100))  # after the first attempt
    # Seconds; an API that asks to wait longer has failed for now.
    patience: float = field(default=120.0, validator=SECONDS)
    concurrency: int = field(default=4, validator=integer(at_least=1, at_most=256))  # requests at a time
    # Requests a minute that are begun at most, evenly spaced; retries count. None: as many as `concurrency` allows.
    pictures_per_minute: float | None = field(default=None, validator=optional(real(above=0, at_most=1e6)))
    # For estimates and budgets; 0: not known.
    dollars_per_picture: float = field(default=0.0, validator=real(at_least=MICRO, at_most=1000, zero=True))
    # USD that a ledger may count, with all runs that used it. What may have been billed counts in full.
    budget_dollars: float | None = field(default=None, validator=optional(real(at_least=0, at_most=1e9)))
    # The same for pictures.
    budget_pictures: int | None = field(default=None, validator=optional(integer(at_least=0)))
    # Folder of the ledger. None: `ledger` in the folder of the run.
    ledger: str | None = field(default=None, validator=optional(text()))
    # Send again what may have been drawn and billed, but never arrived: it may be paid for a second time.
    resend_lost: bool = False
    # Pictures in a row that fail, refusals aside, after which the run stops. What fails may cost money.
    stop_after: int = field(default=10, validator=integer(at_least=1))
    request: dict[str, Any] = field(factory=dict)  # further fields of a request's body; null leaves a field out

    reserved = frozenset({"model", "prompt", "n", "stream", "contents"})
    key_env: str

    def __attrs_post_init__(self) -> None:
        problems = [*self.problems()]
        if problems:
            raise ConfigError([f"{self.model}: {p}" for p in problems])

    def problems(self) -> Iterator[str]:
        """What is wrong with fields beyond their ranges."""
        if not is_variable_name(self.key_env):  # whoever pastes the key itself must not read it in an error
            yield f"key_env {A_NAME}"
        flaw = check_url(self.base_url) if self.base_url else None
        if flaw:
            yield f"base_url {flaw}"
        if ".." in self.model:
            yield "model must not hold '..'"
        if self.ledger is not None and "\0" in self.ledger:
            yield "ledger is no name of a folder: it holds a NUL"
        if self.budget_dollars is not None and not self.dollars_per_picture:
            yield "budget_dollars needs dollars_per_picture"
        try:
            size = len(json.dumps(self.request, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            yield "request must hold what JSON can: text, finite numbers, true, false, null, lists and mappings"
            return
        if size > 100_000:
            yield "request is longer than 100,000 characters"
        for name in sorted(self.reserved & set(self.request)):
            yield f"request must not set {name}: it is set for each picture"
