"""A backbone in a GGUF file, as stable-diffusion.cpp and ComfyUI-GGUF write it: kept quantised, it draws what the
dequantised model draws, bit for bit; whatever has to change its weights gets plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from attrs import evolve
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.modulation import Modulation
from lens_mmdit.published import describe
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints import lora_keys, packed_linear
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.lazy_tensors import read_lazy
from lens_core.cli.main import main
from lens_core.inference import lora
from lens_core.inference.offload_plans import Workload
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import CheckpointError, TextFeatures

Config = LensTransformer2DModel.Config
SMALL = Config(
    in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=3, enc_hidden_dim=32,
    axes_dims_rope=(8, 12, 12), selected_layer_index=(1, 3),
)  # fmt: skip
WIDE = evolve(SMALL, num_layers=1, attention_head_dim=64, num_attention_heads=4, axes_dims_rope=(16, 24, 24))
PREFIXES = {"stable-diffusion.cpp": "model.diffusion_model.", "ComfyUI-GGUF": ""}


def build(config: Config = SMALL) -> LensTransformer2DModel:
    torch.manual_seed(0)
    model = LensTransformer2DModel(config).eval()
    for parameter in model.parameters():  # a new one predicts 0, whatever is wrong with it
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def written(path: Path, model: LensTransformer2DModel, form: str, prefix: str = "") -> tuple[Path, dict[str, Tensor]]:
    """A file with every matrix in `form` that divides into its blocks, and the weights that the package makes of it."""
    values, _ = gguf_files.gguf.GGML_QUANT_SIZES[gguf_files.TYPES[form]]
    stored: dict[str, Any] = {}
    expected = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        stored[prefix + name], expected[name] = tensor, tensor
        if tensor.ndim == 2 and tensor.shape[1] % values == 0:
            writable = form in gguf_files.WRITABLE
            data = gguf_files.quantised(tensor, form) if writable else gguf_files.blocks(tensor.shape, form, seed)
            stored[prefix + name], expected[name] = (data, form), gguf_files.dequantised(data, form)
    return gguf_files.write(path, stored, {"general.quantization_version": 2}, "lens"), expected


def read(path: Path, config: Config = SMALL, dtype: torch.dtype | None = torch.float32, **options: Any) -> Any:
    model, _, tensors = LensTransformer2DModel.from_header(path, config, path.parent, **options)
    model.load_weights(tensors, path, dtype)
    return model.eval().requires_grad_(False)


def with_weights(expected: dict[str, Tensor], config: Config, dtype: torch.dtype) -> LensTransformer2DModel:
    model = build(config)
    model.load_state_dict(expected)
    return model.to(dtype)


def drawn(model: Any, rows: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    x, features = torch.randn(rows, 16, 4, 6, generator=rng), torch.randn(rows, 2, 3, 32, generator=rng)
    text = TextFeatures(features, torch.ones(rows, 3, dtype=torch.bool))
    times = torch.tensor([0.5, 0.25][:rows])
    with torch.no_grad(), model.precomputed(times):
        v: Tensor = model(x, times, text)
    return v


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone of `tiny:` in Q8_0."""
    backbone = LensPipeline.from_pretrained("tiny:", catalog=Catalog.installed(), parts=("backbone",)).backbone
    return written(tmp_path_factory.mktemp("tiny") / "tiny.gguf", backbone, "Q8_0")[0]


@pytest.mark.parametrize("form", gguf_files.WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_draws_what_its_dequantised_weights_draw(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = WIDE if form.startswith("TQ") else SMALL
    path, expected = written(tmp_path / "lens.gguf", build(config), form)
    model, reference = read(path, config, dtype), with_weights(expected, config, dtype)
    assert model.dtype == dtype and torch.equal(drawn(model, 2), drawn(reference, 2))
    kept = packed_linear.packed_layers(model)
    assert bool(kept) != form.startswith("TQ"), "what torch cannot dequantise here is read as plain weights"
    state = read(path, config, dtype, plain=True).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v.to(dtype)) for k, v in expected.items())


@pytest.mark.parametrize("form", gguf_files.READABLE)
def test_formats_that_the_package_only_reads_draw_too(form: str, tmp_path: Path) -> None:
    path, expected = written(tmp_path / "lens.gguf", build(WIDE), form)
    assert torch.equal(drawn(read(path, WIDE)), drawn(with_weights(expected, WIDE, torch.float32)))


