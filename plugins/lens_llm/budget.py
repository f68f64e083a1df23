"""What language models cost: the requests and USD of a client, and its ceilings on both."""

from __future__ import annotations

import threading

from attrs import frozen, mutable

from lens_core.types import LensError


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


class Budget:
    """What one client has spent and may spend; None is no ceiling. Prices are in USD per million tokens. Safe to call
    from several threads."""

    def __init__(
        self, model: str, price_in: float, price_out: float, max_calls: int | None, max_usd: float | None
    ) -> None:
        self.model, self.price_in, self.price_out = model, price_in, price_out
        self.max_calls, self.max_usd = max_calls, max_usd
        self.spend = Spend()
        self.reserved = 0.0  # USD of requests under way
        self._lock = threading.Lock()

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """USD."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def count_cached(self) -> None:
        with self._lock:
            self.spend.cached += 1

    def reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Count a request and hold back its highest price, which is returned, or raise BudgetError if a ceiling could
        be crossed."""
        most = self.price(tokens_in, tokens_out)
        with self._lock:
            if self.max_calls is not None and self.spend.calls >= self.max_calls:
                raise BudgetError(f"{self.model}: max_calls ({self.max_calls}) is reached; raise it to go on")
            held = self.spend.usd + self.reserved
            if self.max_usd is not None and held + most > self.max_usd:
                raise BudgetError(
                    f"{self.model}: the next call could cost ${most:.4f}, and ${held:.4f} of max_usd "
                    f"(${self.max_usd:.4f}) is spent; raise it to go on"
                )
            self.spend.calls += 1
            self.reserved += most
        return most

    def settle(self, reserved: float, tokens: tuple[int, int] | None, billed: bool) -> None:
        """Replace what was held back by what the request cost: its `tokens` in and out, or the reservation where they
        are not known and it may have been `billed`."""
        with self._lock:
            self.reserved -= reserved
            if tokens is not None:
                self.spend.tokens_in += tokens[0]
                self.spend.tokens_out += tokens[1]
                self.spend.usd += self.price(*tokens)
            elif billed:
                self.spend.usd += reserved
