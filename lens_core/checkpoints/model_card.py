"""The model card: a README.md that says what a checkpoint is. One that a person wrote or changed is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_core.io import markdown, readers
from lens_core.types import LensError

FILE = "README.md"
_MARK = "\n<!-- Written by Lens ({}). Change what you like: a card that was changed is kept. -->\n"
_LICENCE = ("license", "license_name", "license_link")


def text(described: Mapping[str, Any], name: str = ".") -> str:
    """The card of what `described`, a `lens.json`, describes; `name` is how to load it. Equal for equal arguments."""
    known: dict[str, Any] = {**described.get("provenance", {})}
    head = {"pipeline_tag": "text-to-image", "library_name": "lens-t2i", "tags": ["lens"]}
    head |= {key: known[key] for key in ("base_model", *_LICENCE) if key in known}
    presets = described.get("presets", {})
    parts = described["components"]
    facts = {
        part.replace("_", " "): f"`{use['use']}`" + (f", that of `{use['from']}`" if "from" in use else "")
        for part, use in parts.items()
    }
    facts |= {key.replace("_", " "): presets[key] for key in ("steps", "guidance_scale") if key in presets}
    facts |= {"made from": known["base_model"]} if "base_model" in known else {}
    facts |= {"training": ", ".join(f"{k} {v}" for k, v in known["recipe"].items())} if "recipe" in known else {}
    facts |= {"LoRAs in it": ", ".join(known["loras"])} if known.get("loras") else {}
    facts |= {"plugins": ", ".join(f"{k} ({v})" for k, v in described.get("plugins", {}).items())}
    title = "A checkpoint of Lens" if name == "." else name
    rows = "\n".join(markdown.row(fact) for fact in facts.items())
    body = f"""---
{chr(10).join(f"{key}: {json.dumps(value)}" for key, value in head.items())}
---

# {title}

A text-to-image model. `pip install lens-t2i`, then

```python
from lens_core import LensPipeline

pipeline = LensPipeline.from_pretrained({json.dumps(name)})
pipeline("a red star above a blue ring", seed=7).images[0].save("star.png")
```

or `lens generate "a red star above a blue ring" --model {name} --seed 7`.

| | |
|---|---|
{rows}
"""
    return body + _MARK.format(_hash(body))


def _hash(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def ours(card: str) -> bool:
    """Whether `text` wrote it and nobody has changed it since."""
    body, mark, _ = card.rpartition(_MARK.partition("{")[0])
    return bool(mark) and card == body + _MARK.format(_hash(body))


def may_replace(path: Path) -> bool:
    """Whether there is no card yet, or one that nobody would miss."""
    try:
        return ours(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def licence(folder: Path) -> dict[str, str]:
    """What the card in `folder` says about the licence, as the Hub's front matter does."""
    try:
        card = "\n".join(readers.lines(readers.read_text(folder / FILE)))
    except LensError:
        return {}
    head = card.removeprefix("---\n").partition("\n---")[0] if card.startswith("---\n") else ""
    fields = re.findall(rf"^({'|'.join(_LICENCE)}): *[\"']?([^\n\"']+?)[\"']? *$", head, re.MULTILINE)
    return dict(fields)
