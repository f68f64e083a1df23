"""The encoder in one file: transformers' names with experts in MXFP4, or Comfy's with experts in nvfp4 and a tokenizer.

E experts; a projection of the experts is stored as [E,out,in] by both, and held as [E,in,out] by transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.manifest import FORMAT
from lens_core.checkpoints.quantization import from_mxfp4, lazy_mxfp4, plain
from lens_core.checkpoints.single_files import another_model, describe_file, fit, numbered, shape_of
from lens_core.io.atomic_files import read_json
from lens_core.types import CheckpointError
from lens_gpt_oss import gguf
from lens_gpt_oss.config import GptOssEncoderConfig

if TYPE_CHECKING:
    import torch

PREFIXES = ("model.", "")
MARK = "layers.0.mlp.router.weight"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
PACKED = ("blocks", "scales", "scale")


def holds(names: Mapping[str, object]) -> bool:
    """Whether a file holds a GPT-OSS, under the names of transformers, of Comfy, or of llama.cpp."""
    return any(p + MARK in names for p in PREFIXES) or all(mark in names for mark in gguf.MARKS)


def describe(path: Path) -> dict[str, Any] | None:
    """An answer to the hook `lens_describe`: for a single file, or a folder as transformers saves it."""
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        if read_json(path / "config.json").get("model_type") != "gpt_oss":
            return None
        return {"format": FORMAT, "components": {"text_encoder": {"use": "lens_gpt_oss:gpt_oss", "file": "."}}}
    return describe_file(path, holds, "text_encoder", "lens_gpt_oss:gpt_oss")


def convert_single_file(
    tensors: Mapping[str, LazyTensor],
    texts: Mapping[str, str],
    config: GptOssEncoderConfig,
    where: str,
    *,
    packed: bool,
    stated: Mapping[str, Any] | None = None,
) -> tuple[GptOssEncoderConfig, dict[str, LazyTensor]]:
    """Infer the config from the shapes of a single file's tensors -> it, and the tensors under transformers' names.
    `stated`: fields that the file itself gives, as GGUF does.

    Experts in MXFP4 stay `…_blocks` and `…_scales`. Those in nvfp4 do so with `packed`, with a `…_scale` too, and
    become plain weights without. The experts a token and the sliding
    window show in no shape: `fit` takes them from `config` or the published model.
    """
    if not holds(tensors):
        raise another_model(tensors, where, "GPT-OSS; its names begin with model.layers. or layers.")
    rest = {name: tensor for name, tensor in tensors.items() if name != "tokenizer_json"}
    weights = {}
    for name, tensor in plain(rest, texts, where, keep=EXPERTS if packed else ()).items():
        bare = name.removeprefix("model.")
        bare = re.sub(r"(experts\.\w+_proj)\.(blocks|scales|scale|bias)$", r"\1_\2", bare)
        if bare.endswith(tuple(f"{e}.weight" for e in EXPERTS)):
            bare, tensor = bare.removesuffix(".weight"), _transposed(tensor)
        weights[bare if bare.startswith("lm_head.") else f"model.{bare}"] = tensor
    vocabulary, width = shape_of(weights, "model.embed_tokens.weight", 2, where)
    (heads,) = shape_of(weights, "model.layers.0.self_attn.sinks", 1, where)
    (experts, inner) = shape_of(weights, "model.layers.0.mlp.experts.gate_up_proj_bias", 2, where)
    head = shape_of(weights, "model.layers.0.self_attn.q_proj.weight", 2, where)[0] // heads
    inferred = {
        "hidden_size": width,
        "intermediate_size": inner // 2,
        "num_attention_heads": heads,
        "head_dim": head,
        "num_local_experts": experts,
        "num_key_value_heads": shape_of(weights, "model.layers.0.self_attn.k_proj.weight", 2, where)[0] // max(1, head),
        "num_hidden_layers": numbered(weights, "model.layers."),
        "vocab_size": vocabulary,
    }
    published = evolve(type(config)(), date=config.date, max_length=config.max_length, experts=config.experts)
    return fit(config, published, inferred | dict(stated or {}), list(inferred)[:5], where), weights


def _transposed(tensor: LazyTensor) -> LazyTensor:
    """[E,out,in] -> [E,in,out]."""
    experts, *matrix = tensor.shape
    return LazyTensor((experts, *matrix[::-1]), tensor.dtype, lambda dtype: (part.mT for part in tensor.rows(dtype)))


def check_mxfp4(tensors: Mapping[str, LazyTensor], where: str, *, packed: bool) -> dict[str, LazyTensor]:
    """Experts in MXFP4, checked, and as plain weights unless `packed`."""
    weights = dict(tensors)
    for name in [k.removesuffix("_blocks") for k in tensors if k.endswith("_blocks")]:
        if f"{name}_scales" not in weights:
            raise CheckpointError(f"{where}: {name}_blocks has no {name}_scales beside it; fetch it again")
        if f"{name}_scale" in weights:
            continue  # nvfp4, which `plain` has checked
        blocks, scales = lazy_mxfp4(name, weights.pop(f"{name}_blocks"), weights.pop(f"{name}_scales"), where)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales} if packed else {name: _plain(blocks, scales)}
    return weights


def _plain(blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    import torch

    experts, out, groups, _ = blocks.shape

    def rows(dtype: torch.dtype):  # type: ignore[no-untyped-def]  # an iterator of tensors
        whole = scales.read()
        at = 0
        for part in blocks.rows(torch.uint8):
            yield from_mxfp4(part, whole[at : at + len(part)], dtype)
            at += len(part)

    return LazyTensor((experts, groups * 32, out), torch.bfloat16, rows)
