"""The backbone: a multimodal diffusion transformer over image and text tokens.

`mmdit` (model.py) is the network, in the published architecture at any size, and segments.py what it needs to take
samples of different sizes in one pass; published.py recognises the published checkpoint folders, which have no
`lens.json`, and knows where on the Hub they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_backbones() -> dict[str, type[Any]]:
    from lens_mmdit.model import LensTransformer2DModel

    return {"mmdit": LensTransformer2DModel}


@hookimpl
def lens_fetch(uri: str) -> Path | None:
    from lens_mmdit.published import fetch

    return fetch(uri)


@hookimpl
def lens_describe(folder: Path) -> dict[str, Any] | None:
    from lens_mmdit.published import describe

    return describe(folder)