@pytest.mark.parametrize("tool", PREFIXES)
def test_the_names_of_both_tools_are_read_and_the_variant_is_told_by_the_files_name(tool: str, tmp_path: Path) -> None:
    path, expected = written(tmp_path / "lens_turbo-Q4_0.gguf", build(), "Q4_0", PREFIXES[tool])
    assert torch.equal(drawn(read(path)), drawn(with_weights(expected, SMALL, torch.float32)))
    described = describe(path)
    assert described is not None and described["presets"]["steps"] == 4
    assert described["components"]["backbone"] == {"use": "lens_mmdit:mmdit", "file": path.name}


def test_modulation_is_still_computed_once_a_run(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "lens.gguf", build(), "Q8_0")
    model = read(path)
    assert len(model.modulations()) == 5 and all(isinstance(m, Modulation) for m in model.modulations())
    assert all(isinstance(m, packed_linear.PackedLinear) for m in model.modulations())
    drawn(model)
    assert all(m.table is not None for m in model.modulations())


def test_less_is_held_and_the_note_says_how_much(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "lens.gguf", build(WIDE), "Q4_0")
    model, plain = read(path, WIDE, torch.bfloat16), read(path, WIDE, torch.bfloat16, plain=True)

    def held(net: Any) -> int:
        return sum(t.nbytes for t in (*net.parameters(), *net.buffers()))

    assert held(model) < 0.4 * held(plain) and plain.note == ""
    assert model.note.startswith(f"backbone: {len(packed_linear.packed_layers(model))} layers stay in Q4_0, each")
    assert model.activation_bytes(Workload()) - plain.activation_bytes(Workload()) == 16 * 6 * 256 * 256


def test_a_cast_later_is_a_load_in_that_dtype_and_a_copy_is_independent(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "lens.gguf", build(), "Q5_1")
    model = read(path)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(drawn(twin), drawn(read(path, dtype=torch.bfloat16))) and twin.dtype == torch.bfloat16
    packed_linear.unpack_all(twin)
    assert packed_linear.packed_layers(model) and not packed_linear.packed_layers(twin)
    assert torch.equal(drawn(twin), drawn(read(path, dtype=torch.bfloat16)))


def test_it_is_saved_as_plain_weights(tmp_path: Path) -> None:
    path, expected = written(tmp_path / "lens.gguf", build(), "Q4_1")
    read(path).save(tmp_path / "saved")
    state = LensTransformer2DModel.load(tmp_path / "saved", SMALL).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_an_adapter_is_folded_into_quantised_layers_and_taken_out_bit_for_bit(kind: str, tmp_path: Path) -> None:
    path, expected = written(tmp_path / "lens.gguf", build(), "Q8_0")
    name = "transformer_blocks.0.attn.img_qkv"
    rng = torch.Generator().manual_seed(3)
    lengths = {"magnitude": torch.rand(288, generator=rng)} if kind == "DoRA" else {}
    change = LoRA(torch.randn(2, 96, generator=rng), torch.randn(288, 2, generator=rng), 2.0, **lengths)
    lora_keys.write(tmp_path / "a.safetensors", {name: change})
    model, reference = read(path), with_weights(expected, SMALL, torch.float32)
    before, state = drawn(model), {k: v.clone() for k, v in model.state_dict().items()}
    stack = lora.LoRAStack()
    stack.add(model, tmp_path / "a.safetensors", 0.5)
    lora.fold(reference, lora.read(tmp_path / "a.safetensors", reference), 0.5, {})
    assert torch.equal(drawn(model), drawn(reference)) and not torch.equal(drawn(model), before)
    assert len(packed_linear.packed_layers(model)) == len(packed_linear.packed_layers(read(path))) - 1
    stack.reweight(model, {"default_0": 0.0})
    stack.remove(model)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in after.items())
    assert torch.equal(drawn(model), before)


