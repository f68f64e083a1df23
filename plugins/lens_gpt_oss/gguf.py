"""GPT-OSS as llama.cpp keeps it: its names for tensors, experts in one tensor a projection, and a tokenizer as keys.

E experts, I their width. llama.cpp has gate and up apart, [E,I,in] each; transformers has them as one, row by row in
turns: gate 0, up 0, gate 1, … In MXFP4 both have the same values and scales; only the order of 4-bit halves differs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lens_core.checkpoints.gguf_files import GgufTensor, read_gguf
from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.io.readers import shown
from lens_core.types import CheckpointError
from lens_gpt_oss.config import YARN
from lens_gpt_oss.template import CHAT_TEMPLATE, HARMONY, read_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

ARCHITECTURE = "gpt-oss"
MARKS = ("blk.0.attn_sinks.weight", "blk.0.ffn_gate_exps.weight")
TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "mlp.router",
}  # fmt: skip
"""llama.cpp's names -> transformers'."""
STATED = {"expert_used_count": "num_experts_per_tok", "attention.sliding_window": "sliding_window"}
"""Keys of what no shape tells -> fields of the config."""
FIXED = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": YARN["rope_theta"],
    "rope.scaling.factor": YARN["factor"],
    "rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
    "rope.scaling.type": YARN["rope_type"],
}
TOKENS, KINDS, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's kinds of tokens that are not made of merges
SPLIT = "gpt-4o"  # llama.cpp's name of the regular expression below
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-OSS's tokenizer, o200k_harmony, splits a text into words."""


def read_llama_cpp(
    path: Path,
) -> tuple[dict[str, LazyTensor], dict[str, Any], PreTrainedTokenizerFast | None]:
    """A GGUF file -> its tensors under transformers' names without the `model.`, the fields of the config that its keys
    state, and its tokenizer, None where it has none. Raises CheckpointError."""
    tensors, keys = read_gguf(path, (TOKENS, KINDS, MERGES))
    where = str(path)
    architecture = keys.get("general.architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{where}: is a {shown(architecture)}, not a {ARCHITECTURE}; name another text encoder")
    for name, value in FIXED.items():
        stated_value = keys.get(f"{ARCHITECTURE}.{name}", value)
        same = stated_value == value if isinstance(value, str) else _close(stated_value, float(value))
        if not same:
            raise CheckpointError(
                f"{where}: its {name} is {shown(stated_value)}, and GPT-OSS's {value}; use another encoder"
            )
    stated = {field: keys[key] for name, field in STATED.items() if (key := f"{ARCHITECTURE}.{name}") in keys}
    return _renamed(tensors, where), stated, _tokenizer(keys, where)


def _close(stated_value: Any, value: float) -> bool:
    """Whether a number of a header, which has float32 alone, is `value`."""
    return isinstance(stated_value, int | float) and math.isclose(stated_value, value, rel_tol=1e-6)


