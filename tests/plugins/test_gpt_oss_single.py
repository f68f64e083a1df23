"""The encoder in one file, with experts in 4 bits, and how those are held: MXFP4 of transformers, nvfp4 of Comfy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from comfy_kitchen.backends.eager import quantization as comfy
from lens_gpt_oss import lens_describe
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.experts import packed
from lens_gpt_oss.single import convert_single_file
from lens_gpt_oss.template import HARMONY, INSTRUCTION, THOUGHT, conversation, render
from safetensors.torch import load_file, save_file
from small_gpt_oss import PROMPTS, build
from small_gpt_oss import TINY as SMALL
from torch import Tensor
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.types import CheckpointError, LensError

Config = GptOssEncoder.Config
TINY = evolve(SMALL, intermediate_size=64)
EAGER = evolve(TINY, experts="eager")


@pytest.fixture(scope="module")
def encoder() -> GptOssEncoder:
    return build(TINY).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(encoder: GptOssEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with plain weights."""
    encoder.save(root := tmp_path_factory.mktemp("checkpoint"))
    return root


def projections(state: dict[str, Tensor]) -> list[str]:
    return [n for n in state if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]


def as_mxfp4(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts drawn in MXFP4, as published, and the state with the weights that transformers makes of them."""
    stored, expected, rng = dict(state), dict(state), torch.Generator().manual_seed(0)
    for name in projections(state):
        experts, inner, out = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8, generator=rng)
        scales = torch.randint(120, 126, (experts, out, inner // 32), dtype=torch.uint8, generator=rng)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return stored, expected


def as_nvfp4(
    state: dict[str, Tensor], tokenizer: Any, prefix: str, bias: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Comfy's file, and the state with the weights that Comfy makes of it."""
    stored, expected = {k: v for k, v in state.items() if k != "lm_head.weight"}, dict(state)
    del expected["lm_head.weight"]
    for name in projections(state):
        each = [comfy.quantize_nvfp4(w.T.contiguous(), w.abs().amax() / (448 * 6)) for w in stored.pop(name)]
        alone = torch.stack([w.abs().amax() / (448 * 6) for w in state[name]])
        note = json.dumps({"format": "nvfp4", "orig_shape": [len(each), *state[name].shape[:0:-1]]})
        stored |= {
            f"{name}.weight": torch.stack([w for w, _ in each]),
            f"{name}.weight_scale": torch.stack([s for _, s in each]),
            f"{name}.weight_scale_2": alone,
            f"{name}.comfy_quant": torch.tensor(list(note.encode()), dtype=torch.uint8),
        }
        if bias == ".bias":
            stored[f"{name}.bias"] = stored.pop(f"{name}_bias")
        plain = [comfy.dequantize_nvfp4(w, g, s, torch.float32).T for (w, s), g in zip(each, alone, strict=True)]
        expected[name] = torch.stack(plain)
    words = tokenizer.backend_tokenizer.to_str().encode()
    stored = {prefix + k.removeprefix("model."): v for k, v in stored.items()}
    return stored | {"tokenizer_json": torch.frombuffer(bytearray(words), dtype=torch.uint8)}, expected


def write(path: Path, state: dict[str, Tensor], texts: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}, path, texts or {})
    return path


def read(path: Path, config: Config = TINY, dtype: torch.dtype | None = None, folder: Path | None = None) -> Any:
    encoder, _, tensors = GptOssEncoder.from_header(path, config, folder or path.parent)
    encoder.load_weights(tensors, path, dtype)
    return encoder.eval()


def plain(state: dict[str, Tensor]) -> GptOssEncoder:
    """An encoder with exactly these weights."""
    encoder = build(TINY).requires_grad_(False)
    encoder.load_state_dict(state, strict=False)
    return encoder


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in tensors.items())


# ---- experts in 4 bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_kept_in_mxfp4_give_what_the_plain_weights_give_bit_for_bit(
    dtype: torch.dtype, encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, expected = as_mxfp4(encoder.state_dict())
    path = write(tmp_path / "model.safetensors", stored)
    kept = read(path, TINY, dtype, folder)
    unpacked = read(path, EAGER, dtype, folder)
    assert len(packed(kept)) == 6 and not packed(unpacked)
    reference = plain(expected).to(dtype)
    features = kept.encode(PROMPTS).features
    assert features.dtype == dtype
    assert torch.equal(features, unpacked.encode(PROMPTS).features)
    assert torch.equal(features, reference.encode(PROMPTS).features)


