"""GPT-OSS as llama.cpp writes it: the same model as transformers', whatever the experts are quantised to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from attrs import evolve
from lens_gpt_oss import lens_describe
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.experts import packed
from lens_gpt_oss.gguf import O200K
from lens_gpt_oss.template import CHAT_TEMPLATE, CONTROLS, wrap_tokenizer
from small_gpt_oss import CAPTIONS, PROMPTS, build
from small_gpt_oss import TINY as SMALL
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lens_core.types import CheckpointError

Config = GptOssEncoder.Config
TINY = evolve(SMALL, intermediate_size=64, max_length=640)
KEYS = {
    "gpt-oss.expert_used_count": 2,
    "gpt-oss.attention.sliding_window": 16,
    "gpt-oss.attention.layer_norm_rms_epsilon": 1e-5,
    "gpt-oss.rope.freq_base": 150000.0,
    "gpt-oss.rope.scaling.factor": 32.0,
    "gpt-oss.rope.scaling.original_context_length": 4096,
    "gpt-oss.rope.scaling.type": "yarn",
}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp",
}  # fmt: skip
Stored = dict[str, Tensor | tuple[np.ndarray[Any, Any], str]]


def o200k_tokenizer() -> Any:
    """A small tokenizer that splits texts as GPT-OSS's does."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(O200K), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=list(CONTROLS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return wrap_tokenizer(tokenizer, CHAT_TEMPLATE)


def tokenizer_keys(tokenizer: Any) -> dict[str, Any]:
    """The same tokenizer as llama.cpp's converter writes it: padded to the size of the embedding."""
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{n}]" for n in range(TINY.vocab_size)]
    kinds = [5] * len(tokens)
    for token, number in about["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 3 if token in CONTROLS else 1
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in about["model"]["merges"]],
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def as_llama_cpp(state: dict[str, Tensor], form: str) -> tuple[Stored, dict[str, Tensor]]:
    """llama.cpp's tensors, experts in `form`, and the state with the weights that the package makes of them."""
    stored: Stored = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    expected = dict(state)
    for name, tensor in state.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        if ".experts." in rest:
            continue
        inner, _, side = rest.rpartition(".")
        key = NAMES[rest] + ".weight" if rest == "self_attn.sinks" else f"{NAMES[inner]}.{side}"
        stored[f"blk.{layer}.{key}"] = tensor
    for layer in range(TINY.num_hidden_layers):
        place = f"model.layers.{layer}.mlp.experts"
        both, bias = state[f"{place}.gate_up_proj"].mT, state[f"{place}.gate_up_proj_bias"]
        parts = {"gate": both[:, ::2], "up": both[:, 1::2], "down": state[f"{place}.down_proj"].mT}
        biases = {"gate": bias[:, ::2], "up": bias[:, 1::2], "down": state[f"{place}.down_proj_bias"]}
        made = {}
        for part, matrix in parts.items():
            data = gguf_files.quantised(matrix.contiguous(), form)
            stored[f"blk.{layer}.ffn_{part}_exps.weight"] = (data, form)
            stored[f"blk.{layer}.ffn_{part}_exps.bias"] = biases[part].contiguous()
            made[part] = gguf_files.dequantised(data, form)
        gate_up = torch.empty_like(both)
        gate_up[:, ::2], gate_up[:, 1::2] = made["gate"], made["up"]
        expected |= {f"{place}.gate_up_proj": gate_up.mT, f"{place}.down_proj": made["down"].mT}
    return stored, expected


@pytest.fixture(scope="module")
def encoder() -> GptOssEncoder:
    encoder = build(TINY).requires_grad_(False)
    encoder.tokenizer = o200k_tokenizer()
    return encoder


def written(path: Path, encoder: GptOssEncoder, form: str = "MXFP4", **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    stored, expected = as_llama_cpp(encoder.state_dict(), form)
    keys = KEYS | tokenizer_keys(encoder.tokenizer)
    keys = {k: v for k, v in (keys | changes).items() if v is not None}
    return gguf_files.write(path, stored, keys, "gpt-oss"), expected


def read(path: Path, config: Config, dtype: torch.dtype | None = torch.float32, folder: Path | None = None) -> Any:
    encoder, _, tensors = GptOssEncoder.from_header(path, config, folder or path.parent)
    encoder.load_weights(tensors, path, dtype)
    return encoder.eval()


def with_weights(state: dict[str, Tensor], encoder: GptOssEncoder) -> GptOssEncoder:
    plain = build(TINY).requires_grad_(False)
    plain.tokenizer = encoder.tokenizer
    plain.load_state_dict(state)
    return plain


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["MXFP4", "Q8_0", "Q4_0"])
def test_it_encodes_as_the_dequantised_model_does(form: str, encoder: GptOssEncoder, tmp_path: Path) -> None:
    path, expected = written(tmp_path / "gpt-oss.gguf", encoder, form)
    reference = with_weights(expected, encoder).encode(PROMPTS).features
    whole = read(path, evolve(TINY, experts="eager"))
    state = whole.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())
    assert torch.equal(whole.encode(PROMPTS).features, reference)
    kept = read(path, TINY)
    assert len(packed(kept)) == (6 if form == "MXFP4" else 0)
    assert torch.equal(kept.encode(PROMPTS).features, reference)