def _renamed(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    result: dict[str, LazyTensor] = {}
    experts: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in TOP:
            result[TOP[name]] = tensor
        elif match is None:
            raise CheckpointError(f"{where}: holds {shown(name)}, which GPT-OSS does not have in llama.cpp's names")
        elif match[2] in IN_LAYER:
            result[f"layers.{match[1]}.{IN_LAYER[match[2]]}.{match[3]}"] = tensor
        elif name.endswith(".attn_sinks.weight"):
            result[f"layers.{match[1]}.self_attn.sinks"] = tensor
        elif match[2] in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            part = experts.setdefault(f"layers.{match[1]}.mlp.experts.", {})
            part[f"{match[2].split('_')[1]}.{match[3]}"] = tensor
        else:
            raise CheckpointError(f"{where}: holds {shown(name)}, which GPT-OSS does not have in llama.cpp's names")
    for place, parts in experts.items():
        result |= _experts(f"{where}: {place}", place, parts)
    return result


def _experts(what: str, place: str, parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The experts of one layer, in the forms that transformers has."""
    for side in ("weight", "bias"):
        for part in ("gate", "up", "down"):
            if f"{part}.{side}" not in parts:
                raise CheckpointError(f"{what}ffn_{part}_exps.{side} is missing; fetch the file again")
    for side, ndim in (("weight", 3), ("bias", 2)):
        shape, other = (parts[f"{part}.{side}"].shape for part in ("gate", "up"))
        if shape != other or len(shape) != ndim or len(parts[f"down.{side}"].shape) != ndim:
            raise CheckpointError(
                f"{what}its experts are {list(shape)} and {list(other)}, which do not fit; fetch it again"
            )
    gate, up, down = (parts[f"{part}.weight"] for part in ("gate", "up", "down"))
    result = {
        f"{place}gate_up_proj_bias": _in_turns(parts["gate.bias"], parts["up.bias"]),
        f"{place}down_proj_bias": parts["down.bias"],
    }
    if _is_mxfp4(gate) and _is_mxfp4(up):
        result |= _blocks(f"{place}gate_up_proj", _in_turns(gate.packed, up.packed))  # type: ignore[attr-defined]
    else:
        result[f"{place}gate_up_proj"] = _transposed(_in_turns(gate, up))
    if _is_mxfp4(down):
        result |= _blocks(f"{place}down_proj", down.packed)  # type: ignore[attr-defined]
    else:
        result[f"{place}down_proj"] = _transposed(down)
    return result


def _is_mxfp4(tensor: LazyTensor) -> bool:
    return isinstance(tensor, GgufTensor) and tensor.form == "MXFP4"


def _each(tensor: LazyTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for block in tensor.rows(dtype):
        yield from block


def _mapped(tensor: LazyTensor, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> LazyTensor:
    """`tensor` with each expert changed, one at a time."""
    return LazyTensor(shape, tensor.dtype, lambda dtype: (change(part)[None] for part in _each(tensor, dtype)))


def _in_turns(one: LazyTensor, two: LazyTensor) -> LazyTensor:
    """[E,I,…] and [E,I,…] -> [E,2 I,…], row by row in turns."""
    import torch

    experts, rows, *rest = one.shape

    def pairs(dtype: torch.dtype) -> Iterator[Tensor]:
        for first, second in zip(_each(one, dtype), _each(two, dtype), strict=True):
            yield torch.stack([first, second], dim=1).flatten(0, 1)[None]

    return LazyTensor((experts, 2 * rows, *rest), one.dtype, pairs)


def _transposed(tensor: LazyTensor) -> LazyTensor:
    experts, out, inner = tensor.shape
    return _mapped(tensor, (experts, inner, out), lambda matrix: matrix.mT)


def _blocks(name: str, packed: LazyTensor) -> dict[str, LazyTensor]:
    """ggml's MXFP4, [E,out,17 G], a scale and 16 bytes a block -> transformers' `_blocks` and `_scales`."""
    experts, out, size = packed.shape

    def halves(expert: Tensor) -> Tensor:
        import torch

        codes = expert.reshape(out, -1, 17)[..., 1:]
        # ggml has values 0 … 15 in the low halves and 16 … 31 in the high ones; transformers has neighbours in a byte.
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        return codes[..., 0::2] | (codes[..., 1::2] << 4)

    return {
        f"{name}_blocks": _mapped(packed, (experts, out, size // 17, 16), halves),
        f"{name}_scales": _mapped(packed, (experts, out, size // 17), lambda e: e.reshape(out, -1, 17)[..., 0]),
    }


def _tokenizer(keys: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer that the keys describe; None where there is none, or one that splits texts in another way."""
    if TOKENS not in keys or keys.get("tokenizer.ggml.pre") != SPLIT:
        return None
    kinds, merges = keys.get(KINDS), keys.get(MERGES, [])
    tokens: list[str] = keys[TOKENS] if isinstance(keys[TOKENS], list) else []
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges] if isinstance(merges, list) else [[]]
    numbers = kinds.tolist() if isinstance(kinds, np.ndarray) else []
    if not 0 < len(tokens) == len(vocabulary) == len(numbers) or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(
            f"{where}: its tokenizer has {len(tokens)} tokens, {len(vocabulary)} of them different, {len(numbers)} "
            f"kinds and {len(pairs)} merges, which do not fit; fetch it again"
        )
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, "special": kind == CONTROL, **about}
        for number, (token, kind) in enumerate(zip(tokens, numbers, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Isolated", "invert": False}
    described = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }
    # What a file brings was made for chats, and conversions change it; features need the published conversation.
    template = keys.get("tokenizer.chat_template")
    known = CHAT_TEMPLATE if template == CHAT_TEMPLATE else HARMONY
    return read_tokenizer(json.dumps(described, ensure_ascii=False).encode(), known, where)
