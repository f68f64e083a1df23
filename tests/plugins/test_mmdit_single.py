"""A backbone in one file: every prefix, every dtype, mxfp8 however it is declared, and what a file may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import asdict, evolve
from comfy_kitchen.backends.eager import quantization as comfy
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.published import describe
from lens_mmdit.single import convert_single_file
from safetensors.torch import save_file
from torch import Tensor

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.types import CheckpointError, ConfigError, NumericalError, TextFeatures

Config = LensTransformer2DModel.Config
SMALL = Config(
    in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=3, enc_hidden_dim=8,
    axes_dims_rope=(8, 12, 12), selected_layer_index=(1, 3),
)  # fmt: skip
PREFIXES = ["", "model.diffusion_model.", "diffusion_model."]


def build(config: Config = SMALL) -> LensTransformer2DModel:
    torch.manual_seed(0)
    model = LensTransformer2DModel(config).eval()
    for parameter in model.parameters():  # a new one predicts 0, whatever is wrong with it
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def write(path: Path, state: dict[str, Tensor], prefix: str = "", texts: dict[str, str] | None = None) -> Path:
    save_file({prefix + k: v.contiguous() for k, v in state.items()}, path, texts or {})
    return path


def read(path: Path, config: Config = SMALL, dtype: torch.dtype | None = None) -> tuple[LensTransformer2DModel, Config]:
    model, seen, tensors = LensTransformer2DModel.from_header(path, config, path.parent)
    model.load_weights(tensors, path, dtype)
    return model.eval(), seen


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quantised(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The blocks' matrices in mxfp8, without notes, and the weights that come of them."""
    stored, expected = dict(state), dict(state)
    for name in [n for n in state if n.startswith("transformer_blocks.") and state[n].ndim == 2]:
        packed, scales = comfy.quantize_mxfp8(state[name])
        stored |= {name: packed, f"{name}_scale": scales}
        expected[name] = comfy.dequantize_mxfp8(packed, scales, torch.float32)
    assert sum(n.endswith("_scale") for n in stored) == 24
    return stored, expected


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_prefix_and_dtype_gives_the_model_back(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build()
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    again, seen = read(write(tmp_path / "lens.safetensors", state, prefix))
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) and v.dtype == dtype for k, v in again.state_dict().items())
    assert evolve(seen, inner_dim=None) == SMALL and seen.width == 96
    assert read(tmp_path / "lens.safetensors", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_file_draws_what_the_model_draws(tmp_path: Path) -> None:
    model = build()
    again, _ = read(write(tmp_path / "lens.safetensors", model.state_dict(), "diffusion_model."))
    rng = torch.Generator().manual_seed(1)
    x, features = torch.randn(1, 16, 4, 6, generator=rng), torch.randn(1, 2, 3, 8, generator=rng)
    text = TextFeatures(features, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(again(x, torch.tensor([0.5]), text), model(x, torch.tensor([0.5]), text))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("source", ["by layer", "by header", "by header, without the prefix"])
def test_mxfp8_is_read_as_comfy_reads_it(prefix: str, source: str, tmp_path: Path) -> None:
    stored, expected = quantised(build().state_dict())
    layers = [n.removesuffix(".weight_scale") for n in stored if n.endswith("_scale")]
    texts: dict[str, str] = {}
    if source == "by layer":
        note = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
        stored |= {f"{layer}.comfy_quant": note.clone() for layer in layers}
    else:
        before = "" if "without" in source else prefix
        notes = {before + layer: {"format": "mxfp8"} for layer in layers}
        texts["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": notes})
    model, _ = read(write(tmp_path / "lens_mxfp8.safetensors", stored, prefix, texts))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        kind = torch.bfloat16 if f"{name}_scale" in stored else torch.float32
        assert torch.equal(value, expected[name].to(kind)), name
    exact, _ = read(tmp_path / "lens_mxfp8.safetensors", dtype=torch.float32)
    assert all(torch.equal(v, expected[k]) for k, v in exact.state_dict().items())


def test_other_models_in_the_same_file_are_left_alone(tmp_path: Path) -> None:
    state = {f"diffusion_model.{k}": v for k, v in build().state_dict().items()}
    state |= {"text_encoders.x.weight": torch.ones(2).to(torch.float8_e4m3fn), "vae.y": torch.ones(1)}
    texts = {"_quantization_metadata": json.dumps({"layers": {"text_encoders.x": {"format": "secret"}}})}
    model, _ = read(write(tmp_path / "all.safetensors", state, "", texts))
    assert model.state_dict().keys() == build().state_dict().keys()


def hollow(config: Config) -> dict[str, LazyTensor]:
    with torch.device("meta"):
        state = LensTransformer2DModel(config).state_dict()
    return {k: LazyTensor(tuple(v.shape), torch.bfloat16, lambda _: iter(())) for k, v in state.items()}


def test_the_published_shapes_give_the_published_config_whatever_it_is_put_into() -> None:
    for config in (Config(), SMALL):
        seen, tensors = convert_single_file(hollow(Config()), {}, config, "lens")
        assert asdict(seen) == asdict(Config()) | {"inner_dim": 1536}
        assert len(tensors) == 1264


def test_depth_width_and_words_are_inferred() -> None:
    for change in ({"num_layers": 5}, {"num_attention_heads": 2}, {"enc_hidden_dim": 24}):
        assert evolve(
            convert_single_file(hollow(evolve(SMALL, **change)), {}, SMALL, "lens")[0], inner_dim=None
        ) == evolve(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
            "its attention_head_dim is 16, but that of the model",
        ),
        ({"in_channels": 32, "out_channels": 8}, "its in_channels is 32, but that of the model it is for is 16"),
        ({"selected_layer_index": (0, 1, 2)}, "reads 3 layers of a text encoder, and the model it is for 2"),
    ],
)
def test_what_no_shape_tells_must_be_known_from_elsewhere(change: dict[str, Any], words: str) -> None:
    assert words in error(lambda: convert_single_file(hollow(evolve(SMALL, **change)), {}, SMALL, "lens"))


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("transformer_blocks.0.attn.norm_added_q.weight"), "not a Lens backbone"),
        (drop("img_in.weight"), "lacks 'img_in.weight'"),
        (drop("transformer_blocks.1.attn.img_qkv.bias"), "lacks 'transformer_blocks.1.attn.img_qkv.bias'"),
        (drop("proj_out.bias"), "lacks 'proj_out.bias'"),
        (put("transformer_blocks.7.x", torch.ones(1)), "holds 'transformer_blocks.7.x' (1 such)"),
        (put("img_in.weight", torch.ones(96)), "has the shape [96], which is not that of such a weight"),
        (put("img_in.weight", torch.ones(96, 0)), "'img_in.weight' has the shape [96, 0]"),
        (put("img_in.weight", torch.ones(97, 16)), "inner_dim is 97"),
        (put("proj_out.weight", torch.ones(15, 96)), "'proj_out.weight' has the shape [15, 96]; its config asks for"),
        (put("proj_out.weight", torch.ones(16, 96, dtype=torch.uint8)), "torch.uint8, which is not a plain weight"),
        (put("proj_out.weight", torch.ones(16, 96).to(torch.float8_e4m3fn)), "in a format that the file does not tell"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(
    damage: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    state = dict(build().state_dict())
    damage(state)
    path = write(tmp_path / "lens.safetensors", state)
    assert words in (said := error(lambda: read(path))) and str(path) in said


def test_another_model_is_recognised_by_what_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)})
    assert "holds double_blocks.0.img_attn.qkv.weight …, not a Lens backbone" in error(lambda: read(path))


