"""Models of the transformers library from a folder: safetensors alone, every weight in its place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lens_core.io import readers
from lens_core.types import CheckpointError


def load_transformers_model(cls: Any, folder: Path) -> Any:
    """The model of the transformers class `cls` in `folder`, in evaluation mode and float32, on the CPU.

    Raises CheckpointError where files are missing or no safetensors, and where weights are missing or do not fit: these
    transformers would fill with random numbers.
    """
    import torch

    logging = sys.modules["transformers.utils.logging"]  # `cls` comes from there; the core imports no model library
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises whatever its readers do
        raise CheckpointError(f"{folder}: cannot be loaded ({readers.one_line(error)}); fetch it again") from error
    finally:
        logging.enable_progress_bar() if bars else None
    lacking = [*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{folder}: the weights of {min(lacking)}{more} are missing or of another shape; check it"
        )
    return loaded.eval().requires_grad_(False)