def test_a_cast_later_is_a_load_in_that_dtype(encoder: GptOssEncoder, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", as_mxfp4(encoder.state_dict())[0])
    cast, loaded = read(path, TINY, torch.float32, folder).to(torch.bfloat16), read(path, TINY, torch.bfloat16, folder)
    assert same(cast.state_dict(), loaded.state_dict())
    assert torch.equal(cast.encode(PROMPTS).features, loaded.encode(PROMPTS).features)


def test_nothing_after_the_last_selected_layer_is_held(encoder: GptOssEncoder, folder: Path, tmp_path: Path) -> None:
    kept = read(write(tmp_path / "model.safetensors", as_mxfp4(encoder.state_dict())[0]), TINY, None, folder)
    assert len(kept.model.layers) == 3 and kept.lm_head is None
    assert not [n for n in kept.state_dict() if n.startswith(("model.layers.3.", "lm_head"))]
    with pytest.raises(LensError, match=r"can encode but not predict; .*experts: eager"):
        kept(kept.tokens(PROMPTS)[0])


def test_how_experts_are_held_is_reported_with_what_it_saves(
    encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", as_mxfp4(encoder.state_dict())[0])
    kept, whole = read(path, TINY, torch.bfloat16, folder), read(path, EAGER, torch.bfloat16, folder)
    assert "experts stay in mxfp4, unpacked one at a time; 0.0 GB instead of 0.0" in kept.note and whole.note == ""
    held = sum(t.nbytes for n, t in kept.state_dict().items() if "_proj_blocks" in n or "_proj_scales" in n)
    assert held / sum(t.nbytes for n, t in whole.state_dict().items() if n in projections(whole.state_dict())) < 0.36


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_a_published_folder_keeps_its_experts_packed_by_itself(
    layout: str, encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, expected = as_mxfp4(encoder.state_dict())
    encoder.save(tmp_path)
    names = sorted(stored)
    if layout == "folder":
        write(tmp_path / "text_encoder/model.safetensors", stored)
    else:
        (tmp_path / "text_encoder/model.safetensors").unlink()
        parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
        for file, part in parts.items():
            write(tmp_path / "text_encoder" / file, {k: stored[k] for k in part})
        table = {k: file for file, part in parts.items() for k in part}
        (tmp_path / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    kept = GptOssEncoder.load(tmp_path, TINY)
    assert "mxfp4" in kept.note
    assert torch.equal(kept.encode(PROMPTS).features, plain(expected).encode(PROMPTS).features)


def test_packed_experts_are_saved_as_they_are_and_transformers_unpacks_them(
    encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, expected = as_mxfp4(encoder.state_dict())
    kept = read(write(tmp_path / "in/model.safetensors", stored), TINY, None, folder)
    kept.save(tmp_path / "out")
    again = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert same(again, {k: v for k, v in stored.items() if not k.startswith(("model.layers.3.", "lm_head."))})
    assert torch.equal(
        GptOssEncoder.load(tmp_path / "out", TINY).encode(PROMPTS).features, kept.encode(PROMPTS).features
    )
    about = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert about["num_hidden_layers"] == 3 == len(about["layer_types"])
    assert about["quantization_config"]["quant_method"] == "mxfp4"
    model = GptOssForCausalLM.from_pretrained(tmp_path / "out/text_encoder", dtype=torch.float32)
    state = model.state_dict()
    for name in projections(state):
        assert torch.equal(state[name], expected[name].to(torch.bfloat16).to(state[name].dtype)), name


# ---- single files -----------------------------------------------------------------------------------------------


def test_transformers_names_give_the_encoder_back(encoder: GptOssEncoder, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "gpt_oss.safetensors", encoder.state_dict())
    again = read(path, TINY, None, folder)
    assert same(again.state_dict(), encoder.state_dict()) and again.config == TINY
    assert torch.equal(again.encode(PROMPTS).features, encoder.encode(PROMPTS).features)


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_folder_of_transformers_takes_the_place_of_a_file(
    own_tokenizer: bool, encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "text_encoder", tmp_path / "gpt-oss-20b")
    if own_tokenizer:
        shutil.copytree(folder / "tokenizer", tmp_path / "gpt-oss-20b", dirs_exist_ok=True)
    again = read(tmp_path / "gpt-oss-20b", TINY, None, tmp_path if own_tokenizer else folder)
    assert again.config == TINY and torch.equal(again.encode(PROMPTS).features, encoder.encode(PROMPTS).features)
    (tmp_path / "gpt-oss-20b/model.safetensors").unlink()
    assert lens_describe(tmp_path / "gpt-oss-20b") == {
        "format": 1, "components": {"text_encoder": {"use": "lens_gpt_oss:gpt_oss", "file": "."}},
    }  # fmt: skip
    assert "gpt-oss-20b/model.safetensors: missing" in error(lambda: read(tmp_path / "gpt-oss-20b", TINY, None, folder))


def test_a_single_file_in_mxfp4_unpacks_as_transformers_does(
    encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, expected = as_mxfp4(encoder.state_dict())
    assert same(read(write(tmp_path / "a.safetensors", stored), EAGER, torch.float32, folder).state_dict(), expected)


@pytest.mark.parametrize(("prefix", "bias"), [("", ".bias"), ("model.", ".bias"), ("", "_bias"), ("model.", "_bias")])
def test_comfys_file_is_read_under_each_of_its_names(
    prefix: str, bias: str, encoder: GptOssEncoder, tmp_path: Path
) -> None:
    stored, expected = as_nvfp4(encoder.state_dict(), encoder.tokenizer, prefix, bias)
    template = {"chat_template": str(encoder.tokenizer.chat_template)}  # type: ignore[union-attr]  # it has one
    path = write(tmp_path / "gpt_oss_20b_nvfp4.safetensors", stored, template)
    whole = read(path, EAGER, torch.float32)
    assert same(whole.state_dict(), expected)
    kept = read(path, TINY, torch.float32)
    assert "experts stay in nvfp4" in kept.note and len(packed(kept)) == 6
    assert torch.equal(kept.encode(PROMPTS).features, whole.encode(PROMPTS).features)
    assert torch.equal(whole.encode(PROMPTS).features, plain(expected).encode(PROMPTS).features)
    half = kept.to(torch.bfloat16).encode(PROMPTS).features
    assert torch.equal(half, read(path, EAGER, torch.bfloat16).encode(PROMPTS).features)


def test_experts_in_nvfp4_are_saved_for_transformers_as_plain_weights(encoder: GptOssEncoder, tmp_path: Path) -> None:
    stored, expected = as_nvfp4(encoder.state_dict(), encoder.tokenizer, "", ".bias")
    kept = read(write(tmp_path / "in/a.safetensors", stored), evolve(TINY, selected_layers=(0, 3)))
    kept.save(tmp_path)
    assert same(load_file(tmp_path / "text_encoder/model.safetensors"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "text_encoder/config.json").read_text())
    model, info = GptOssForCausalLM.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"lm_head.weight"}
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, expected["model.layers.0.mlp.experts.down_proj"])


def test_experts_of_comfy_may_be_plain(encoder: GptOssEncoder, folder: Path, tmp_path: Path) -> None:
    state = {k.removeprefix("model."): v for k, v in encoder.state_dict().items()}
    state |= {f"{n}.weight": state.pop(n).mT for n in projections(state)}
    again = read(write(tmp_path / "a.safetensors", state), TINY, None, folder)
    assert same(again.state_dict(), encoder.state_dict())


def test_the_tokenizer_is_the_files_own_with_gpt_osss_conversation_if_it_tells_none(
    encoder: GptOssEncoder, tmp_path: Path
) -> None:
    stored, _ = as_nvfp4(encoder.state_dict(), encoder.tokenizer, "", ".bias")
    bare = read(write(tmp_path / "a.safetensors", stored))
    assert bare.tokenizer.chat_template == HARMONY
    assert bare.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()  # type: ignore[union-attr]  # it has one
    assert INSTRUCTION in bare.tokenizer.decode(bare.tokens(PROMPTS[:1])[0][0])


def test_gpt_osss_conversation_is_the_published_one_to_the_byte() -> None:
    assert render(HARMONY, conversation("a cat"), "2026-05-23") == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-05-23\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        f"<|start|>developer<|message|># Instructions\n\n{INSTRUCTION}\n\n<|end|>"
        f"<|start|>user<|message|>a cat<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>{THOUGHT}<|end|>"
        "<|start|>assistant<|channel|>final<|message|><|return|>"
    )


@pytest.mark.parametrize("config", [Config(), TINY])
def test_the_published_shapes_give_the_published_config_whatever_it_is_put_into(config: Config) -> None:
    with torch.device("meta"):
        state = GptOssEncoder(Config()).state_dict()
    tensors = {k: LazyTensor(tuple(v.shape), v.dtype, lambda _: iter(())) for k, v in state.items()}
    seen, _ = convert_single_file(tensors, {}, config, "gpt_oss", packed=True)
    assert seen == evolve(Config(), max_length=config.max_length)


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.__delitem__(n) for n in names] and None  # type: ignore[func-returns-value]


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(name, value(state[name]))


FIRST = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("model.layers.0.mlp.router.weight"), "not a GPT-OSS; its names begin with model.layers. or layers."),
        (drop("model.embed_tokens.weight"), "lacks 'model.embed_tokens.weight'"),
        (drop("model.layers.1.self_attn.sinks"), "lacks 'model.layers.1.self_attn.sinks'"),
        (drop(f"{FIRST}_scales"), f"{FIRST}_blocks has no {FIRST}_scales beside it"),
        (drop(f"{FIRST}_blocks"), f"lacks '{FIRST}'"),
        (put(f"{FIRST}_scales", lambda t: t.fill_(255)), "has a scale that is NaN or infinite"),
        (put(f"{FIRST}_blocks", lambda t: t[..., :15]), "MXFP4 has [E, out, in/32, 16]"),
        (put(f"{FIRST}_blocks", lambda t: t[:, :-1]), "MXFP4 has [E, out, in/32, 16]"),
        (put(f"{FIRST}_blocks", lambda t: t.float()), "torch.float32 with torch.uint8; MXFP4 is uint8"),
        (put("model.layers.0.self_attn.sinks", lambda t: t[:0]), "'model.layers.0.self_attn.sinks' has the shape [0]"),
        (put("model.layers.0.self_attn.sinks", lambda t: t[:3]), "its num_attention_heads is 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    damage: Callable[[dict[str, Tensor]], None], words: str, encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, _ = as_mxfp4(encoder.state_dict())
    damage(stored)
    path = write(tmp_path / "a.safetensors", stored)
    for config in (TINY, EAGER):
        assert words in (said := error(lambda: read(path, config, None, folder))) and str(path) in said  # noqa: B023


def test_blocks_of_other_sizes_than_the_models_are_reported(
    encoder: GptOssEncoder, folder: Path, tmp_path: Path
) -> None:
    stored, _ = as_mxfp4(encoder.state_dict())
    stored |= {
        f"{FIRST}_blocks": stored[f"{FIRST}_blocks"][:, :64],
        f"{FIRST}_scales": stored[f"{FIRST}_scales"][:, :64],
    }
    path = write(tmp_path / "a.safetensors", stored)
    assert f"'{FIRST}_blocks' has the shape [4, 64, 1, 16]; its config asks for [4, 128, 1, 16]" in error(
        lambda: read(path, TINY, None, folder)
    )
    assert f"'{FIRST}' has the shape [4, 32, 64]; its config asks for [4, 32, 128]" in error(
        lambda: read(path, EAGER, None, folder)
    )


@pytest.mark.parametrize("words", [b"{", b"\xff", b'{"version": "9"}', b""])
def test_a_tokenizer_that_cannot_be_read_is_reported(words: bytes, encoder: GptOssEncoder, tmp_path: Path) -> None:
    stored, _ = as_nvfp4(encoder.state_dict(), encoder.tokenizer, "", ".bias")
    stored["tokenizer_json"] = torch.tensor(list(words), dtype=torch.uint8)
    path = write(tmp_path / "a.safetensors", stored)
    assert f"{path}: its tokenizer_json cannot be read" in error(lambda: read(path))


def test_a_file_without_a_tokenizer_needs_a_folder_that_has_one(encoder: GptOssEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", encoder.state_dict())
    assert "tokenizer.json: missing" in error(lambda: read(path))


def test_too_few_layers_for_the_taps_are_reported(encoder: GptOssEncoder, folder: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("model.layers.2.", "model.layers.3."))}
    path = write(tmp_path / "a.safetensors", state)
    assert "selected_layers is [0, 2]; give ascending layers from 0 to 1" in error(
        lambda: read(path, TINY, None, folder)
    )


def test_a_file_with_an_encoder_describes_itself(encoder: GptOssEncoder, tmp_path: Path) -> None:
    description = lens_describe(write(tmp_path / "a.safetensors", encoder.state_dict()))
    assert description is not None
    assert description["components"] == {"text_encoder": {"use": "lens_gpt_oss:gpt_oss", "file": "a.safetensors"}}
    assert lens_describe(write(tmp_path / "b.safetensors", {"a": torch.ones(1)})) is None
