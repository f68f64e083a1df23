"""Weights of filters: from a folder, or from the Hub at a pinned revision; safetensors alone, each in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.checkpoints import hub
from lens_core.checkpoints.manifest import digest
from lens_core.checkpoints.transformers_models import load_transformers_model
from lens_core.io import readers
from lens_core.io.atomic_files import read_json
from lens_core.types import CheckpointError, ConfigError
from lens_core.validators import integer, matching, text


@frozen
class ModelOptions:
    """Options of every filter with a model of the transformers library."""

    model: str = field(validator=text())  # a folder, or a Hub name, org/name
    # Of a Hub name, the commit: 40 hexadecimal digits. A branch or a tag may change, and scores with it.
    revision: str = field(default="", validator=matching(r"|[0-9a-f]{40}", "a commit, 40 hexadecimal digits"))
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one
    batch: int = field(default=16, validator=integer(at_least=1, at_most=4096))  # pictures at a time

    def __attrs_post_init__(self) -> None:
        if not Path(self.model).expanduser().is_dir() and not self.revision:
            raise ConfigError(f"{self.model}: no such folder; of a Hub name, `revision` must be its commit")


def model_folder(options: ModelOptions) -> Path:
    """Where a model lies; it is fetched if need be. Raises CheckpointError."""
    folder = Path(options.model).expanduser()
    if not folder.is_dir():
        if not hub.is_name(options.model):
            raise CheckpointError(f"{options.model}: no such folder, and not a Hub name (org/name); check the path")
        folder = hub.snapshot(options.model, options.revision, index="config.json")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json; name the folder of a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no .safetensors file, and nothing else is read; choose another revision")
    return folder


def weights_id(options: ModelOptions) -> str:
    """What identifies the weights: the commit that the recipe pins, or of a folder the hash of its files."""
    folder = Path(options.model).expanduser()
    return digest(folder) if folder.is_dir() else options.revision


def model_config(options: ModelOptions) -> dict[str, Any]:
    return read_json(model_folder(options) / "config.json")


def load_model(cls: Any, options: ModelOptions) -> Any:
    """A model of the transformers class `cls` on its device, in evaluation mode and float32. Raises CheckpointError
    where weights are missing, which transformers would fill with random numbers."""
    model = load_transformers_model(cls, model_folder(options))
    return model.to(device_of(options.device))


def load_processor(options: ModelOptions) -> Any:
    """What makes a model's input of pictures, by Pillow. Raises CheckpointError where there is none."""
    from transformers import AutoImageProcessor

    folder = model_folder(options)
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:  # transformers raises whatever its readers do
        raise CheckpointError(f"{folder}: its image processor cannot be read ({readers.one_line(error)})") from error


def device_of(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