def test_latents_of_another_vae_are_reported() -> None:
    text = TextFeatures(torch.zeros(1, 2, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ConfigError, match="the latents have 8 channels, but it reads 16; pair it with the VAE"):
        build()(torch.zeros(1, 8, 2, 2), torch.tensor([0.5]), text)


def test_float16_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "lens.safetensors", build().state_dict())
    with pytest.raises(NumericalError, match="overflow float16"):
        read(path, dtype=torch.float16)


# ---- what lens_describe answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("lens_bf16", 20), ("lens_turbo_mxfp8", 4), ("Lens-Base", 50)])
def test_a_file_is_a_model_with_the_presets_that_its_name_tells(name: str, steps: int, tmp_path: Path) -> None:
    path = write(tmp_path / f"{name}.safetensors", build().state_dict(), "model.diffusion_model.")
    description = describe(path)
    assert description is not None and description["presets"]["steps"] == steps
    assert description["components"]["backbone"] == {"use": "lens_mmdit:mmdit", "file": f"{name}.safetensors"}
    assert set(description["components"]) == {"backbone", "sampler"}
    assert describe(write(tmp_path / "vae.safetensors", {"bn.running_mean": torch.ones(1)})) is None


def test_comfys_folder_is_a_model_of_one_file_a_part(tmp_path: Path) -> None:
    for place in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / place).mkdir()
        assert "holds no .safetensors" in error(lambda: describe(tmp_path)) if place == "diffusion_models" else True
        write(tmp_path / place / f"{place}_turbo.safetensors", {"a": torch.ones(1)})
    description = describe(tmp_path)
    assert description is not None and description["presets"]["steps"] == 4
    files = {part: about.get("file") for part, about in description["components"].items()}
    assert files == {
        "backbone": "diffusion_models/diffusion_models_turbo.safetensors",
        "text_encoder": "text_encoders/text_encoders_turbo.safetensors",
        "vae": "vae/vae_turbo.safetensors",
        "sampler": None,
    }
    write(tmp_path / "vae" / "other.safetensors", {"a": torch.ones(1)})
    assert "vae: holds other.safetensors and 1 more" in error(lambda: describe(tmp_path))
