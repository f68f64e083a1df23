"""One live line for work that takes a while, on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int | None, unit: str, **options: Any) -> Any:
    """tqdm's bar over `total` units, which is gone when the work is done. `options` are tqdm's own, such as `desc`."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, **{"disable": None, "leave": False, "dynamic_ncols": True, **options})
