"""The part of a language model that encoding does not need: the layers after the last selected one, and the head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.tensor_files import load_module
from lens_gpt_oss.experts import pack


class _Rest(nn.Module):
    """The missing modules under the names that they have in the whole model."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        config, sizes = encoder.model.config, encoder.config
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict(
            {str(i): GptOssDecoderLayer(config, i) for i in range(len(encoder.model.layers), sizes.num_hidden_layers)}
        )
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)


def read_rest(encoder: Any, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None) -> None:
    """Complete `encoder` with the modules that `tensors` hold, in the precision of its other weights. Experts in 4 bits
    stay so. Raises CheckpointError."""
    with torch.device("meta"):
        rest = _Rest(encoder)
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        module, _, weight = name.rpartition(".")
        pack(rest.get_submodule(module), weight, "nvfp4" if f"{name}_scale" in tensors else "mxfp4")
    load_module(rest, file.parent, file.stem, dtype=dtype, tensors=dict(tensors))
    rest.eval()
    for parameter in rest.parameters():
        parameter.requires_grad_(any(p.requires_grad for p in encoder.parameters()))
    device = encoder.model.embed_tokens.weight.device
    for layer in rest.model.layers.values():  # type: ignore[operator]  # a ModuleDict
        encoder.model.layers.append(layer.to(device))
    encoder.lm_head = rest.lm_head.to(device)
