"""CSD's weights (Somepalli et al., 2024, arXiv:2404.01292) as transformers' CLIPVisionModelWithProjection.

CSD is OpenAI's CLIP ViT with two projections in place of one, for style and for content. The style embedding is that of
CLIP's vision tower with `last_layer_style` as its projection. The published checkpoint is a pickle, which Lens does not
read: its tensors must be in a safetensors file first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lens_core.checkpoints.tensor_files import read_tensors
from lens_core.io import atomic_files
from lens_core.types import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 64  # width of an attention head in every ViT of CLIP
_NAMES = (
    (r"class_embedding", "embeddings.class_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"conv1\.weight", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.(weight|bias)", r"pre_layrnorm.\1"),  # as transformers spells it
    (r"ln_post\.(weight|bias)", r"post_layernorm.\1"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"encoder.layers.\1.mlp.fc2.\2"),
)
_JOINED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CSD's tensors under transformers' names. Raises CheckpointError for a name that CSD has not."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("module.").removeprefix("backbone.")
        if short == "last_layer_style":
            made["visual_projection.weight"] = tensor.T.contiguous()
        elif match := _JOINED.fullmatch(short):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                layer = f"vision_model.encoder.layers.{match[1]}.self_attn"
                made[f"{layer}.{letter}_proj.{match[2]}"] = part.contiguous()
        elif short != "last_layer_content":
            new = next((re.sub(old, new, short) for old, new in _NAMES if re.fullmatch(old, short)), None)
            if new is None:
                raise CheckpointError(f"{name[:80]}: is no tensor of CSD; convert its model_state_dict")
            made[f"vision_model.{new}"] = tensor
    return made


def convert(source: Path, output: Path) -> None:
    """Write CSD's vision tower, a safetensors file of its `model_state_dict`, as a folder that `clip_style` reads.

    Raises CheckpointError where tensors are missing or do not fit each other.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tensors = {name: tensor.float() for name, tensor in renamed(read_tensors(source)).items()}
    try:
        patches = tensors["vision_model.embeddings.patch_embedding.weight"]
        places = tensors["vision_model.embeddings.position_embedding.weight"]
        inner = tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=inner.shape[0], patch_size=patch, num_attention_heads=width // HEAD,
            num_hidden_layers=sum(name.endswith(".mlp.fc1.bias") for name in tensors),
            image_size=round((places.shape[0] - 1) ** 0.5) * patch, hidden_act="quick_gelu",
            projection_dim=tensors["visual_projection.weight"].shape[0],
        )  # fmt: skip
        model = CLIPVisionModelWithProjection(config)
        absent = sorted(model.state_dict().keys() - tensors.keys() - {"vision_model.embeddings.position_ids"})
        if absent:
            raise KeyError(absent[0])
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: is not the whole of CSD ({reason}); convert its model_state_dict") from error
    with atomic_files.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output)
