"""How long to wait before the same request is sent again."""

from __future__ import annotations

import hashlib
import time
from email.utils import parsedate_to_datetime

LONGEST = 60.0  # seconds of backoff at most


def retry_after_seconds(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 where it is absent, unreadable, not a
    number or past."""
    try:
        wait = float(header or 0)
    except ValueError:
        try:
            wait = parsedate_to_datetime(str(header)).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return 0.0
    return wait if wait > 0 else 0.0  # not a number is not above 0


def backoff_seconds(attempt: int, key: str) -> float:
    """Exponential backoff with jitter: half of min(60, 2^attempt) to all of it; attempts count from 0.

    The jitter comes from the request's `key`, so that requests which failed together do not return together.
    """
    jitter = int(hashlib.sha256(f"{key} {attempt}".encode()).hexdigest()[:8], 16) / 2**32
    return min(LONGEST, 2.0**attempt) * (0.5 + jitter / 2)
