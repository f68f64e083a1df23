"""The language model of Lens as a text encoder, and its training on captions.

`gpt_oss` (encoder.py) reads the residual stream of a GPT-OSS; template.py renders prompts and makes small tokenizers;
chat.py, generation.py and rest.py make it write, for reasoners;
`language_model` (training.py) trains one from scratch by predicting captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_text_encoders() -> dict[str, type[Any]]:
    from lens_gpt_oss.encoder import GptOssEncoder

    return {"gpt_oss": GptOssEncoder}


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_gpt_oss.training import LanguageModel

    return {"language_model": LanguageModel}


@hookimpl
def lens_describe(folder: Path) -> dict[str, Any] | None:
    from lens_gpt_oss.single import describe

    return describe(folder)
