"""Answers of reasoners, one for each model, system prompt and request: in memory, and in files."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from lens_core.io.atomic_files import WriteError, write_text
from lens_core.io.readers import parse_json

MAX_BYTES = 1 << 20  # of an entry
MAX_IN_MEMORY = 1024  # answers: what a batch paid for before one of its requests was refused is not asked for again


class AnswerFiles:
    """Raw answers: the last ones in memory, and all in a folder, if there is one. A damaged entry is asked again."""

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self._last: dict[tuple[str, str, str], str] = {}
        self._warned = False

    def _path(self, key: tuple[str, str, str]) -> Path | None:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return None if self.folder is None else self.folder / name[:2] / f"{name}.json"

    def read(self, key: tuple[str, str, str]) -> str | None:
        """The answer to (model, system prompt, request), or None."""
        if key in self._last:
            return self._last[key]
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
        self._last[key] = answer
        if len(self._last) > MAX_IN_MEMORY:
            del self._last[next(iter(self._last))]
        path = self._path(key)
        if path is None:
            return
        text = json.dumps({"key": key, "answer": answer}, ensure_ascii=False)
        try:
            write_text(path, text)
        except (WriteError, UnicodeEncodeError) as error:
            if not self._warned:
                warnings.warn(f"answers of the reasoner are not kept: {error}", stacklevel=3)
            self._warned = True
