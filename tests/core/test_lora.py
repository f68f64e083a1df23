"""LoRA on a trainable module of a run: what learns, what is written, and that other readers agree about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from lens_mmdit.model import LensTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from test_trainer import RECIPE, Runner, runner, same
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.lora_keys import FILE, write
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import LoraSpec
from lens_core.training.trainer import Trainer
from lens_core.types import CheckpointError, ConfigError, TextFeatures

__all__ = ["runner"]


def run(runner: Runner, name: str, adapter: LoraSpec, **train: Any) -> Trainer:
    changed = evolve(RECIPE.train, lora={"backbone": adapter}, **train)
    return runner.run(evolve(RECIPE, train=changed), name)


def test_a_new_adapter_changes_nothing_and_only_it_learns(runner: Runner) -> None:
    plain = runner.run(RECIPE, "plain").modules["backbone"].state_dict()
    start = run(runner, "a", LoraSpec(rank=2), ema_decay=0.0)
    x, t, text = torch.randn(2, 4, 3, 3), torch.rand(2), TextFeatures(torch.randn(2, 1, 5, 8), torch.ones(2, 5).bool())
    bare = runner.run(RECIPE, "bare").modules["backbone"]
    assert torch.equal(start.modules["backbone"](x, t, text), bare(x, t, text))
    start.train()
    learned = runner.state("a", 6)
    assert all(".lora_" in name for name in learned if name.startswith("net/backbone/"))
    moved = tensor_files.read_weights(runner.folder / "a" / "model" / "transformer")
    for name, layer in (("inner.weight", "inner"), ("words.weight", "words"), ("outer.weight", "outer")):
        down, up = (learned[f"net/backbone/{layer}.lora_{side}.default.weight"] for side in "AB")
        assert up.abs().max() > 0
        torch.testing.assert_close(moved[name], plain[name] + up @ down)
        assert torch.equal(moved[f"{layer}.bias"], plain[f"{layer}.bias"])


def test_the_written_adapter_on_the_start_is_the_merged_model_to_peft_and_to_diffusers(
    runner: Runner, tmp_path: Path
) -> None:
    run(runner, "a", LoraSpec(rank=2, scale=3.0)).train()
    path = tmp_path / "a" / "adapters" / "backbone" / lora.FILE
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["transformer.r"] == 2 and about["transformer.lora_alpha"] == 6.0
    fresh = runner.run(RECIPE, "fresh").modules["backbone"]
    targets = about["transformer.target_modules"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6.0, target_modules=targets), fresh)
    tensors = {k.removeprefix("transformer."): v for k, v in tensor_files.read_tensors(path).items()}
    assert not set_peft_model_state_dict(fresh, tensors).unexpected_keys
    lora.merge(fresh)
    same(fresh.state_dict(), runner.model("a"))


def test_diffusers_reads_the_adapter_of_a_backbone(tmp_path: Path) -> None:
    def build() -> LensTransformer2DModel:
        torch.manual_seed(0)
        shape = {"in_channels": 8, "out_channels": 2, "num_layers": 2, "num_attention_heads": 2}
        model = LensTransformer2DModel(
            **shape, attention_head_dim=8, axes_dims_rope=(2, 2, 4), enc_hidden_dim=8, selected_layer_index=(1, 3)
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    ours, theirs = build(), build()
    adapter = LoraSpec(rank=4, scale=0.5, targets=("attn.img_qkv", "img_mlp.w1"))
    lora.attach(ours, adapter)
    for name, parameter in ours.named_parameters():
        if lora.owned(name):
            nn.init.normal_(parameter)
    assert len(lora.tensors(ours)) == 2 * 2 * 2  # blocks, layers, A and B
    lora.save(ours, adapter, tmp_path / lora.FILE, "transformer")
    theirs.load_lora_adapter(tmp_path, weight_name=lora.FILE, use_safetensors=True, prefix="transformer")
    x, t = torch.randn(2, 8, 3, 3), torch.rand(2)
    text = TextFeatures(torch.randn(2, 2, 5, 8), torch.ones(2, 5).bool())
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, text), ours(x, t, text), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(build()(x, t, text), ours(x, t, text), atol=1e-2)
        beside = ours(x, t, text)
        lora.merge(ours)
        assert ours.state_dict().keys() == build().state_dict().keys()
        torch.testing.assert_close(ours(x, t, text), beside, atol=1e-5, rtol=1e-5)


def test_diffusers_reads_ranks_and_alphas_that_differ_by_layer(tmp_path: Path) -> None:
    def build() -> LensTransformer2DModel:
        torch.manual_seed(0)
        return LensTransformer2DModel(
            in_channels=8, out_channels=2, num_layers=1, num_attention_heads=2, attention_head_dim=8,
            axes_dims_rope=(2, 2, 4), enc_hidden_dim=8, selected_layer_index=(1,),
        )  # fmt: skip

    ours, theirs = build(), build()
    draw = torch.Generator().manual_seed(1)
    pairs = {
        name: LoRA(torch.randn(r, 16, generator=draw), torch.randn(out, r, generator=draw), alpha)
        for name, r, out, alpha in (
            ("transformer_blocks.0.attn.img_qkv", 2, 48, 1.0),
            ("transformer_blocks.0.attn.txt_qkv", 2, 48, 1.0),
            ("transformer_blocks.0.img_mlp.w1", 3, 42, 6.0),
        )
    }
    write(tmp_path / FILE, pairs)
    lora.fold(ours, lora.read(tmp_path, ours), 1.0, {})
    theirs.load_lora_adapter(tmp_path, weight_name=FILE, use_safetensors=True, prefix="transformer")
    lora.merge(theirs)
    for name in pairs:
        assert not torch.equal(ours.get_submodule(name).weight, build().get_submodule(name).weight)
        torch.testing.assert_close(theirs.get_submodule(name).weight, ours.get_submodule(name).weight)


def backbone() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"img_qkv": nn.Linear(6, 8), "to_out": nn.ModuleList([nn.Linear(8, 4)])})
    return nn.ModuleDict({"blocks": nn.ModuleList([block])})


def pairs(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"blocks.0.img_qkv": (6, 8), "blocks.0.to_out.0": (8, 4)}
    return {
        name: (torch.randn(rank, wide, generator=rng), torch.randn(tall, rank, generator=rng))
        for name, (wide, tall) in shapes.items()
    }


LAYOUTS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", False),
    "peft": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", False),
    "comfy": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", False),
    "sd-scripts": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
    "musubi": ("lora_unet_transformer_{}.lora_down.weight", "lora_unet_transformer_{}.lora_up.weight", True),
}


def written(path: Path, layout: str, header: dict[str, str] | None = None, **extra: Tensor) -> Path:
    down_key, up_key, flat = LAYOUTS[layout]
    tensors = dict(extra)
    for name, (down, up) in pairs().items():
        spelled = name.replace(".", "_") if flat else name
        tensors |= {down_key.format(spelled): down, up_key.format(spelled): up}
    tensor_files.save_tensors(path, tensors, header)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_means_the_same_change(layout: str, tmp_path: Path) -> None:
    net, plain = backbone(), backbone()
    lora.fold(net, lora.read(written(tmp_path / "a.safetensors", layout), net), 0.5, {})
    for name, (down, up) in pairs().items():
        was, now = plain.get_submodule(name), net.get_submodule(name)
        torch.testing.assert_close(now.weight, was.weight + 0.5 * up @ down)
        assert torch.equal(now.bias, was.bias)


@pytest.mark.parametrize(
    ("header", "extra", "scale"),
    [
        ({}, {}, 1.0),  # alpha is the rank
        ({"ss_network_alpha": "6"}, {}, 3.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}, {}, 4.0),
        ({"ss_network_alpha": "6"}, {"lora_unet_blocks_0_img_qkv.alpha": torch.tensor(1.0)}, 0.5),
    ],
)
def test_alpha_is_the_layers_own_then_the_headers_then_the_rank(
    header: dict[str, str], extra: dict[str, Tensor], scale: float, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.safetensors", "sd-scripts", header, **extra)
    assert lora.read(path, backbone())["blocks.0.img_qkv"].scale == scale


def test_several_are_folded_and_taken_out_exactly() -> None:
    net, plain, kept = backbone().bfloat16(), backbone().bfloat16(), {}
    changes = {name: LoRA(down, up, float(len(down))) for name, (down, up) in pairs().items()}
    lora.fold(net, changes, 0.7, kept)
    lora.fold(net, changes, -0.2, kept)
    layer = "blocks.0.img_qkv"
    expected = plain.get_submodule(layer).weight.float() + 0.5 * changes[layer].delta()
    torch.testing.assert_close(net.get_submodule(layer).weight.float(), expected, atol=2e-2, rtol=1e-2)
    assert not torch.equal(net.get_submodule(layer).weight, plain.get_submodule(layer).weight)
    lora.unfold(net, kept)
    same(net.state_dict(), plain.state_dict())
    assert not kept


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"transformer.blocks.9.img_qkv.lora_A.weight": torch.ones(2, 6)}, r"1 of 5 tensors fit no layer .*blocks\.9"),
        ({"nonsense": torch.ones(1)}, "1 of 5 tensors fit no layer .*nonsense"),
        (
            {"transformer.blocks.0.img_qkv.lora_A.weight": torch.ones(2, 7)},
            r"is \[8, 6\] here, but \[8, 2\] x \[2, 7\]",
        ),
        ({"transformer.blocks.0.img_qkv.lora_A.weight": torch.ones(3, 6)}, r"\[8, 2\] x \[3, 6\], which is no product"),
        ({"transformer.blocks.0.to_out.0.lora_B.weight": torch.ones(5, 2)}, "made for another model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(extra: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", "diffusers")
    tensor_files.save_tensors(path, tensor_files.read_tensors(path) | extra)
    with pytest.raises(CheckpointError, match=says):
        lora.read(path, backbone())


def test_half_an_adapter_and_a_broken_header_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", "diffusers")
    whole = tensor_files.read_tensors(path)
    tensor_files.save_tensors(path, {k: v for k, v in whole.items() if "img_qkv.lora_B" not in k})
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.img_qkv' has only its down"):
        lora.read(path, backbone())
    tensor_files.save_tensors(path, whole, {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="header of the LoRA file cannot be read"):
        lora.read(path, backbone())


def test_a_pipeline_draws_with_a_trained_lora_as_with_the_merged_model(runner: Runner, catalog: Catalog) -> None:
    run(runner, "a", LoraSpec(rank=2)).train()
    base = runner.run(RECIPE, "base").pipeline
    merged = LensPipeline.from_pretrained(runner.folder / "a" / "model", catalog=catalog)

    def draw(pipeline: LensPipeline) -> Any:
        return pipeline("red", height=32, width=32, seed=0, num_inference_steps=4, output_type="latent")

    before = draw(base).images
    base.load_lora_weights(runner.folder / "a" / "adapters" / "backbone")
    with_lora = draw(base)
    assert with_lora.settings["loras"] == ["backbone:1"]
    torch.testing.assert_close(with_lora.images, draw(merged).images, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_lora.images, before, atol=1e-3)
    base.unload_lora_weights()
    assert torch.equal(draw(base).images, before) and "loras" not in draw(base).settings


def test_a_fused_lora_stays_and_what_is_saved_names_it(
    pipeline: LensPipeline, catalog: Catalog, tmp_path: Path
) -> None:
    wide, high = pipeline.backbone.inner.in_features, pipeline.backbone.inner.out_features
    low = {"inner": LoRA(torch.ones(1, wide), torch.ones(high, 1), 1.0)}
    write(tmp_path / "style.safetensors", low)
    before, version = pipeline.backbone.inner.weight.clone(), pipeline.version
    pipeline.load_lora_weights(tmp_path / "style.safetensors", 0.5)
    pipeline.load_lora_weights(tmp_path / "style.safetensors", 0.25)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.backbone.inner.weight, before + 0.75)
    assert pipeline.loras == [] and pipeline.version == f"{version}+style.safetensors:0.5+style.safetensors:0.25"
    pipeline.load_lora_weights(tmp_path / "style.safetensors", 2)
    pipeline.save_pretrained(tmp_path / "made")
    made = LensPipeline.from_pretrained(tmp_path / "made", catalog=catalog)
    torch.testing.assert_close(made.backbone.inner.weight, before + 2.75)
    assert made.provenance["loras"] == ["style.safetensors:0.5", "style.safetensors:0.25", "style.safetensors:2"]
    pipeline.fuse_lora(), pipeline.fuse_lora()
    assert len(pipeline.provenance["loras"]) == 3, "fusing nothing names nothing"


def test_a_run_with_an_adapter_resumes_bit_for_bit(runner: Runner) -> None:
    run(runner, "whole", LoraSpec(rank=2)).train()
    halved = run(runner, "halved", LoraSpec(rank=2))
    halved.method.after_step = lambda step, modules: setattr(halved, "_stop", step == 2)  # type: ignore[method-assign]
    assert halved.train().model is None
    run(runner, "halved", LoraSpec(rank=2)).train()
    same(runner.state("halved", 6), runner.state("whole", 6))
    same(runner.model("halved"), runner.model("whole"))


def test_an_adapter_that_fits_nothing_is_refused_by_name(runner: Runner) -> None:
    with pytest.raises(ConfigError, match="no linear layer ends in 'img_qkv'; layers end in inner, outer, words"):
        run(runner, "a", LoraSpec(targets=("img_qkv",)))
    with pytest.raises(ConfigError, match="no trainable module is called 'judge'; there are backbone, critic"):
        runner.run(evolve(RECIPE, train=evolve(RECIPE.train, lora={"judge": LoraSpec()})), "b")
    with pytest.raises(ConfigError, match="rank: must be at least 1"):
        LoraSpec(rank=0)
    with pytest.raises(ConfigError, match="no linear layer to adapt"):
        lora.attach(nn.Conv2d(3, 3, 1), LoraSpec())


def test_a_run_begun_before_an_option_existed_goes_on(runner: Runner) -> None:
    first = runner.run(RECIPE, "a")
    first.method.after_step = lambda step, modules: setattr(first, "_stop", step == 1)  # type: ignore[method-assign]
    first.train()
    path = runner.folder / "a" / "recipe.json"
    data = json.loads(path.read_text())
    del data["train"]["lora"], data["train"]["threads"]
    path.write_text(json.dumps(data))
    assert runner.run(RECIPE, "a").train().steps == 6


def test_every_trainable_module_is_compiled(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    started = runner.run(evolve(RECIPE, train=evolve(RECIPE.train, compile=True)), "a")
    assert compiled == list(started.modules.values())
    runner.run(RECIPE, "b")
    assert len(compiled) == 2
