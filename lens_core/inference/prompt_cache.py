"""Keep the features of prompts: the last ones in memory, and all of them on disk where a folder is given.

A file holds one prompt's features and mask, and in its header what they were made of. Its name is a hash of the encoder
(weights, config with its pinned date, version), the precision and the prompt: whatever changes features changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from torch import nn

from lens_core.checkpoints.tensor_files import read_header, read_tensors, save_tensors
from lens_core.io.readers import parse_json
from lens_core.types import CheckpointError, ConfigError, TextFeatures

MAX_IN_MEMORY = 64  # prompts: of the published encoder at most 10 MB each
FORMAT = 1  # of the files


@frozen
class CacheEntry:
    """One prompt's features (B = 1) on the host, and what a picture must record of the encoder."""

    text: TextFeatures
    provenance: Mapping[str, Any]


@frozen
class EncoderKey:
    """Identifies the encoder, device kind and precision that features come from.

    `persistent`: the key means the same in another process, so that files may be read and written under it.
    """

    origin: str
    persistent: bool


class PromptCache:
    """Prompt -> CacheEntry, for each encoder."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file; --prompt-cache takes a folder")
        self.folder = folder
        self.entries: dict[str, CacheEntry] = {}

    def find(self, prompts: Sequence[str], keys: Iterable[EncoderKey]) -> dict[str, CacheEntry]:
        """The prompts that need not be encoded. A later key wins."""
        hits = {}
        for key in keys:
            for prompt in dict.fromkeys(prompts):
                if (entry := self.get(prompt, key)) is not None:
                    hits[prompt] = entry
        return hits

    def get(self, prompt: str, key: EncoderKey) -> CacheEntry | None:
        """The entry in memory or, for a persistent key, on disk."""
        name, path = self._locate(prompt, key)
        entry = self.entries.pop(name, None)
        if entry is None and path is not None and path.is_file():
            entry = _read(path, prompt)
        if entry is not None:
            self._remember(name, entry)
        return entry

    def put(self, prompt: str, key: EncoderKey, entry: CacheEntry) -> None:
        """Keep an entry in memory and, for a persistent key, on disk."""
        name, path = self._locate(prompt, key)
        self._remember(name, entry)
        if path is not None:
            about = json.dumps({"prompt": prompt, "origin": key.origin, "provenance": dict(entry.provenance)})
            save_tensors(path, {"features": entry.text.features, "mask": entry.text.mask}, {"lens_text": about})

    def _locate(self, prompt: str, key: EncoderKey) -> tuple[str, Path | None]:
        name = hashlib.sha256(json.dumps([FORMAT, key.origin, prompt]).encode()).hexdigest()[:32]
        return name, self.folder / f"{name}.safetensors" if self.folder is not None and key.persistent else None

    def _remember(self, name: str, entry: CacheEntry) -> None:
        self.entries[name] = entry
        while len(self.entries) > MAX_IN_MEMORY:
            del self.entries[next(iter(self.entries))]  # the one that was used least recently: `get` moves to the end


def _read(path: Path, prompt: str) -> CacheEntry | None:
    """The entry in a file, or None where it is damaged or another's: then it is made again, and written over."""
    try:
        tensors, about = read_tensors(path), parse_json(read_header(path)["lens_text"], finite=False)
        # In a file, tensors lie at any byte, where kernels may round otherwise.
        text = TextFeatures(tensors["features"].clone(), tensors["mask"].clone())
        whole = text.features.ndim == 4 and text.mask.shape == (1, text.features.shape[2])
        return CacheEntry(text, about["provenance"]) if whole and about["prompt"] == prompt else None
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def weights_state(module: Any) -> Any:
    """A value that changes when a weight or a config changes, and not when weights only move.

    Configs count, of the encoder and of its parts: they say which layers are read and how they attend.
    """
    if not isinstance(module, nn.Module):
        return None
    configs = {id(c): repr(c) for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    # Version counters rise with every change in place; moving a module swaps `.data`, which leaves them alone.
    weights = [(id(p), str(p.dtype), 0 if p.is_inference() else p._version) for p in module.parameters()]
    return weights, list(configs.values())
