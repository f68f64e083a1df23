"""One live line for work that takes a while, on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")


def progress_bar(total: int | None, unit: str, **options: Any) -> Any:
    """tqdm's bar over `total` units, which is gone when the work is done. `options` are tqdm's own, such as `desc`.

    Of several processes (accelerate launch) the first one alone draws it."""
    from tqdm import tqdm

    disable = None if os.environ.get("RANK", "0") == "0" else True  # None: where stderr is no terminal
    return tqdm(total=total, unit=unit, **{"disable": disable, "leave": False, "dynamic_ncols": True, **options})


def progress(items: Iterable[T], unit: str, total: int | None = None, **options: Any) -> Iterator[T]:
    """The items, while a bar counts them. `total`: how many there are, where they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(total, unit, **options) as bar:
        for item in items:
            yield item
            bar.update()


def print_line(line: str) -> None:
    """Print a line to stderr, above the live lines that are there."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def hub_bars() -> Iterator[None]:
    """While this lasts, huggingface_hub draws its bars of uploads only where stderr is a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
