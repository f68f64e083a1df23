"""Acme's plugin for Lens.

`hashed_words` (words.py) is a text encoder without a vocabulary; `contrast` (contrast.py) is a reward.
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_text_encoders() -> dict[str, type[Any]]:
    from lens_acme.words import HashedWords

    return {"hashed_words": HashedWords}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    from lens_acme.contrast import Contrast

    return {"contrast": Contrast}
