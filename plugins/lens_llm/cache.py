"""Answers of language models in files, one for each question."""

from __future__ import annotations

import json
import os
import threading
import warnings
from pathlib import Path

from lens_llm.json_answers import parse

MAX_BYTES = 4 << 20  # of an entry


class AnswerCache:
    """Answers by the hash of their question, in a folder; without a folder nothing is kept. Safe to call from several
    threads and processes."""

    def __init__(self, folder: str | None, model: str) -> None:
        self.folder, self.model = folder, model
        self._warned = False  # that the cache cannot be written
        self._lock = threading.Lock()

    def path(self, key: str) -> Path | None:
        return Path(self.folder).expanduser() / key[:2] / f"{key}.json" if self.folder else None

    def read(self, key: str) -> str | None:
        """The answer under this key, or None where there is none, or a damaged one."""
        path = self.path(key)
        try:
            if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            text = parse(path.read_text(encoding="utf-8"))["text"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or damaged: ask again
        return text if isinstance(text, str) else None

    def write(self, key: str, text: str) -> None:
        """Put an answer into the cache. Where that fails, the answer has been paid for all the same: one warning."""
        path = self.path(key)
        if path is None:
            return
        part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps({"model": self.model, "text": text}), encoding="utf-8")
                os.replace(part, path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            with self._lock:
                first, self._warned = not self._warned, True
            if first:
                warnings.warn(
                    f"the cache {self.folder} cannot be written ({error.strerror or type(error).__name__}); "
                    "answers are used but not kept, and the same question will be paid for again",
                    stacklevel=3,
                )
