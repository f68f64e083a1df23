"""Pipelines of `from_pipe`: the state of shared weights is shared, and what describes a pipeline is its own."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from test_offload import Meter, fail_at
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints import packed_linear
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.latent_preview import LatentPreview
from lens_core.checkpoints.lora_keys import write
from lens_core.inference.lora import LoRAStack
from lens_core.inference.offload import OffloadedModule
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError, LensError


def drawn(pipeline: LensPipeline) -> Tensor:
    latents: Tensor = pipeline("red", height=32, width=32, seed=0, output_type="latent").images
    return latents


def lora(path: Path, pipeline: LensPipeline, value: float) -> Path:
    layer = pipeline.backbone.inner
    write(path, {"inner": LoRA(torch.full((1, layer.in_features), value), torch.ones(layer.out_features, 1), 1.0)})
    return path


def test_loras_are_those_of_the_shared_backbone(pipeline: LensPipeline, tmp_path: Path) -> None:
    plain = drawn(pipeline)
    a, b = (lora(tmp_path / f"{name}.safetensors", pipeline, value) for name, value in (("a", 1.0), ("b", -0.5)))
    pipeline.load_lora_weights(a)
    other = LensPipeline.from_pipe(pipeline)
    assert other.loras == ["a.safetensors:1"]
    other.load_lora_weights(b)
    assert pipeline.loras == other.loras == ["a.safetensors:1", "b.safetensors:1"]
    assert torch.equal(drawn(pipeline), drawn(other)) and not torch.equal(drawn(other), plain)
    other.unload_lora_weights()
    assert pipeline.loras == other.loras == [] and torch.equal(drawn(pipeline), plain)


def test_loras_go_with_the_backbone_that_they_are_in(pipeline: LensPipeline, catalog: Catalog, tmp_path: Path) -> None:
    plain, backbone = drawn(pipeline), pipeline.backbone
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors", pipeline, 1.0))
    changed = drawn(pipeline)
    by_hand = LensPipeline.from_parts(toy.PARTS, catalog)
    by_hand.backbone, copied = backbone, copy.copy(pipeline)
    pipeline.backbone = toy.Mixer(toy.Mixer.Config())
    assert pipeline.loras == [] and by_hand.loras == copied.loras == ["a.safetensors:1"]
    pipeline.backbone = backbone
    assert pipeline.loras == ["a.safetensors:1"] and torch.equal(drawn(pipeline), changed)
    by_hand.unload_lora_weights()
    assert pipeline.loras == copied.loras == [] and torch.equal(drawn(pipeline), plain)


def test_a_lora_that_is_fused_is_recorded_by_every_pipeline_that_draws_with_it(
    pipeline: LensPipeline, tmp_path: Path
) -> None:
    other = LensPipeline.from_pipe(pipeline)
    alone = LensPipeline.from_pipe(pipeline, transformer=toy.Mixer(toy.Mixer.Config()))
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors", pipeline, 1.0))
    pipeline.fuse_lora()
    fused = drawn(pipeline)
    other.unload_lora_weights()
    assert torch.equal(drawn(other), fused)
    for one in (pipeline, other):
        assert one.version.endswith("+a.safetensors:1") and one.provenance["loras"] == ["a.safetensors:1"]
    assert alone.loras == [] and "loras" not in alone.provenance and "a.safetensors" not in alone.version


def test_a_copy_of_a_backbone_shares_what_its_layers_were(pipeline: LensPipeline, tmp_path: Path) -> None:
    plain = drawn(pipeline)
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors", pipeline, 1.0))
    other = LensPipeline.from_pipe(pipeline, backbone=copy.deepcopy(pipeline.backbone))
    originals = [one._loras._originals["inner"].weight for one in (pipeline, other)]
    assert originals[0] is originals[1]
    other.unload_lora_weights()
    assert other.loras == [] and pipeline.loras == ["a.safetensors:1"]
    assert torch.equal(drawn(other), plain) and not torch.equal(drawn(pipeline), plain)
    pipeline.unload_lora_weights()
    assert torch.equal(drawn(pipeline), plain)


def test_copies_of_a_quantised_backbone_have_tensors_of_their_own_after_a_lora(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"inner": torch.nn.Linear(32, 4)})
    packed_linear.pack(net["inner"], "Q8_0", torch.zeros(4, 34, dtype=torch.uint8))  # type: ignore[arg-type]
    write(tmp_path / "a.safetensors", {"inner": LoRA(torch.ones(1, 32), torch.ones(4, 1), 1.0)})
    stack = LoRAStack()
    stack.add(net, tmp_path / "a.safetensors", 1.0)
    copied = copy.deepcopy(net)
    for one in (net, copied):
        LoRAStack.of(one).remove(one)
    layer, other = packed_linear.packed_layers(net)["inner"], packed_linear.packed_layers(copied)["inner"]
    where = other.packed.data_ptr()
    OffloadedModule(net, "visits", False, Meter())
    assert layer.packed.data_ptr() != where == other.packed.data_ptr()
    assert torch.equal(layer.packed, other.packed)


def test_the_map_of_previews_and_all_that_was_chosen_is_carried_over(pipeline: LensPipeline, tmp_path: Path) -> None:
    pipeline.latent_preview = LatentPreview(torch.zeros(3, 4), torch.zeros(3), 1, 1.0, 1)
    pipeline.reasoner, pipeline.note = object(), "a note"
    pipeline.lossy_vae_tile = 64
    other = LensPipeline.from_pipe(pipeline)
    assert other.preview(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 2, 2)
    assert (other.reasoner, other.note, other.lossy_vae_tile) == (pipeline.reasoner, "a note", 64)
    assert other.prompt_cache is pipeline.prompt_cache
    other.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "vae" / "latent_preview.json").is_file()
    other.presets["steps"], other.specs["vae"] = 99, pipeline.specs["sampler"]
    assert pipeline.presets["steps"] == 3 and pipeline.specs["vae"].use == "toy:blocks"
    replaced = LensPipeline.from_pipe(pipeline, vae=toy.Blocks(None))
    assert replaced.latent_preview is None and replaced.lossy_vae_tile is None


def test_an_encoder_that_is_replaced_leaves_the_cache_of_the_other(pipeline: LensPipeline) -> None:
    drawn(pipeline)
    other = LensPipeline.from_pipe(pipeline, text_encoder=toy.Letters(None))
    assert pipeline.prompt_cache.entries and not other.prompt_cache.entries


def test_an_offload_plan_and_where_weights_are_hold_for_both(pipeline: LensPipeline) -> None:
    before = drawn(pipeline)
    other = LensPipeline.from_pipe(pipeline)
    pipeline.offload("model", "cpu")
    assert other.offload_manager is pipeline.offload_manager is not None
    assert torch.equal(drawn(LensPipeline.from_pipe(pipeline, scheduler=toy.Even(toy.Even.Config()))), before)
    other.to(torch.bfloat16)
    assert pipeline.offload_manager is None and pipeline.dtype == "bfloat16"


def test_parts_that_are_not_shared_come_along_to_a_device(pipeline: LensPipeline) -> None:
    first = LensPipeline.from_pipe(pipeline, vae=toy.Blocks(None))
    second = LensPipeline.from_pipe(first, backbone=toy.Mixer(toy.Mixer.Config()), text_encoder=toy.Letters(None))
    strange = LensPipeline(toy.Blocks(None), toy.Letters(None), toy.Mixer(toy.Mixer.Config()))
    pipeline.to("meta")
    for one in (pipeline, first, second):  # the last has one part in common with the one before alone
        assert {p.device.type for net in one.present().values() for p in net.parameters()} == {one.device.type}
        assert one.device.type == "meta"
    assert strange.device.type == "cpu"


@pytest.mark.parametrize("plan", ["none", "model", "block"])
def test_a_plan_takes_in_parts_that_are_not_shared(plan: str, pipeline: LensPipeline) -> None:
    brighter = toy.Blocks(None)
    brighter.gain.data.mul_(2)
    before = LensPipeline.from_pipe(pipeline, vae=brighter), LensPipeline.from_pipe(pipeline)
    pictures = [one("red", height=32, width=32, seed=0, output_type="pt").images for one in before]
    pipeline.offload(plan, accelerator=(meter := Meter()))
    after = LensPipeline.from_pipe(pipeline, vae=copy.deepcopy(brighter))
    before[0].offload(plan, accelerator=meter)
    for one, picture in zip((*before, pipeline, after), (*pictures, pictures[1], pictures[0]), strict=True):
        assert one.offload_manager is not None and one.offload_manager.parts["vae"].module is one.vae
        assert torch.equal(one("red", height=32, width=32, seed=0, output_type="pt").images, picture)
    vaes = [one.offload_manager.parts["vae"] for one in (before[1], pipeline, before[0], after) if one.offload_manager]
    assert vaes[0] is vaes[1] and len(set(map(id, vaes))) == 3  # one part is under the plan once
    after.to("cpu")
    assert plan == "none" or not meter.held  # what stays there has been on the CPU all the time
    assert all(one.offload_manager is None for one in (*before, pipeline, after))
    assert torch.equal(pipeline("red", height=32, width=32, seed=0, output_type="pt").images, pictures[1])


@pytest.mark.parametrize("plan", ["none", "model", "block"])
@pytest.mark.parametrize("names", [("vae", "text_encoder", "backbone"), ("backbone",)])
def test_parts_that_are_replaced_leave_the_plan_of_the_other_pipeline(
    names: tuple[str, ...], plan: str, pipeline: LensPipeline
) -> None:
    picture = pipeline("red", height=32, width=32, seed=0, output_type="pt").images
    pipeline.offload(plan, accelerator=(meter := Meter()))
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in names}
    other = LensPipeline.from_pipe(pipeline, **parts)
    del parts
    for one in (pipeline, other):
        assert one.offload_manager is not None and one.offload_manager.estimate.plan == plan
        assert {k: part.module for k, part in one.offload_manager.parts.items()} == one.present()
        assert torch.equal(one("red", height=32, width=32, seed=0, output_type="pt").images, picture)
    other.to("cpu")
    assert (pipeline.offload_manager is None) is (len(names) == 1)
    assert torch.equal(pipeline("red", height=32, width=32, seed=0, output_type="pt").images, picture)
    pipeline.to("cpu")
    assert plan == "none" or not meter.held
    assert not any(m._forward_hooks for one in (pipeline, other) for n in one.present().values() for m in n.modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_move_that_does_not_fit_another_pipeline_leaves_all_where_they_are(
    dtype: Any, pipeline: LensPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = LensPipeline.from_pipe(pipeline, backbone=toy.Mixer(toy.Mixer.Config()))
    before = drawn(pipeline), drawn(other)
    with monkeypatch.context() as patch:
        fail_at(other.backbone.inner, patch, torch.OutOfMemoryError("no memory"))
        with pytest.raises(LensError, match="does not fit on meta, and stays as it was: no memory"):
            pipeline.to("meta", dtype)
    assert {one.device.type for one in (pipeline, other)} == {"cpu"}
    assert torch.equal(drawn(pipeline), before[0]) and torch.equal(drawn(other), before[1])


def test_a_plan_that_another_pipeline_does_not_fit_ends_on_the_cpu(pipeline: LensPipeline) -> None:
    other = LensPipeline.from_pipe(pipeline, backbone=toy.Mixer(toy.Mixer.Config()))
    other.source = "org/other"
    before, meter = (drawn(pipeline), drawn(other)), Meter()
    pipeline.offload("model", accelerator=meter)
    full, put = next(other.backbone.parameters()), meter.put

    def no_room(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == full.data_ptr():
            raise torch.OutOfMemoryError("no memory")
        return put(tensor)

    meter.put = no_room  # type: ignore[method-assign]
    says = "^backbone of another pipeline, org/other, which .* does not fit on cpu too, so both are on the CPU: no memo"
    with pytest.raises(LensError, match=says):
        pipeline.offload("none", accelerator=meter)
    assert pipeline.offload_manager is other.offload_manager is None
    assert torch.equal(drawn(pipeline), before[0]) and torch.equal(drawn(other), before[1])


def test_a_new_part_that_does_not_fit_leaves_the_plan_of_the_other_pipeline(pipeline: LensPipeline) -> None:
    before, meter = drawn(pipeline), Meter()
    pipeline.offload("none", accelerator=meter)
    big, put = toy.Mixer(toy.Mixer.Config()), meter.put

    def no_room(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == next(big.parameters()).data_ptr():
            raise torch.OutOfMemoryError("no memory")
        return put(tensor)

    meter.put = no_room  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        LensPipeline.from_pipe(pipeline, backbone=big)
    assert pipeline.offload_manager is not None and pipeline.offload_manager.estimate.plan == "none"
    assert {k: part.module for k, part in pipeline.offload_manager.parts.items()} == pipeline.present()
    assert torch.equal(drawn(pipeline), before)


def test_parts_of_another_pipeline_keep_their_dtype(checkpoint: Path, catalog: Catalog) -> None:
    pipeline = LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu")
    same = LensPipeline.from_pipe(pipeline)
    other = LensPipeline.from_pipe(pipeline, backbone=toy.Mixer(toy.Mixer.Config()))
    pipeline.to(torch.bfloat16)
    assert other.dtype == "float32" and same.dtype == "bfloat16"
    for one, dtype in ((other, torch.float32), (same, torch.bfloat16)):
        one.defer(["text_encoder"])
        assert next(one.text_encoder.parameters()).dtype == dtype


def test_a_subclass_sets_itself_up_and_what_is_no_pipeline_is_refused(pipeline: LensPipeline) -> None:
    class Mine(LensPipeline):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.extra = [1]

    class Needs(LensPipeline):
        def __init__(self, depth: int) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match=r"Needs\(\) needs more than from_pipe gives it.*'depth'.*defaults"):
        Needs.from_pipe(pipeline)
    mine = Mine.from_pipe(pipeline)
    mine.extra.append(2)
    assert Mine.from_pipe(mine).extra == [1, 2] and torch.equal(drawn(mine), drawn(pipeline))
    assert type(LensPipeline.from_pipe(mine)) is LensPipeline
    with pytest.raises(ConfigError, match="from_pipe takes a pipeline, not 'tiny:'; from_pretrained reads"):
        LensPipeline.from_pipe("tiny:")
    with pytest.raises(ConfigError, match="one part has two names among backbone, transformer"):
        LensPipeline.from_pipe(pipeline, transformer=pipeline.backbone, backbone=pipeline.backbone)


@pytest.mark.parametrize("names", [("vae", "text_encoder", "backbone"), ("vae",)])
def test_parts_that_are_let_go_of_leave_the_plan_of_the_other_pipeline(
    names: tuple[str, ...], checkpoint: Path, catalog: Catalog
) -> None:
    pipeline = LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu")
    before, meter = drawn(pipeline), Meter()
    pipeline.offload("model", accelerator=meter)
    other = LensPipeline.from_pipe(pipeline)
    other.defer(names)
    assert other.offload_manager is not None and other.offload_manager.parts.keys() == other.present().keys()
    pixels = other.decode(before)
    for one in (pipeline, other):
        copied = meter.copied
        one.encode(["red"])
        assert torch.equal(drawn(one), before) and torch.equal(one.decode(before), pixels)
        assert meter.copied - copied >= sum(t.nbytes for net in one.present().values() for t in net.parameters())


def test_a_part_that_no_other_pipeline_has_is_let_go_of_for_good(checkpoint: Path, catalog: Catalog) -> None:
    pipeline = LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu", offload="model")
    part = weakref.ref(pipeline.vae)
    pipeline.defer(["vae"])
    gc.collect()
    assert part() is None


def test_a_backbone_with_loras_is_not_let_go_of(checkpoint: Path, catalog: Catalog, tmp_path: Path) -> None:
    pipeline = LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu")
    plain, other = drawn(pipeline), LensPipeline.from_pipe(pipeline)
    pipeline.load_lora_weights(lora(tmp_path / "a.safetensors", pipeline, 1.0))
    with pytest.raises(ConfigError, match=r"backbone cannot be let go of with LoRAs in it \(a.safetensors:1\).*unload"):
        pipeline.defer(["backbone"])
    pipeline.defer(["vae"])
    pipeline.unload_lora_weights()
    pipeline.defer(["backbone"])
    other.load_lora_weights(tmp_path / "a.safetensors")
    assert pipeline.loras == [] and torch.equal(drawn(pipeline), plain)