def test_sizes_come_from_shapes_and_the_rest_from_keys(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path, _ = written(tmp_path / "a.gguf", encoder)
    other = evolve(TINY, num_experts_per_tok=1, sliding_window=128, num_hidden_layers=3, vocab_size=5000)
    _, seen, _ = GptOssEncoder.from_header(path, other, tmp_path)
    assert (seen.num_experts_per_tok, seen.sliding_window, seen.num_hidden_layers, seen.vocab_size) == (2, 16, 4, 400)


def test_its_tokenizer_gives_the_same_ids(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path, _ = written(tmp_path / "a.gguf", encoder)
    ours, theirs = read(path, TINY), encoder
    texts = [*PROMPTS, "It's 12345 RED\n\n squares…", "<|end|> ünïcode 日本語 \u3000 tabs\t!"]
    for text in texts:
        assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert torch.equal(ours.tokens(texts)[0], theirs.tokens(texts)[0])
    assert ours.tokenizer.decode(ours.tokenizer("<|start|>Red")["input_ids"]) == "<|start|>Red"


def test_another_tokenizer_is_taken_from_beside_the_file_or_from_the_checkpoint(
    encoder: GptOssEncoder, tmp_path: Path
) -> None:
    path, _ = written(tmp_path / "one" / "a.gguf", encoder, **{"tokenizer.ggml.pre": "gpt-2"})
    encoder.save(tmp_path / "checkpoint")
    assert "tokenizer.json: missing" in error(lambda: read(path, TINY))
    ids = encoder.tokens(PROMPTS)[0]
    assert torch.equal(read(path, TINY, folder=tmp_path / "checkpoint").tokens(PROMPTS)[0], ids)
    # Beside a file stands the tokenizer alone, without a chat template: the published conversation is used.
    encoder.tokenizer.backend_tokenizer.save(str(path.parent / "tokenizer.json"))
    beside = read(path, evolve(TINY, max_length=900))
    assert beside.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    assert "ChatGPT" in beside.tokenizer.chat_template


def test_a_plugin_describes_the_file(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path, _ = written(tmp_path / "a.gguf", encoder)
    described = lens_describe(path)
    assert described is not None
    assert described["components"] == {"text_encoder": {"use": "lens_gpt_oss:gpt_oss", "file": "a.gguf"}}


def test_experts_in_mxfp4_are_saved_as_transformers_has_them(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path, expected = written(tmp_path / "a.gguf", encoder)
    kept = read(path, TINY)
    kept.save(tmp_path / "saved")
    again = GptOssEncoder.load(tmp_path / "saved", TINY)
    assert len(packed(again)) == 6
    assert torch.equal(again.encode(PROMPTS).features, with_weights(expected, encoder).encode(PROMPTS).features)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpt-oss.rope.freq_base": 10000.0}, "its rope.freq_base is 10000.0, and GPT-OSS's 150000.0"),
        ({"gpt-oss.rope.scaling.type": "linear"}, "its rope.scaling.type is 'linear'"),
        ({"gpt-oss.expert_used_count": 9}, "num_experts_per_tok"),
        ({"gpt-oss.attention.sliding_window": "wide"}, "sliding_window"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, r"its tokenizer has 2 tokens, 1 of them different"),
        ({"tokenizer.ggml.tokens": 400}, r"its tokenizer has 0 tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "which do not fit"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "tokenizer_json cannot be read"),
        ({"split.count": 3}, "one of 3 parts; join them first: llama-gguf-split --merge"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], words: str, encoder: GptOssEncoder, tmp_path: Path
) -> None:
    path, _ = written(tmp_path / "a.gguf", encoder, **changes)
    assert words in error(lambda: read(path, TINY))


def test_experts_that_are_missing_or_do_not_fit_are_named(encoder: GptOssEncoder, tmp_path: Path) -> None:
    stored, _ = as_llama_cpp(encoder.state_dict(), "Q8_0")
    for name, change, words in (
        ("blk.1.ffn_up_exps.weight", None, "ffn_up_exps.weight is missing"),
        ("blk.1.ffn_up_exps.bias", torch.ones(4, 3), "which do not fit"),
        ("blk.9.attn_sinks.bias", torch.ones(3), "holds 'blk.9.attn_sinks.bias', which GPT-OSS does not have"),
    ):
        kept = {k: v for k, v in stored.items() if k != name} | ({name: change} if change is not None else {})
        path = gguf_files.write(tmp_path / "a.gguf", kept, KEYS | tokenizer_keys(encoder.tokenizer), "gpt-oss")
        assert words in error(lambda path=path: read(path, TINY))


def test_the_file_of_another_model_is_named(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": torch.ones(2, 2)}, {}, "llama")
    assert lens_describe(path) is None
    assert "is a 'llama', not a gpt-oss" in error(lambda: read(path, TINY))
