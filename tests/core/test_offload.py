"""Who is on the accelerator when: the same pictures, and the bytes that the plan told."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lens_flow.euler import Euler
from lens_flux2.vae import Flux2VAE
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.template import train_tokenizer
from lens_mmdit.model import LensTransformer2DModel
from live import Live
from torch import Tensor, nn

from lens_core.inference import offload, offload_plans
from lens_core.inference.guidance import TOGETHER
from lens_core.inference.offload import Accelerator
from lens_core.inference.offload_plans import ALIGNMENT, PHASES, PLANS, Workload
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError, LensError, PluginError, TextFeatures

PROMPTS = ["a red circle", "a blue square and a small green star"]
CALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 0}


class Meter(Accelerator):
    """The CPU as an accelerator that counts what lives on it. Copies are made at once, or as late as is allowed; memory
    that nothing was copied into is NaN."""

    def __init__(self, late: bool = False, free: int | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.late, self.room = late, free
        self.live: dict[int, int] = {}  # where an allocation lies -> its bytes
        self.peak = self.issued = 0
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.copied = 0

    @property
    def held(self) -> int:
        return sum(self.live.values())

    def empty(self, size: int) -> Tensor:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        raw = np.full(size + ALIGNMENT, 255, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.live[raw.ctypes.data + start] = size
        weakref.finalize(raw, self.live.pop, raw.ctypes.data + start)
        self.peak = max(self.peak, self.held)
        return torch.from_numpy(raw[start : start + size])

    def put(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        there = self.empty(size)[:size].view(tensor.dtype).view(tensor.shape)
        return there.copy_(tensor)

    def mark(self) -> int:
        return self.issued

    def copy(self, to: Tensor, host: Tensor, after: Any) -> int:
        assert isinstance(after, int) and not self.has(host) and self.has(to)
        self.queue.append((to, host))
        self.issued += 1
        self.copied += len(host)
        if not self.late:
            self.wait(self.issued)
        return self.issued

    def wait(self, mark: Any) -> None:
        while self.queue and self.issued - len(self.queue) < mark:
            to, host = self.queue.pop(0)
            to.copy_(host)

    def join(self) -> None:
        self.wait(self.issued)

    settle = join

    def free(self) -> int | None:
        return self.room

    def has(self, tensor: Tensor) -> bool:
        where = tensor.data_ptr()
        return any(start <= where < start + size for start, size in self.live.items())


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer(PROMPTS, 400)


def build(dtype: torch.dtype = torch.float32) -> LensPipeline:
    """Published classes in small, with weights that all count."""
    torch.manual_seed(0)
    encoder = GptOssEncoder(
        GptOssEncoder.Config(
            vocab_size=400, hidden_size=32, intermediate_size=16, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
            selected_layers=(0, 3), max_length=256,
        )
    )  # fmt: skip
    backbone = LensTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=5, attention_head_dim=16, num_attention_heads=2, enc_hidden_dim=32,
        axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 3),
    )  # fmt: skip
    vae = Flux2VAE(
        Flux2VAE.Config(block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4)
    )
    for net in (encoder, backbone):
        for p in net.parameters():
            nn.init.normal_(p, std=0.2)
    encoder.tokenizer = tokenizer()
    pipeline = LensPipeline(vae.eval(), encoder.eval(), backbone.eval(), Euler(Euler.Config()))
    return pipeline.to(dtype=dtype)


def draw(pipeline: LensPipeline, **more: Any) -> Tensor:
    images: Tensor = pipeline(PROMPTS, output_type="latent", **{**CALL, **more}).images
    return images


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest) -> tuple[torch.dtype, Tensor, Tensor]:
    pipeline = build(request.param)
    return request.param, draw(pipeline), pipeline(PROMPTS, output_type="pt", **CALL).images


@pytest.mark.parametrize("late", [False, True], ids=["eager", "late"])
@pytest.mark.parametrize("plan", PLANS)
def test_pictures_under_every_plan_are_bit_for_bit_those_without(
    plan: str, late: bool, plain: tuple[torch.dtype, Tensor, Tensor]
) -> None:
    dtype, latents, images = plain
    pipeline = build(dtype)
    pipeline.offload(plan, accelerator=Meter(late))
    assert torch.equal(draw(pipeline), latents)
    assert torch.equal(pipeline(PROMPTS, output_type="pt", **CALL).images, images), "and once more"


@pytest.mark.parametrize("plan", PLANS)
def test_each_phase_peaks_at_the_estimate_of_the_plan(plan: str) -> None:
    pipeline, meter = build(torch.bfloat16), Meter()
    estimate = pipeline.offload(plan, accelerator=meter)
    rest = meter.held
    peaks = {}
    meter.peak = meter.held
    text = pipeline.encode(PROMPTS)
    peaks["encode"] = meter.peak
    assert meter.held == rest
    noise = pipeline.noise([torch.Generator().manual_seed(0)] * 2, (4, 6))
    meter.peak = meter.held
    for _, x in pipeline.sample(text, noise, 3, 3.0):
        z = x
    peaks["denoise"] = meter.peak
    assert meter.held == rest
    meter.peak = meter.held
    pipeline.decode(z)
    peaks["decode"] = meter.peak
    assert peaks == estimate.weights
    assert meter.held == rest == (0 if plan in ("model", "block") else rest)
    meter.peak = meter.held
    pipeline(PROMPTS, output_type="pt", **CALL)
    assert meter.peak == max(estimate.weights.values())


def test_plans_hold_less_and_less() -> None:
    pipeline = build(torch.bfloat16)
    modules = {part: getattr(pipeline, part) for part in PHASES}
    estimates = {plan: offload_plans.estimate_memory(plan, modules, Workload()) for plan in PLANS}
    each = {plan: max(f.weights.values()) for plan, f in estimates.items()}
    assert each["none"] > each["modulation"] > each["model"] > each["block"]
    everything = sum(t.numel() * t.element_size() for m in modules.values() for t in m.state_dict().values())
    assert each["none"] >= everything
    assert estimates["none"].host == dict.fromkeys(PHASES, 0)
    layers = pipeline.backbone.modulations()
    moved = sum(2 * p.numel() for m in layers for p in m.parameters())
    assert estimates["modulation"].host["backbone"] == pytest.approx(moved, abs=ALIGNMENT * 2 * len(layers))
    # Two blocks, without their modulation, and what is not in blocks:
    block = sum(2 * p.numel() for n, p in pipeline.backbone.transformer_blocks[0].named_parameters() if "_mod" not in n)
    outer = sum(
        2 * p.numel() for n, p in pipeline.backbone.named_parameters() if "blocks" not in n and "norm_out" not in n
    )
    assert estimates["block"].there["backbone"] == pytest.approx(2 * block + outer, rel=0.15)
    assert estimates["encoder-cpu"].there["text_encoder"] == 0
    head = 2 * pipeline.text_encoder.lm_head.weight.numel()
    assert estimates["modulation"].host["text_encoder"] > head


def leaves(net: nn.Module) -> Iterator[nn.Module]:
    yield from (m for m in net.modules() if next(m.parameters(recurse=False), None) is not None)


@pytest.mark.parametrize("plan", PLANS)
def test_no_module_computes_with_weights_from_elsewhere(plan: str) -> None:
    pipeline, meter = build(), Meter()
    seen: dict[str, set[bool]] = {part: set() for part in PHASES}

    def watch(part: str, net: nn.Module) -> None:
        for leaf in leaves(net):

            def check(module: nn.Module, args: Any) -> None:
                if args and args[0].dtype == torch.int64 and hasattr(module, "table"):
                    return  # reads the table, and no weight
                seen[part] |= {meter.has(p) for p in module.parameters(recurse=False)}

            leaf.register_forward_pre_hook(check)

    pipeline.offload(plan, accelerator=meter)
    for part in PHASES:
        watch(part, getattr(pipeline, part))
    draw(pipeline)
    pipeline.decode(torch.zeros(1, 8, 4, 6))
    assert seen == {part: {PLANS[plan][part] != "host"} for part in PHASES}


def test_the_next_block_is_on_its_way_while_one_works() -> None:
    pipeline, meter = build(), Meter(late=True)
    pipeline.offload("block", accelerator=meter)
    order: list[tuple[int, int]] = []
    for n, block in enumerate(pipeline.backbone.transformer_blocks):
        # registered after the stream's own hook, so the fetch has been asked for
        block.register_forward_pre_hook(lambda *_, n=n: order.append((n, len(meter.queue))))
    draw(pipeline, num_inference_steps=1)
    assert [n for n, _ in order] == [0, 1, 2, 3, 4] * 2
    assert all(waiting for _, waiting in order), "a copy is under way in every block"
    assert not meter.queue, "and none is left behind"


@pytest.mark.parametrize(
    ("error", "seen"), [(ZeroDivisionError("x"), PluginError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_pass_that_stops_early_or_fails_leaves_every_weight_at_home(
    error: BaseException, seen: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    pipeline, meter = build(), Meter(late=True)
    want = {k: v.clone() for k, v in pipeline.backbone.state_dict().items()}
    latents = draw(pipeline)
    pipeline.offload("block", accelerator=meter)
    walk = pipeline.sample(pipeline.encode(PROMPTS), pipeline.noise([torch.Generator()] * 2, (4, 6)), 3, 1.0)
    next(walk)
    assert meter.held
    walk.close()
    assert not meter.held
    hook = pipeline.backbone.transformer_blocks[2].attn.register_forward_pre_hook(fail)
    with pytest.raises(seen):
        draw(pipeline)
    hook.remove()
    assert not meter.held
    assert all(torch.equal(v, want[k]) for k, v in pipeline.backbone.state_dict().items())
    assert torch.equal(draw(pipeline), latents)


def test_features_of_some_blocks_survive_streaming() -> None:
    pipeline = build()
    x, t, text = (
        torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(1)),
        torch.ones(2),
        pipeline.encode(PROMPTS),
    )
    with torch.no_grad():
        with pipeline._precomputed_modulation(t[:1]):
            want = pipeline.backbone.features(x, t, text, [0, 2])
        pipeline.offload("block", accelerator=Meter(late=True))
        with pipeline._at_work("backbone"), pipeline._precomputed_modulation(t[:1]):
            for _ in range(2):  # block 0 follows block 2 here, and not block 4
                got = pipeline.backbone.features(x, t, text, [0, 2])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_lora_is_folded_into_weights_that_are_away(tmp_path: Any) -> None:
    from lens_core.checkpoints.tensor_files import save_tensors

    rng = torch.Generator().manual_seed(0)
    low = {}
    for layer, (high, wide) in {
        "transformer_blocks.1.attn.img_qkv": (96, 32), "transformer_blocks.0.img_mod.1": (192, 32)
    }.items():  # fmt: skip
        low[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, wide, generator=rng)
        low[f"transformer.{layer}.lora_B.weight"] = torch.randn(high, 2, generator=rng)
    save_tensors(tmp_path / "a.safetensors", low)
    plain, away = build(), build()
    away.offload("block", accelerator=Meter())
    before = draw(away)
    for pipeline in (plain, away):
        pipeline.load_lora_weights(tmp_path / "a.safetensors", 0.5)
    assert torch.equal(draw(plain), draw(away)) and not torch.equal(draw(away), before)
    away.unload_lora_weights()
    assert torch.equal(draw(away), before)


def test_a_saved_pipeline_is_the_same_under_any_plan(tmp_path: Any) -> None:
    from lens_core.recipe import ComponentSpec

    pipeline = build()
    pipeline.specs = {
        "vae": ComponentSpec("flux2"),
        "text_encoder": ComponentSpec("gpt_oss"),
        "backbone": ComponentSpec("mmdit"),
        "sampler": ComponentSpec("euler"),
    }
    pipeline.save_pretrained(tmp_path / "a")
    pipeline.offload("block", accelerator=Meter())
    draw(pipeline)
    pipeline.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_to_ends_a_plan_and_another_may_follow() -> None:
    pipeline, meter = build(), Meter()
    latents = draw(pipeline)
    for plan in ("block", "model", "none", "encoder-cpu", "block"):
        pipeline.offload(plan, accelerator=meter)
        assert torch.equal(draw(pipeline), latents)
    pipeline.to("cpu")
    copied = meter.copied
    assert torch.equal(draw(pipeline), latents)
    assert pipeline.offload_manager is None and meter.copied == copied


def test_another_sampler_moves_no_weights() -> None:
    from lens_flow.solvers import Heun

    pipeline, meter = build(), Meter()
    pipeline.offload("none", accelerator=meter)
    manager, held = pipeline.offload_manager, dict(meter.live)
    pipeline.sampler = Heun(Heun.Config())
    assert pipeline.offload_manager is manager and meter.live == held
    draw(pipeline)


def test_a_picture_to_begin_at_is_encoded_under_a_plan() -> None:
    from PIL import Image

    call = {**CALL, "image": Image.new("RGB", (48, 32), "red"), "strength": 0.7}
    plain, away = build(), build()
    away.offload("block", accelerator=Meter(late=True))
    assert torch.equal(*(p("a red circle", output_type="pt", **call).images for p in (plain, away)))


def test_auto_takes_the_fastest_plan_that_fits() -> None:
    pipeline, load = build(), Workload((32, 48), 4)
    modules = {part: getattr(pipeline, part) for part in PHASES}
    need = {plan: offload_plans.estimate_memory(plan, modules, load).peak + offload_plans.RESERVE for plan in PLANS}
    chosen = set()
    for free in (0, *need.values(), *(n - 1 for n in need.values())):
        fits = [plan for plan in PLANS if need[plan] <= free]
        want = fits[0] if fits else min(need, key=need.__getitem__)
        assert pipeline.offload("auto", workload=load, accelerator=Meter(free=free)).plan == want
        chosen.add(want)
    assert {"none", "modulation", "encoder-cpu"} <= chosen


def test_auto_without_an_accelerator_moves_nothing() -> None:
    pipeline = build()
    latents = draw(pipeline)
    estimate = pipeline.offload("auto", "cpu")
    assert estimate.plan == "none" and torch.equal(draw(pipeline), latents)


def test_a_plan_that_is_none_is_refused_by_name_and_changes_nothing() -> None:
    pipeline = build()
    with pytest.raises(ConfigError, match=r"no offload plan is called 'blok'\. Did you mean 'block'"):
        pipeline.offload("blok")
    assert pipeline.offload_manager is None


def test_chunks_of_a_pack_are_bounded_and_hold_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK", 4096)
    tensors = [torch.full((n,), float(n)) for n in (10, 900, 5, 3000, 0, 1, 200, 200)]
    values, meter = [t.clone() for t in tensors], Meter(late=True)
    pack = offload.TensorGroup(tensors, meter)
    assert [len(host) for _, host in pack.chunks] == [512, 4096, 512, 12288, 2560], (
        "one tensor may be larger than a chunk"
    )
    assert sum(len(host) for _, host in pack.chunks) == pack.size
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    pack.enter()
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    assert all(meter.has(t) for t in tensors if t.numel()) and math.isclose(meter.held, pack.size)
    pack.leave()
    assert not meter.held and all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))


def test_the_plan_is_reported_in_lines_that_add_up() -> None:
    pipeline = build()
    estimate = pipeline.offload("block", accelerator=Meter())
    text = offload_plans.describe_plan(estimate, "cuda", 10**9)
    assert text.startswith("offload: block (cuda, 1.00 GB free)")
    for part in PHASES:
        assert f"{estimate.there[part] / 1e9:.3f}" in next(line for line in text.splitlines() if part in line)
    assert "may not fit" not in text and "may not fit" in offload_plans.describe_plan(estimate, "cuda", 10**6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "count"), [((16, 24), 1), ((64, 96), 1), ((64, 48), 2)])
def test_estimates_beside_the_weights_are_what_operators_hold(
    dtype: torch.dtype, size: tuple[int, int], count: int
) -> None:
    pipeline, prompts = build(dtype), PROMPTS[:count] if count == 2 else PROMPTS[1:]
    pipeline.text_encoder.encode(prompts)  # reads the head of the conversation, which is kept
    with Live() as encoding:
        text = pipeline.encode(prompts)
    load = Workload(size, 4, count, text.mask.shape[1], steps=3, guided=False)
    x = torch.randn(count, 8, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(0))
    with pipeline._precomputed_modulation(torch.ones(1)), torch.no_grad(), Live() as denoising:
        pipeline.backbone(x, torch.ones(count), text)
    with Live() as decoding:
        pipeline.decode(x)
    table = 3 * sum(m.out_features for m in pipeline.backbone.modulations()) * dtype.itemsize
    assert denoising.peak < pipeline.backbone.activation_bytes(load) - table < 1.3 * denoising.peak
    assert decoding.peak < pipeline.vae.activation_bytes(load) < 1.25 * decoding.peak
    if count == 1:  # prompts are encoded one by one when pictures are drawn
        assert encoding.peak < pipeline.text_encoder.activation_bytes(load) < 3 * encoding.peak


def test_the_table_of_modulation_is_as_large_as_estimated() -> None:
    pipeline = build(torch.bfloat16)
    draw(pipeline)
    held = sum(m.table.numel() * m.table.element_size() for m in pipeline.backbone.modulations())
    sizes = [pipeline.backbone.activation_bytes(Workload((32, 48), 4, 1, 10, steps)) for steps in (0, 3)]
    assert sizes[1] - sizes[0] == held


@pytest.mark.parametrize(("size", "count"), [((16, 24), 1), ((64, 96), 1), ((64, 48), 2)])
def test_both_branches_of_guidance_in_one_call_are_in_the_estimate(size: tuple[int, int], count: int) -> None:
    pipeline = build()
    text = pipeline.encode(PROMPTS[-count:])
    x = torch.randn(count, 8, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(0))
    nothing = TextFeatures.empty(count, text.features.shape[1], text.features.shape[3], text.features)
    load = Workload(size, 4, count, text.mask.shape[1], steps=0)
    both = TextFeatures.cat([nothing, text])
    with pipeline._precomputed_modulation(torch.ones(1)), torch.no_grad(), Live() as live:
        pipeline.backbone(torch.cat([x, x]), torch.ones(2 * count), both)
    assert live.peak < pipeline.backbone.activation_bytes(load) < 1.5 * live.peak


def test_a_large_batch_is_estimated_as_one_branch_after_the_other() -> None:
    backbone = build().backbone
    side = math.isqrt(TOGETHER)
    small, large = (
        {
            guided: backbone.activation_bytes(Workload((4 * side, 4 * (side + more)), 4, 1, 10, 0, guided))
            for guided in (True, False)
        }
        for more in (0, 1)
    )
    assert 1.9 < small[True] / small[False] < 2 and large[True] == large[False]


def test_an_error_in_a_callback_leaves_no_weights_on_the_accelerator() -> None:
    pipeline, meter = build(), Meter()
    pipeline.offload("model", accelerator=meter)
    with pytest.raises(ZeroDivisionError) as caught:
        draw(pipeline, callback_on_step_end=lambda *_: 1 / 0)
    assert caught.tb and not meter.held  # the traceback lives, and with it every frame


def test_a_walk_that_is_left_behind_moves_nothing_when_another_plan_is_at_work() -> None:
    pipeline, meter = build(), Meter()
    pipeline.offload("model", accelerator=meter)
    walk = pipeline.sample(pipeline.encode(PROMPTS), pipeline.noise([torch.Generator()] * 2, (4, 6)), 3, 1.0)
    next(walk)
    pipeline.offload("none", accelerator=meter)
    walk.close()
    assert all(meter.has(p) for part in PHASES for p in getattr(pipeline, part).parameters())


@pytest.mark.parametrize("plan", PLANS)
def test_loras_cannot_change_while_weights_are_away_from_the_host(plan: str, tmp_path: Any) -> None:
    from lens_core.checkpoints.tensor_files import save_tensors

    low = {f"transformer.transformer_blocks.0.attn.img_qkv.lora_{k}.weight": torch.ones(*shape)
           for k, shape in (("A", (2, 32)), ("B", (96, 2)))}  # fmt: skip
    save_tensors(tmp_path / "a.safetensors", low)
    pipeline, failed = build(), []
    pipeline.offload(plan, accelerator=Meter())

    def load(*_: Any) -> None:
        try:
            pipeline.load_lora_weights(tmp_path / "a.safetensors")
        except ConfigError as error:
            failed.append(str(error))

    changed = draw(pipeline, num_inference_steps=2, callback_on_step_end=load)
    away = PLANS[plan]["backbone"] != "stays"
    assert len(failed) == (2 if away else 0) and all(plan in problem for problem in failed)
    assert len(pipeline.loras) == (0 if away else 2)
    assert torch.equal(changed, draw(build(), num_inference_steps=2)) == away


def test_a_copy_that_is_interrupted_is_waited_for_before_its_memory_goes() -> None:
    class Interrupted(Meter):
        def copy(self, to: Tensor, host: Tensor, after: Any) -> int:
            super().copy(to, host, after)
            raise KeyboardInterrupt

    meter, tensors = Interrupted(late=True), [torch.ones(4)]
    group = offload.TensorGroup(tensors, meter)
    with pytest.raises(KeyboardInterrupt):
        group.enter()
    assert not meter.queue and not meter.held and torch.equal(tensors[0], torch.ones(4))


@pytest.mark.parametrize("plan", ["modulation", "encoder-cpu", "none"])
def test_a_plan_that_runs_out_of_memory_leaves_everything_on_the_host(plan: str) -> None:
    class Full(Meter):
        def put(self, tensor: Tensor) -> Tensor:
            if self.held > 40_000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().put(tensor)

    pipeline, meter, moves = build(), Meter(), []
    latents = draw(pipeline)
    pipeline.offload("block", accelerator=meter)
    vae = pipeline.vae
    vae.to = lambda *args, **kwargs: moves.append(kwargs["device"]) or nn.Module.to(vae, *args, **kwargs)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.offload(plan, accelerator=Full())
    assert not meter.held and pipeline.offload_manager is None and pipeline.device.type == "cpu"
    assert moves == [torch.device("cpu")]
    assert not any(block._forward_hooks for block in pipeline.backbone.transformer_blocks)
    assert torch.equal(draw(pipeline), latents)


def fail_at(module: nn.Module, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `module` not move, once all before it has moved."""

    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "_apply", full)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("no memory.\nmore"), "does not fit on meta, and stays as it was: no memory.;"),
        (KeyboardInterrupt(), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_move_that_ends_half_way_leaves_every_weight_where_it_was(
    error: BaseException, says: str | None, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build()
    latents, before = draw(pipeline), [t.data_ptr() for net in pipeline.present().values() for t in net.parameters()]
    with monkeypatch.context() as patch:
        fail_at(pipeline.backbone.transformer_blocks[2], patch, error)
        with pytest.raises(LensError if says else KeyboardInterrupt, match=says):
            pipeline.to("meta", dtype)
    assert pipeline.device.type == "cpu" and pipeline.dtype == "float32"
    assert [t.data_ptr() for net in pipeline.present().values() for t in net.parameters()] == before
    assert torch.equal(draw(pipeline), latents)
    pipeline.to(dtype=torch.bfloat16)


def test_a_cast_that_ends_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build(torch.bfloat16)
    latents = draw(pipeline)
    with monkeypatch.context() as patch:
        fail_at(pipeline.vae, patch, torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(LensError, match="its device"):
            pipeline.to(torch.float32)
    assert torch.equal(draw(pipeline), latents)


def test_under_a_plan_a_move_that_ends_half_way_leaves_everything_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, meter = build(), Meter()
    latents = draw(pipeline)
    pipeline.offload("modulation", accelerator=meter)
    to, calls_of_to = type(pipeline).to, []
    monkeypatch.setattr(type(pipeline), "to", lambda self, *a, **k: (calls_of_to.append(a), to(self, *a, **k))[1])
    with monkeypatch.context() as patch:
        calls = iter([torch.OutOfMemoryError("CUDA out of memory"), None])
        apply = pipeline.backbone._apply

        def once(*args: Any, **kwargs: Any) -> Any:
            if (error := next(calls)) is not None:
                raise error
            return apply(*args, **kwargs)

        patch.setattr(pipeline.backbone, "_apply", once)
        with pytest.raises(LensError, match="does not fit on meta"):
            pipeline.to("meta")
    assert calls_of_to == [("meta",), ("cpu",)] and pipeline.offload_manager is None and pipeline.device.type == "cpu"
    assert torch.equal(draw(pipeline), latents)


def test_a_part_that_does_not_fit_when_it_is_first_used_can_be_used_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", device="cpu")
    pipeline.defer(["vae"])
    with monkeypatch.context() as patch:
        fail_at(Flux2VAE, patch, torch.OutOfMemoryError("CUDA out of memory"))  # type: ignore[arg-type]  # for all
        with pytest.raises(LensError, match="does not fit on cpu"):
            _ = pipeline.vae
        assert "vae" in pipeline.store.deferred and "vae" not in pipeline.present()
    assert isinstance(pipeline.vae, Flux2VAE)


def test_blocks_that_are_compiled_do_not_compile_how_they_are_streamed() -> None:
    """Traced, the hooks would be compiled anew for every block, and torch would give up after eight."""
    counts: list[tuple[int, int]] = []
    for plan in ("none", "block"):
        torch._dynamo.reset()
        graphs, calls = [], []

        def backend(graph: Any, _: Any, graphs: list[Any] = graphs, calls: list[Any] = calls) -> Any:
            graphs.append(graph)
            return lambda *inputs: (calls.append(1), graph(*inputs))[1]

        pipeline = build()
        pipeline.backbone.compile_repeated_blocks(backend=backend, dynamic=False)
        pipeline.offload(plan, accelerator=Meter(True))
        torch.testing.assert_close(draw(pipeline), draw(build()), rtol=1e-4, atol=1e-4)
        counts.append((len(graphs), len(calls)))
    assert counts[0] == counts[1] and counts[0][1] >= 5 * CALL["num_inference_steps"]


def test_weights_that_an_encoder_reads_later_are_under_the_plan() -> None:
    pipeline, meter = build(), Meter()
    encoder = pipeline.text_encoder

    def complete(chats: Any, most: int) -> list[str]:
        encoder.later = nn.Linear(8, 8)
        for p in encoder.later.parameters():
            p.data = meter.put(p.data)
        return ["a"]

    encoder.complete = complete
    pipeline.offload("model", accelerator=meter)
    assert pipeline.complete([[]], 1) == ["a"]
    assert not meter.held and not meter.has(encoder.later.weight)
    with pipeline._at_work("text_encoder"):
        assert meter.has(encoder.later.weight)


class FakeStream:
    """What an accelerator asks of a CUDA stream, in the order in which it asks."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for all of {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda with streams that write down what is asked of them; the current device is 3."""
    import contextlib

    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(f"side {device}", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(f"main {device}", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return log


def test_a_copy_waits_for_the_readers_of_its_memory_and_is_waited_for(streams: list[str]) -> None:
    accelerator = Accelerator(torch.device("cuda:1"))
    to, host = torch.zeros(4), torch.ones(4)
    accelerator.wait(accelerator.copy(to, host, accelerator.mark()))
    assert torch.equal(to, host) and streams == [
        "main cuda:1 records", "side cuda:1 waits for event of main cuda:1", "side cuda:1 records",
        "main cuda:1 waits for event of side cuda:1",
    ]  # fmt: skip
    accelerator.join()
    accelerator.settle()
    assert streams[4:] == ["main cuda:1 waits for all of side cuda:1", "host waits for side cuda:1"]


def test_an_accelerator_stays_on_the_device_that_was_current(
    streams: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    accelerator.mark()
    assert accelerator.device == torch.device("cuda:3") and streams == ["main cuda:3 records"]


def test_only_what_is_on_the_same_device_is_given_back(streams: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight:
        def __init__(self, device: str) -> None:
            self.device, self.data = torch.device(device), self

        def numel(self) -> int:
            return 10

        def element_size(self) -> int:
            return 2

    class Part:
        def __init__(self, *weights: Weight) -> None:
            self.parameters, self.buffers = lambda: iter(weights), lambda: iter(())

    accelerator: Any = Accelerator(torch.device("cuda:1"))
    accelerator.free, accelerator.put = lambda: 100, lambda tensor: tensor
    modules = {"backbone": Part(Weight("cuda:0"), Weight("cuda:1"), Weight("cpu"))}
    assert offload.OffloadManager("none", modules, Workload(), accelerator).free == 120
