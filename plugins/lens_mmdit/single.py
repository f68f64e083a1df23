"""The backbone in one file, as Comfy keeps it: the published names, bare or prefixed, in plain floats or mxfp8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.quantization import plain
from lens_core.checkpoints.single_files import another_model, fit, numbered, shape_of
from lens_core.types import CheckpointError
from lens_mmdit.config import MMDiTConfig

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
MARKS = ("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.img_mlp.w1.weight")


def find_prefix(names: Mapping[str, object]) -> str | None:
    """The find_prefix of the names of a Lens backbone in a file, or None if the file holds no Lens backbone."""
    return next((p for p in PREFIXES if all(p + mark in names for mark in MARKS)), None)


def convert_single_file(
    tensors: Mapping[str, LazyTensor], texts: Mapping[str, str], config: MMDiTConfig, where: str
) -> tuple[MMDiTConfig, dict[str, LazyTensor]]:
    """Infer the config from the shapes of a single file's tensors -> it, and the tensors under the published names.

    The axes of the rotary embedding and the layers of the encoder show in no shape: `fit` takes them from `config` or
    the published model. Tensors of other models in the same file are left out. Raises CheckpointError.
    """
    name_prefix = find_prefix(tensors)
    if name_prefix is None:
        raise another_model(tensors, where, "Lens backbone; its names begin with transformer_blocks.")
    named = {name.removeprefix(name_prefix): tensor for name, tensor in tensors.items() if name.startswith(name_prefix)}
    weights = plain(named, texts, where, prefix=name_prefix)
    width, channels = shape_of(weights, "img_in.weight", 2, where)
    (head,) = shape_of(weights, "transformer_blocks.0.attn.norm_q.weight", 1, where)
    (feature_width,) = shape_of(weights, "txt_norm.0.weight", 1, where)
    inferred: dict[str, Any] = {
        "attention_head_dim": head,
        "in_channels": channels,
        "num_attention_heads": width // head,
        "num_layers": numbered(weights, "transformer_blocks."),
        "enc_hidden_dim": feature_width,
        "inner_dim": width,
    }
    layers = numbered(weights, "txt_norm.")
    published = type(config)()
    for known in (config, published):
        if len(known.selected_layer_index) == layers:
            inferred["selected_layer_index"] = known.selected_layer_index
            break
    else:
        raise CheckpointError(
            f"{where}: reads {layers} layers of a text encoder, and the model it is for "
            f"{len(config.selected_layer_index)}; give --model a folder that it fits"
        )
    return fit(config, published, inferred, ("attention_head_dim", "in_channels"), where), weights
