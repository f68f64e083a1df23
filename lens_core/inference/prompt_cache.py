"""Features of prompts, kept: the last ones in memory, and all of them on disk where a folder is given.

A file holds one prompt's features and mask, and in its header what they were made of. Its name is a hash of the encoder
(weights, config with its pinned date, version), the precision and the prompt: whatever changes features changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.checkpoints.tensor_files import read_header, read_tensors, save_tensors
from lens_core.io.readers import parse_json
from lens_core.types import CheckpointError, ConfigError, TextFeatures

MOST = 64  # prompts in memory: of the published encoder at most 10 MB each
FORMAT = 1  # of the files


@frozen
class Entry:
    """One prompt's features (B = 1) on the host, and what the encoder said a picture must record of it."""

    text: TextFeatures
    provenance: Mapping[str, Any]


class TextCache:
    """Prompt -> Entry, for encoders told apart by a text, their `origin`."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file; --prompt-cache takes a folder")
        self.folder = folder
        self.kept: dict[str, Entry] = {}

    def _path(self, prompt: str, origin: str, lasting: bool) -> tuple[str, Path | None]:
        key = hashlib.sha256(json.dumps([FORMAT, origin, prompt]).encode()).hexdigest()[:32]
        return key, self.folder / f"{key}.safetensors" if self.folder is not None and lasting else None

    def get(self, prompt: str, origin: str, lasting: bool) -> Entry | None:
        """What is kept; `lasting`: the origin means the same in another process, so the disk is asked too."""
        key, path = self._path(prompt, origin, lasting)
        entry = self.kept.pop(key, None)
        if entry is None and path is not None and path.is_file():
            entry = _read(path, prompt)
        if entry is not None:
            self._keep(key, entry)
        return entry

    def put(self, prompt: str, origin: str, lasting: bool, entry: Entry) -> None:
        key, path = self._path(prompt, origin, lasting)
        self._keep(key, entry)
        if path is not None:
            about = json.dumps({"prompt": prompt, "origin": origin, "provenance": dict(entry.provenance)})
            save_tensors(path, {"features": entry.text.features, "mask": entry.text.mask}, {"lens_text": about})

    def _keep(self, key: str, entry: Entry) -> None:
        self.kept[key] = entry
        while len(self.kept) > MOST:
            del self.kept[next(iter(self.kept))]


def _read(path: Path, prompt: str) -> Entry | None:
    """The entry in a file, or None where it is damaged or another's: then it is made again, and written over."""
    try:
        tensors, about = read_tensors(path), parse_json(read_header(path)["lens_text"], finite=False)
        # In a file, tensors lie at any byte, where kernels may round otherwise.
        text = TextFeatures(tensors["features"].clone(), tensors["mask"].clone())
        whole = text.features.ndim == 4 and text.mask.shape == (1, text.features.shape[2])
        return Entry(text, about["provenance"]) if whole and about["prompt"] == prompt else None
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
