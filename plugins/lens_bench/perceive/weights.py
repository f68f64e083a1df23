"""Models of the transformers library, from a folder or the Hub: safetensors alone, every weight in its place."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from lens_core.checkpoints import hub
from lens_core.checkpoints.manifest import digest
from lens_core.checkpoints.transformers_models import load_transformers_model
from lens_core.io import readers
from lens_core.io.atomic_files import read_json
from lens_core.types import CheckpointError, ConfigError


def folder_of(model: str) -> Path:
    """Where a model lies: a folder, or a Hub name org/name[@revision], fetched once. Raises CheckpointError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = model.partition("@")
    if not hub.is_name(name):
        raise CheckpointError(f"{model}: no such folder, and not a Hub name (org/name[@revision]); check the path")
    return _snapshot(name, revision or None)


@lru_cache(maxsize=16)  # one commit for a process, though the branch may move
def _snapshot(name: str, revision: str | None) -> Path:
    return hub.snapshot(name, revision, index="config.json")


def check_requirements(model: str) -> None:
    """Raise LensError where transformers or the model is missing. Nothing is loaded or downloaded: of a model of the
    Hub it is known offline alone whether it is there."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("needs transformers, which is not installed; pip install transformers")
    from huggingface_hub import constants

    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; name a folder with a model of transformers")
    if not hub.is_name(model.partition("@")[0]) or constants.is_offline_mode():
        folder_of(model)


def revision_of(model: str) -> str:
    """What identifies the weights: the Hub's commit, or for a folder the hash of its files."""
    folder = folder_of(model)
    return folder.name if not Path(model).expanduser().is_dir() else f"sha256:{digest(folder)}"


def name_of(model: str) -> str:
    """How the model is called in results: its Hub name, or its folder's name, not where that lies."""
    path = Path(model).expanduser()
    return (path.resolve().name or "model") if path.is_dir() else model.partition("@")[0]


def load(cls: Any, model: str, *kinds: str) -> Any:
    """A model of the transformers class `cls`, in evaluation mode and float32, on the CPU; `kinds` are the model types
    that its config may have.

    Raises CheckpointError where files are missing, where weights are missing or do not fit, which transformers would
    fill with random numbers, and where there are no safetensors.
    """
    folder = folder_of(model)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise CheckpointError(f"{folder}: its config says {readers.shown(kind)}, not {kinds[0]!r}; name another model")
    return load_transformers_model(cls, folder)


def tokenizer(cls: Any, model: str, vocabulary: int) -> Any:
    """The tokenizer that lies beside a model. Raises CheckpointError where there is none, where transformers would
    make an empty one, and where it has not as many words as the model's vocabulary."""
    folder = folder_of(model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder}: has no tokenizer.json; fetch the model again, this file included")
    try:
        made = cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({readers.one_line(error)})") from error
    if len(made) != vocabulary:
        raise CheckpointError(f"{folder}: its tokenizer has {len(made)} words, its model {vocabulary}; fetch it again")
    return made
