"""The VAE in one file: under diffusers' names, or under those that Black Forest Labs published it with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.quantization import plain
from lens_core.checkpoints.single_files import another_model, fit, numbered, shape_of
from lens_flux2.config import Flux2VAEConfig

MARKS = ("bn.running_mean", "encoder.conv_in.weight", "decoder.conv_in.weight")
RENAMES = (
    (r"^(?:encoder|decoder)\.((?:post_)?quant_conv\.)", r"\1"),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
"""The original names -> diffusers'. `_diffusers_names` renames the decoder's levels."""


def holds(names: Mapping[str, object]) -> bool:
    """Whether a file holds a FLUX.2 VAE: other VAEs have no BatchNorm."""
    return all(mark in names for mark in MARKS)


def _diffusers_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under diffusers' names; attention's projections, 1 x 1 convolutions originally, as matrices."""
    levels = numbered(tensors, "decoder.up.")
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, to in RENAMES:
            name = re.sub(pattern, to, name)
        # The original numbers the decoder's levels by size, the largest picture first; diffusers as they run.
        up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name)
        if up:
            inner = {"block": "resnets", "upsample": "upsamplers.0"}[up[2]]
            name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{inner}.{name[up.end() :]}"
        if ".mid_block.attentions." in name and tensor.shape[2:] == (1, 1):
            renamed[name] = _matrix(tensor)
        else:
            renamed[name] = tensor
    return renamed


def _matrix(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[:2], tensor.dtype, lambda dtype: (part[:, :, 0, 0] for part in tensor.rows(dtype)))


def convert_single_file(
    tensors: Mapping[str, LazyTensor], texts: Mapping[str, str], config: Flux2VAEConfig, where: str
) -> tuple[Flux2VAEConfig, dict[str, LazyTensor]]:
    """Infer the config from the shapes of a single file's tensors -> it, and the tensors under diffusers' names.

    The number of groups of the norms shows in no shape: `fit` takes it from `config` or the published model. Raises
    CheckpointError.
    """
    if not holds(tensors):
        raise another_model(tensors, where, "FLUX.2 VAE, which has a bn.running_mean")
    weights = _diffusers_names(plain(tensors, texts, where))
    levels = range(numbered(weights, "encoder.down_blocks."))

    def widths(side: str) -> tuple[int, ...]:
        return tuple(shape_of(weights, f"{side}.{i}.resnets.0.conv1.weight", 4, where)[0] for i in levels)

    encoder, decoder = widths("encoder.down_blocks"), widths("decoder.up_blocks")[::-1]
    inferred = {
        "block_out_channels": encoder,
        "decoder_block_out_channels": None if decoder == encoder else decoder,
        "layers_per_block": numbered(weights, "encoder.down_blocks.0.resnets."),
        "latent_channels": shape_of(weights, "decoder.conv_in.weight", 4, where)[1],
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
    deciding = ("block_out_channels", "layers_per_block", "latent_channels")
    return fit(config, type(config)(), inferred, deciding, where), weights
