"""What a training store holds, as text: `lens data info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lens_data.buckets import LENS_BUCKETS, Buckets, assign
from lens_data.store import Store


def summary(store: Store, buckets: Buckets = LENS_BUCKETS, **limits: Any) -> str:
    """Counts by source, size, caption length and bucket of `buckets`, as text; `limits` are those of `assign`."""
    rows = store.columns("height", "width", "brief", "dense", "source")
    lines = [f"{store.path}: {len(rows)} pictures, version {store.version}"]
    lines += [f"  {count:8}  from {source}" for source, count in sorted(Counter(rows["source"].to_pylist()).items())]
    if not len(rows):
        return lines[0]
    heights, widths = (rows[name].to_numpy().astype(np.int64) for name in ("height", "width"))
    lines += ["", f"{'':20}{'pictures':>9}{'least':>9}{'median':>9}{'most':>9}"]
    lines += [
        _spread("height, px", heights),
        _spread("width, px", widths),
        _spread("sqrt(area), px", (heights * widths) ** 0.5),
    ]
    for name in ("brief", "dense"):
        words = [len(text.split()) for text in rows[name].to_pylist()]
        lines.append(_spread(f"{name} caption, words", [n for n in words if n]))
    assignment = assign(heights, widths, buckets, **limits)
    lines += ["", f"{'bucket':20}{'pictures':>9}"]
    lines += [f"{f'{h}x{w}':20}{len(m):9}" for (h, w), m in zip(assignment.sizes, assignment.members, strict=True)]
    lines += [f"{reason:20}{count:9}" for reason, count in assignment.left_out.items()]
    return "\n".join(lines)


def _spread(name: str, values: Sequence[float] | np.ndarray[Any, Any]) -> str:
    figures = [f"{f(values):9.0f}" for f in (np.min, np.median, np.max)] if len(values) else ["        -"] * 3
    return f"{name:20}{len(values):9}{''.join(figures)}"
