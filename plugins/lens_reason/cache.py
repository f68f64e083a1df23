"""Answers of reasoners in files, one for each model, system prompt and request."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from lens_core.io.atomic_files import WriteError, write_atomic
from lens_core.io.readers import parse_json

MAX_BYTES = 1 << 20  # of an entry


class AnswerFiles:
    """Raw answers in a folder; without one nothing is kept. A damaged entry is asked for again."""

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self._warned = False

    def _path(self, key: tuple[str, str, str]) -> Path | None:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return None if self.folder is None else self.folder / name[:2] / f"{name}.json"

    def read(self, key: tuple[str, str, str]) -> str | None:
        """The answer to (model, system prompt, request), or None."""
        path = self._path(key)
        try:
            if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            entry = parse_json(path.read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(entry, dict) and entry.get("key") == list(key) and isinstance(entry.get("answer"), str)
        return entry["answer"] if whole else None

    def write(self, key: tuple[str, str, str], answer: str) -> None:
        """Keep an answer; it has been paid for where that fails, which is warned of once."""
        path = self._path(key)
        if path is None:
            return
        text = json.dumps({"key": key, "answer": answer}, ensure_ascii=False)
        try:
            write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))
        except (WriteError, UnicodeEncodeError) as error:
            if not self._warned:
                warnings.warn(f"answers of the reasoner are not kept: {error}", stacklevel=3)
            self._warned = True