def test_an_offloaded_backbone_draws_the_same_with_an_adapter_and_without(tiny: Path, tmp_path: Path) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", catalog=Catalog.installed(), backbone=tiny)
    layer = "transformer_blocks.1.attn.img_qkv"
    out, inner = pipeline.backbone.get_submodule(layer).weight.shape
    rng = torch.Generator().manual_seed(0)
    change = LoRA(torch.randn(2, inner, generator=rng), torch.randn(out, 2, generator=rng), 1.0)
    lora_keys.write(tmp_path / "a.safetensors", {layer: change})

    def draw() -> Tensor:
        result: Tensor = pipeline("a red circle", num_inference_steps=1, seed=3, output_type="latent").images
        return result

    plain = draw()
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    adapted = draw()
    pipeline.unload_lora_weights()
    pipeline.offload("block", "cpu")
    assert torch.equal(draw(), plain)
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    assert torch.equal(draw(), adapted) and pipeline.offload_manager is not None
    # The weight that the plan moves is the one that is used: each block's tensors are all in its group.
    groups = pipeline.offload_manager.parts["backbone"].stream.groups
    moved = {id(tensor) for group in groups for tensor in group.tensors}
    assert id(pipeline.backbone.get_submodule(layer).weight) in moved
    pipeline.unload_lora_weights()
    assert torch.equal(draw(), plain)


# ---- from the shell -----------------------------------------------------------------------------------------------


def test_it_is_converted_to_plain_weights(tmp_path: Path) -> None:
    # A file alone is taken for the published model: its head width, channels and layers of the encoder.
    config = Config(num_layers=1, num_attention_heads=2, enc_hidden_dim=32)
    path, expected = written(tmp_path / "lens.gguf", build(config), "Q8_0")
    out = tmp_path / "lens.safetensors"
    assert main(["convert", str(path), str(out), "--layout", "single", "--dtype", "fp32"]) == 0
    tensors, _ = read_lazy(out)
    assert tensors.keys() == expected.keys() and all(torch.equal(t.read(), expected[n]) for n, t in tensors.items())
    assert main(["convert", str(path), str(tmp_path / "half.safetensors"), "--layout", "single"]) == 0
    half, _ = read_lazy(tmp_path / "half.safetensors")
    kept = {n: t.dtype for n, t in half.items()}
    assert all(torch.equal(t.read(), expected[n].to(kept[n])) for n, t in half.items())
    assert {kept[n] for n in expected if n.endswith("img_qkv.weight")} == {torch.bfloat16}


def test_it_draws_with_the_other_parts_of_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    catalog = Catalog.installed()
    kept = LensPipeline.from_pretrained("tiny:", catalog=catalog, backbone=tiny)
    assert any("layers stay in Q8_0" in note for note in kept.notes)

    def draw(pipeline: LensPipeline) -> Tensor:
        result: Tensor = pipeline("a red circle", num_inference_steps=2, seed=3, output_type="latent").images
        return result

    kept.save_pretrained(tmp_path / "saved")
    plain = LensPipeline.from_pretrained(tmp_path / "saved", catalog=catalog)
    assert not packed_linear.packed_layers(plain.backbone) and torch.equal(draw(kept), draw(plain))


def test_the_command_draws_from_it_and_a_file_of_another_kind_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert main(["generate", "a red circle", "--backbone", str(tiny), "--steps", "1", "--output", str(out)]) == 0
    assert out.is_file() and "layers stay in Q8_0" in capsys.readouterr().err
    assert main(["generate", "x", "--model", str(tiny), "--output", str(tmp_path / "b.png")]) == 2
    assert "give --model a folder that it fits" in capsys.readouterr().err
    bad = tmp_path / "b.gguf"
    bad.write_bytes(tiny.read_bytes()[:1000])
    assert main(["generate", "x", "--model", str(bad), "--output", str(tmp_path / "b.png")]) == 2
    said = capsys.readouterr().err
    assert "b.gguf: not a GGUF file that can be read" in said and said.count("\n") == 1


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stored = {k: v for k, v in build().state_dict().items() if k != "proj_out.weight"}
    path = gguf_files.write(tmp_path / "a.gguf", stored)
    assert "lacks 'proj_out.weight'" in error(lambda: read(path))
    path = gguf_files.write(tmp_path / "b.gguf", {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, {}, "flux")
    assert describe(path) is None
    assert "holds double_blocks.0.img_attn.qkv.weight …, not a Lens backbone" in error(lambda: read(path))
