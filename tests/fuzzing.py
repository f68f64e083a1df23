"""Tools to read anything: sound JSON with something changed, little memory, and how many cases."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lens_core.types import LensError

CASES = int(os.environ.get("LENS_FUZZ", 0))
fuzz = settings(
    max_examples=CASES or 60,
    derandomize=not CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def little_memory() -> Iterator[None]:
    """An allocation of gigabytes fails, as an exception that nobody expects."""
    if not Path("/proc/self/statm").exists():  # not Linux: the cases alone
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read(call: Callable[[], Any]) -> Any:
    """What `call` returns, or None if it refuses in one line."""
    try:
        return call()
    except LensError as error:
        lines = getattr(error, "problems", (str(error),))
        assert all("\n" not in line for line in lines), lines
        return None


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40, -(2**63)]),
    st.floats(),
    st.text(max_size=3),
    st.none(),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
TEXTS = st.one_of(
    JSON.map(json.dumps),
    st.sampled_from(
        ["[" * 200_000, '{"a":' * 100_000, "1" * 5000, '{"a": ' + "9" * 100_000 + "}", '{"a": 1e400}', "NaN"]
    ),
    st.text(max_size=20),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """`sound` JSON with one or two places changed to anything, or left out."""
    data = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(data)[1:] or [("x",)]))
        at = data
        for key in path:
            at = at[key]
        if draw(st.booleans()):
            at[last] = draw(st.one_of(JSON, NUMBERS))
        elif isinstance(at, dict):
            at.pop(last, None)
            at[draw(st.one_of(st.text(max_size=5), st.sampled_from(["use", "config", "steps", "sizes"])))] = draw(JSON)
        if not isinstance(data, dict):
            break
    return data
