"""The backbone in one file, as Comfy keeps it: the published names, bare or prefixed, in plain floats or mxfp8."""

from __future__ import annotations

from collections.abc import Mapping

from lens_core.checkpoints.lazy_tensors import LazyTensor, fit, numbered, shape_of
from lens_core.checkpoints.quantization import plain
from lens_core.types import CheckpointError, ConfigError
from lens_mmdit.config import MMDiTConfig

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
MARKS = ("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.img_mlp.w1.weight")


def prefix(names: Mapping[str, object]) -> str | None:
    """What stands before the names of a Lens backbone in a file, or None if the file holds none."""
    return next((p for p in PREFIXES if all(p + mark in names for mark in MARKS)), None)


def convert_single_file(
    tensors: Mapping[str, LazyTensor], texts: Mapping[str, str], config: MMDiTConfig, where: str
) -> tuple[MMDiTConfig, dict[str, LazyTensor]]:
    """A single file's tensors -> the config that their shapes tell, and the same tensors under the published names.

    Which channels turn with which axis, and which layers of the encoder feed the model, no shape tells: see `fit`.
    Other models under other names in the same file are left out. Raises CheckpointError.
    """
    before = prefix(tensors)
    if before is None:
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise CheckpointError(f"{where}: holds {some} …, not a Lens backbone; its names begin with transformer_blocks.")
    ours = {name.removeprefix(before): tensor for name, tensor in tensors.items() if name.startswith(before)}
    found = plain(ours, texts, where, prefix=before)
    width, channels = shape_of(found, "img_in.weight", 2, where)
    (head,) = shape_of(found, "transformer_blocks.0.attn.norm_q.weight", 1, where)
    (words,) = shape_of(found, "txt_norm.0.weight", 1, where)
    seen = {
        "attention_head_dim": head,
        "in_channels": channels,
        "num_attention_heads": width // head,
        "num_layers": numbered(found, "transformer_blocks."),
        "enc_hidden_dim": words,
        "inner_dim": width,
    }
    layers = numbered(found, "txt_norm.")
    published = type(config)()
    for known in (config, published):
        if len(known.selected_layer_index) == layers:
            seen["selected_layer_index"] = known.selected_layer_index
            break
    else:
        raise CheckpointError(
            f"{where}: reads {layers} layers of a text encoder, and the model it is for "
            f"{len(config.selected_layer_index)}; give --model a folder that it fits"
        )
    try:
        return fit(config, published, seen, ("attention_head_dim", "in_channels"), where), found
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.problems[0]}") from error
