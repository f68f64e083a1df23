"""Kernels and parts on a GPU: attention, modulation, compilation, experts, offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.experts import pack
from lens_gpt_oss.template import train_tokenizer
from lens_mmdit.attention import attention
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.segments import Segments, segmented_attention, varlen_kernel
from lens_tools.gpu_latency import randomise, shared_copy
from lens_tools.plain_port import PlainPort, guided_batch
from torch import Tensor, nn

from lens_core import LensPipeline, flow
from lens_core.inference.guidance import guided_velocity
from lens_core.inference.offload_plans import PLANS, Workload
from lens_core.types import NumericalError, TextFeatures

HALF = torch.bfloat16


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm())


def backbone(device: torch.device, dtype: torch.dtype = torch.float32, width: int = 2) -> Any:
    net = LensTransformer2DModel(num_layers=3, num_attention_heads=width, enc_hidden_dim=48)
    randomise(net, torch.Generator().manual_seed(0))
    return net.to(device, dtype).eval().requires_grad_(False)


def samples(device: torch.device) -> tuple[list[Tensor], Tensor, TextFeatures]:
    rng = torch.Generator().manual_seed(1)
    xs = [torch.randn(128, *size, generator=rng).to(device) for size in ((8, 8), (4, 12), (8, 8), (6, 2))]
    host = torch.arange(40) < torch.tensor([40, 0, 13, 7])[:, None]
    features = torch.randn(4, 4, 40, 48, generator=rng)
    return xs, torch.rand(4, generator=rng).to(device), TextFeatures(features.to(device), host.to(device), host)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (HALF, 2e-2)])
def test_packed_attention_is_attention_within_each_sample(
    dtype: torch.dtype, near: float, device: torch.device
) -> None:
    images, texts, rng = (64, 48, 200), (5, 0, 77), torch.Generator().manual_seed(0)
    segments = Segments.from_lengths(images, texts, device)
    total = sum(images) + sum(texts)
    q, k, v = (torch.randn(1, total, 4, 64, generator=rng).to(device, dtype).requires_grad_() for _ in range(3))
    out = segmented_attention(q, k, v, segments, attention)
    assert (varlen_kernel(q[0]) is not None) == (device.type == "cuda" and dtype == HALF)
    weight = torch.randn(out.shape, generator=rng).to(device, dtype)
    got = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
    owner = torch.cat([segments.image_samples, segments.text_samples])
    mask = owner[:, None] == owner[None, :]
    wide = [z.detach().float().requires_grad_() for z in (q, k, v)]
    qkv = [z.transpose(1, 2) for z in wide]
    scores = (qkv[0] @ qkv[1].transpose(-1, -2) / 8).masked_fill(~mask, -torch.inf)
    plain = (scores.softmax(-1) @ qkv[2]).transpose(1, 2)
    want = [plain, *torch.autograd.grad((plain * weight.float()).sum(), wide)]
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < near


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (HALF, 3e-2)])
def test_a_packed_pass_is_the_samples_one_by_one(dtype: torch.dtype, near: float, device: torch.device) -> None:
    net, (xs, t, text) = backbone(device, dtype), samples(device)
    packed = net.packed(xs, t, text)
    for i, x in enumerate(xs):
        assert distance(packed[i], net(x[None], t[i : i + 1], text[i : i + 1])[0]) < near


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (HALF, 5e-2)])
def test_a_guided_velocity_is_that_of_the_padded_port(dtype: torch.dtype, near: float, device: torch.device) -> None:
    net, (xs, _, text) = backbone(device, dtype), samples(device)
    x = xs[0][None]
    t, one = flow.at(0.6, x), text[0:1]
    got = guided_velocity(net, one, None, 4.0)(x, t)
    uncond, cond = PlainPort(backbone(device))(*guided_batch(x, t, one)).chunk(2)
    assert distance(got, flow.guide(cond, uncond, 4.0)) < near


def test_a_gpu_computes_what_a_cpu_does(device: torch.device) -> None:
    (xs, t, text), (host_xs, host_t, host_text) = samples(device), samples(torch.device("cpu"))
    got = backbone(device).packed(xs, t, text)
    want = backbone(torch.device("cpu")).packed(host_xs, host_t, host_text)
    assert all(distance(a, b) < 1e-4 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_table_of_modulation_gives_the_plain_velocity(dtype: torch.dtype, device: torch.device) -> None:
    net, (xs, _, text) = backbone(device, dtype), samples(device)
    x = xs[0][None]
    for time in (1.0, 0.3):
        want = net(x, flow.at(time, x), text[0:1])
        with net.precomputed(torch.tensor([1.0, 0.3])), torch.no_grad():
            got = net(x, flow.at(time, x), text[0:1])
        assert distance(got, want) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_compiled_blocks_give_the_eager_velocity(device: torch.device) -> None:
    net, (xs, _, text) = backbone(device, HALF), samples(device)
    compiled: Any = shared_copy(net)
    compiled.compile_repeated_blocks(dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
    x = xs[0][None]
    t = flow.at(0.6, x)
    wide = guided_velocity(backbone(device), text[0:1], None, 4.0)(x, t)
    with torch.no_grad():
        far = [distance(guided_velocity(n, text[0:1], None, 4.0)(x, t), wide) for n in (net, compiled)]
    assert far[1] < 1.25 * far[0] + 1e-3


def test_a_compiled_step_has_the_eager_gradient(device: torch.device) -> None:
    grads = []
    for compile_it in (False, True):
        net, (xs, t, text) = backbone(device).train().requires_grad_(True), samples(device)
        if compile_it:
            net.compile_repeated_blocks(backend="inductor" if device.type == "cuda" else "eager")
        with torch.autocast(device.type, HALF):
            loss = torch.stack([v.float().square().mean() for v in net.packed(xs, t, text)]).mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert distance(grads[1], grads[0]) < 5e-2


def test_a_gradient_in_bfloat16_is_near_that_in_float32(device: torch.device) -> None:
    grads = []
    for half in (False, True):
        net, (xs, t, text) = backbone(device).train().requires_grad_(True), samples(device)
        with torch.autocast(device.type, HALF, enabled=half):
            loss = torch.stack([v.float().square().mean() for v in net.packed(xs, t, text)]).mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert distance(grads[1], grads[0]) < 5e-2


def test_autocast_to_float16_is_refused(device: torch.device) -> None:
    net, (xs, t, text) = backbone(device), samples(device)
    with torch.autocast(device.type, torch.float16), pytest.raises(NumericalError, match="float16"):
        net(xs[0][None], t[:1], text[0:1])


def encoder(device: torch.device, dtype: torch.dtype) -> GptOssEncoder:
    config = GptOssEncoder.Config(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, selected_layers=(0, 1, 2, 3),
    )  # fmt: skip
    torch.manual_seed(0)
    built = GptOssEncoder(config).eval().requires_grad_(False)
    for p in built.parameters():
        nn.init.normal_(p, std=0.2)
    built.tokenizer = train_tokenizer(PROMPTS, 400)
    return built.to(device, dtype)


PROMPTS = ["a red circle", "two blue squares stand left of a small green star"]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (HALF, 5e-2)])
def test_an_encoder_reads_as_on_a_cpu(dtype: torch.dtype, near: float, device: torch.device) -> None:
    got, want = encoder(device, dtype).encode(PROMPTS), encoder(torch.device("cpu"), torch.float32).encode(PROMPTS)
    assert torch.equal(got.mask.cpu(), want.mask)
    assert distance(got.features, want.features) < near


def test_experts_in_4_bits_give_what_their_plain_weights_give(device: torch.device) -> None:
    packed = encoder(device, HALF)
    rng = torch.Generator().manual_seed(2)
    plain = encoder(device, HALF)
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            pack(layer.mlp.experts, name, "mxfp4")
            blocks = getattr(layer.mlp.experts, f"{name}_blocks")
            scales = getattr(layer.mlp.experts, f"{name}_scales")
            blocks.copy_(torch.randint(0, 256, blocks.shape, generator=rng, dtype=torch.uint8))
            scales.copy_(torch.randint(122, 126, scales.shape, generator=rng, dtype=torch.uint8))
            held = getattr(layer.mlp.experts, name)
            weight = torch.stack([held[i] for i in range(4)])
            assert weight.device.type == device.type and weight.dtype == HALF
            getattr(other.mlp.experts, name).data.copy_(weight)
    assert distance(packed.encode(PROMPTS).features, plain.encode(PROMPTS).features) < 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_of_a_plan_is_about_its_forecast(plan: str, device: torch.device) -> None:
    """Weights are exact, what is beside them is estimated; the reserve that `auto` keeps must cover the difference."""
    pipeline = LensPipeline.from_pretrained("tiny:", dtype=torch.bfloat16, device="cpu")
    layers, width = pipeline.text_encoder.layers, pipeline.text_encoder.width
    pipeline.put(
        "backbone",
        LensTransformer2DModel(
            in_channels=pipeline.vae.channels, out_channels=pipeline.vae.channels // 4, num_layers=6,
            num_attention_heads=8, enc_hidden_dim=width, selected_layer_index=tuple(range(layers)),
        ).to(HALF).eval(),
    )  # fmt: skip
    size = (256, 256) if device.type == "cuda" else (64, 64)
    estimate = pipeline.offload(plan, device, workload=Workload(size, pipeline.vae.downscale, 1, 40, 3))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    pipeline("a red circle", height=size[0], width=size[1], num_inference_steps=3, seed=0, output_type="pt")
    if device.type == "cuda":
        stays = sum(
            t.nbytes for net in pipeline.present().values() for t in (*net.parameters(), *net.buffers()) if t.is_cuda
        )
        peak = torch.cuda.max_memory_allocated() - before + stays
        assert peak <= estimate.peak + (128 << 20)
