"""The backbone against its plain transcription, and what it promises about text, precision and files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mmdit_oracle
import pytest
import torch
from lens_flow.euler import Euler
from lens_mmdit.attention import attention
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.norms import rms_norm
from lens_mmdit.rope import rotations
from packaging.version import Version
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lens_core.inference.pipeline import LensPipeline
from lens_core.testing import check_backbone
from lens_core.types import CheckpointError, ConfigError, NumericalError, TextFeatures

Config = LensTransformer2DModel.Config
TINY = Config(
    in_channels=8,
    out_channels=2,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    enc_hidden_dim=12,
    axes_dims_rope=(4, 6, 6),
    selected_layer_index=(1, 3),
)


def model(dtype: torch.dtype = torch.float32, config: Any = TINY) -> LensTransformer2DModel:
    """A model whose every parameter counts: none is 0 or 1."""
    net = LensTransformer2DModel(config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5))
            p.add_(1 if p.ndim == 1 else 0)
    return net.to(dtype)


def inputs(
    batch: int = 2, h: int = 4, w: int = 4, tokens: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, TextFeatures]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 8, h, w, generator=rng, dtype=torch.float64).to(dtype)
    t = torch.rand(batch, generator=rng)
    features = 100 * torch.randn(batch, 2, tokens, 12, generator=rng, dtype=torch.float64).to(dtype)
    return x, t, TextFeatures(features, torch.ones(batch, tokens, dtype=torch.bool))


def transcribed(net: LensTransformer2DModel, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
    return mmdit_oracle.oracle(net.state_dict(), TINY, x, t, text.features, text.mask)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_published_config_has_the_published_tensors() -> None:
    with torch.device("meta"):
        net = LensTransformer2DModel(Config())
    d, e = 1536, 2880

    def dense(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    want: dict[str, tuple[int, ...]] = dense("img_in", d, 128) | dense("txt_in", d, 4 * e)
    want |= {f"txt_norm.{i}.weight": (e,) for i in range(4)}
    want |= dense("time_text_embed.timestep_embedder.linear_1", d, 256)
    want |= dense("time_text_embed.timestep_embedder.linear_2", d, d)
    for n in range(48):
        b = f"transformer_blocks.{n}"
        for s in ("img", "txt"):
            want |= dense(f"{b}.{s}_mod.1", 6 * d, d) | dense(f"{b}.attn.{s}_qkv", 3 * d, d)
            want |= {f"{b}.{s}_norm1.weight": (d,), f"{b}.{s}_norm2.weight": (d,)}
            want |= {f"{b}.{s}_mlp.w1.weight": (4096, d), f"{b}.{s}_mlp.w3.weight": (4096, d)}
            want |= {f"{b}.{s}_mlp.w2.weight": (d, 4096)}
        want |= {f"{b}.attn.{s}.weight": (64,) for s in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
        want |= dense(f"{b}.attn.to_out.0", d, d) | dense(f"{b}.attn.to_add_out", d, d)
    want |= dense("norm_out.linear", 2 * d, d) | dense("proj_out", 128, d)

    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == want
    assert len(want) == 1264
    assert round(sum(math.prod(s) for s in want.values()) / 1e9, 3) == 4.104


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
@pytest.mark.parametrize(("batch", "h", "w", "tokens"), [(1, 4, 4, 5), (2, 3, 5, 1), (3, 5, 2, 7), (2, 1, 6, 3)])
def test_it_equals_the_plain_transcription(
    dtype: torch.dtype, near: float, batch: int, h: int, w: int, tokens: int
) -> None:
    net, (x, t, text) = model(dtype), inputs(batch, h, w, tokens, dtype)
    text.mask[-1, (tokens + 1) // 2 :] = False
    with torch.no_grad():
        assert distance(net(x, t, text), transcribed(net, x, t, text)) < near


def test_twenty_guided_steps_stay_with_a_plain_double_precision_loop() -> None:
    net, (noise, _, text) = model(), inputs(h=4, w=6, tokens=5)
    text.mask[1, 3:] = False
    pipeline = LensPipeline(backbone=net, sampler=Euler(Euler.Config()))
    *_, (end, ours) = pipeline.sample(text, noise, 20, 5.0)

    twin, x, tokens = model(torch.float64), noise.double(), 4 * 6
    at_10, at_200 = 8.73809524e-5 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    shift = math.exp(at_10 + (at_200 - at_10) * (20 - 10) / 190)
    times = [shift / (shift + 1 / (1 - n / 20) - 1) for n in range(20)] + [0.0]
    for t, after in pairwise(times):
        now = torch.full((2,), t)
        cond = transcribed(twin, x, now, text)
        blind = transcribed(twin, x, now, TextFeatures(text.features.double(), torch.zeros_like(text.mask)))
        guided = blind + 5 * (cond - blind)
        x = x + (after - t) * guided * cond.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)
    assert end == 0 and distance(ours, x) < 5e-5


def test_its_gradients_equal_those_of_the_plain_transcription() -> None:
    net, (x, t, text) = model(torch.float64), inputs(dtype=torch.float64)
    text.mask[0, 3:] = False
    x.requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)
    weights = dict(zip(names, parameters, strict=True))
    want = torch.autograd.grad(
        mmdit_oracle.oracle(weights, TINY, x, t, text.features, text.mask).square().sum(),
        [x, *parameters],
        allow_unused=True,
    )
    got = torch.autograd.grad(net(x, t, text).square().sum(), [x, *parameters], allow_unused=True)
    for name, a, b in zip(["x", *names], got, want, strict=True):
        if a is None:  # the text stream ends in the last block
            assert name.startswith("transformer_blocks.2.") and (b is None or not b.any()), name
        else:
            assert b is not None and distance(a, b) < 1e-9, name


def test_v_has_the_dtype_of_x() -> None:
    x, t, text = inputs()
    assert model(torch.bfloat16)(x, t, text).dtype == torch.float32


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_in_padding_never_shows(garbage: float) -> None:
    net, (x, t, text) = model(), inputs(tokens=4)
    longer = TextFeatures.cat(
        [text, TextFeatures(text.features.new_zeros(1, 2, 7, 12), torch.zeros(1, 7, dtype=torch.bool))]
    )[:2]
    longer.features[:, :, 4:] = garbage
    longer.mask[1, 6] = True  # keeps the gap inside, so that it is masked and not cut
    longer.features[1, :, 6] = 1.0
    clean = TextFeatures(
        longer.features.nan_to_num(0, 0, 0).masked_fill(~longer.mask[:, None, :, None], 0), longer.mask
    )
    with torch.no_grad():
        assert torch.equal(net(x, t, longer), net(x, t, clean))
        assert distance(net(x[:1], t[:1], longer[:1]), net(x[:1], t[:1], text[:1])) == 0
        assert distance(net(x, t, longer)[:1], net(x[:1], t[:1], text[:1])) < 1e-5


def test_no_text_equals_text_that_is_all_masked_alone_and_beside_other_rows() -> None:
    net, (x, t, text) = model(), inputs()
    empty = TextFeatures.empty(2, 2, 12, like=x)
    masked = TextFeatures(text.features, torch.zeros_like(text.mask))
    mixed = TextFeatures(text.features, text.mask.clone())
    mixed.mask[0] = False
    with torch.no_grad():
        none = net(x, t, empty)
        assert torch.equal(net(x, t, masked), none)
        assert distance(net(x, t, mixed)[0], none[0]) < 1e-6
        assert distance(net(x, t, text), none) > 1e-2


def test_no_text_runs_no_text_stream() -> None:
    net, (x, t, _) = model(), inputs()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "txt" in name or "added" in name or "to_add_out" in name:
                p.fill_(math.nan)
        assert net(x, t, TextFeatures.empty(2, 2, 12, like=x)).isfinite().all()


def test_text_of_another_encoder_is_refused() -> None:
    x, t, text = inputs()
    with pytest.raises(ConfigError, match=r"\[2, 1, 5, 12\], but it reads \[B, 2, T, 12\]"):
        model()(x, t, TextFeatures(text.features[:, :1], text.mask))


def test_float16_is_refused_with_the_reason() -> None:
    x, t, text = inputs()
    assert LensTransformer2DModel.refuses(torch.bfloat16) is None
    with pytest.raises(NumericalError, match="overflow float16; use bfloat16"):
        model(torch.float16)(x, t, text)
    with pytest.raises(NumericalError, match="overflow"), torch.autocast("cpu", torch.float16):
        model()(x, t, text)


def test_bfloat16_and_autocast_stay_close_to_float32() -> None:
    x, t, text = inputs(h=6, w=6)
    net = model()
    with torch.no_grad():
        want = net(x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < distance(net(x, t, text), want) < 0.03
        assert 0 < distance(net.to(torch.bfloat16)(x, t, text), want) < 0.03


def test_a_new_model_predicts_zero_and_every_block_is_the_identity() -> None:
    x, t, text = inputs()
    net = LensTransformer2DModel(TINY)
    assert not net(x, t, text).any()
    first, last = net.features(x, t, text, [0, 2])
    assert torch.equal(first, last)


def test_features_are_the_image_stream_after_the_named_blocks() -> None:
    net, (x, t, text) = model(), inputs(h=3, w=5)
    with torch.no_grad():
        last, first = net.features(x, t, text, [2, 0])
        assert first.shape == last.shape == (2, 32, 3, 5)
        time = torch.nn.functional.silu(net.time_text_embed(t))
        v = net.proj_out(net.norm_out(last.flatten(2).transpose(1, 2), time))
        assert distance(v.transpose(1, 2).unflatten(2, (3, 5)), net(x, t, text)) < 1e-6
        net.transformer_blocks[1].img_mod[1].bias.fill_(math.nan)
        assert torch.equal(net.features(x, t, text, [0])[0], first)
    with pytest.raises(ConfigError, match=r"cannot tap blocks \[3\]; name some of 0 ... 2"):
        net.features(x, t, text, [3])


def test_gradient_checkpointing_changes_nothing() -> None:
    net, (x, t, text) = model(), inputs()
    net(x, t, text).square().sum().backward()
    want = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    net.enable_gradient_checkpointing()
    calls = []
    hook = net.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    net(x, t, text).square().sum().backward()
    hook.remove()
    assert len(calls) == 2
    for name, p in net.named_parameters():
        assert (p.grad is None) == (want[name] is None)
        assert p.grad is None or torch.equal(p.grad, want[name])


def test_training_can_follow_inference_mode_at_the_same_size() -> None:
    rotations.cache_clear()
    net, (x, t, text) = model(), inputs()
    with torch.inference_mode():
        net(x, t, text)
    net(x, t, text).sum().backward()
    assert net.img_in.weight.grad is not None


def test_only_a_new_model_draws_random_numbers_and_it_repeats() -> None:
    torch.manual_seed(5)
    first = LensTransformer2DModel(TINY).state_dict()
    torch.manual_seed(5)
    second = LensTransformer2DModel(TINY).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    net, arguments = model(), inputs()
    before = torch.get_rng_state()
    net(*arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_keeps_the_contract_of_a_backbone() -> None:
    check_backbone(model(), TINY, channels=8, layers=2, width=12)


def test_diffusers_reads_its_files(tmp_path: Path) -> None:
    net, arguments = model(), inputs()
    net.save(tmp_path)
    assert sorted(p.name for p in (tmp_path / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs = LensTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    with torch.no_grad():
        assert torch.equal(theirs(*arguments), net(*arguments))
    with pytest.raises(NumericalError, match="float16"):
        LensTransformer2DModel.load(tmp_path, TINY, torch.float16)
    with pytest.raises(CheckpointError):
        LensTransformer2DModel.load(tmp_path / "elsewhere", TINY)


def test_a_config_comes_back_from_diffusers_form() -> None:
    net = LensTransformer2DModel(TINY)
    assert net.config["inner_dim"] == 32
    again = LensTransformer2DModel.from_config(net.config)
    assert again.config == net.config
    with pytest.raises(ConfigError, match=r"no field is called 'num_layer'\. Did you mean 'num_layers'"):
        LensTransformer2DModel.from_config({"num_layer": 3})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inner_dim": 1024}, "inner_dim is 1024; it must be num_attention_heads"),
        ({"in_channels": 64}, "in_channels is 64; it must be patch_size"),
        ({"axes_dims_rope": (8, 28, 26)}, "axes_dims_rope is .* attention_head_dim = 64"),
        ({"axes_dims_rope": (9, 28, 27)}, "three even numbers"),
        ({"num_layers": 0}, "num_layers: must be at least 1"),
        ({"gate_mlp": False}, "gate_mlp is False; only True"),
        ({"selected_layer_index": ()}, "selected_layer_index: must have at least 1 item"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**fields)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("size", [(4, 4), (3, 7)])
def test_flops_are_those_that_torch_counts(size: tuple[int, int], tokens: int) -> None:
    net = model()
    with FlopCounterMode(display=False) as counter:
        net(*inputs(1, *size, tokens))
    assert net.flops(size, tokens) == counter.get_total_flops()


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """Autocast to bfloat16 on CUDA, for tensors that only claim to lie there."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_keeps_its_dtype_under_cuda_autocast(dtype: torch.dtype, cuda_autocast: None) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda", dtype=dtype)
        if Version(torch.__version__).release >= (2, 13):
            assert torch.nn.functional.rms_norm(x, (8,)).dtype == torch.float32, "which autocast would make of it"
        assert (rms_norm(x, 1e-6).dtype, rms_norm(x, 1e-6).device) == (dtype, x.device)
        assert torch.is_autocast_enabled("cuda")


def test_lists_do_where_a_config_has_tuples() -> None:
    small: Any = {
        "num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 1, "in_channels": 8, "out_channels": 2,
    }  # fmt: skip
    listed, plain = (
        LensTransformer2DModel(**small, enc_hidden_dim=8, axes_dims_rope=axes, selected_layer_index=layers)
        for axes, layers in (([4, 4, 4], [0]), ((4, 4, 4), (0,)))
    )
    listed.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    text = TextFeatures(torch.ones(1, 1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(listed(x, t, text), plain(x, t, text))
    assert hash(LensTransformer2DModel.Config(axes_dims_rope=[8, 28, 28])) == hash(LensTransformer2DModel.Config())


def test_short_sequences_attend_in_training_as_they_do_in_sampling() -> None:
    """Another path is taken where gradients are wanted on a CPU; a hidden key counts in neither."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw, requires_grad=True) for n in (4, 6, 6))
    mask = (torch.rand(2, 1, 1, 6, generator=draw) < 0.6) | (torch.arange(6) == 0)
    assert 0 < int(mask.sum()) < mask.numel()
    learned = attention(q, k, v, mask)
    with torch.no_grad():
        torch.testing.assert_close(learned, attention(q, k, v, mask))
        loud = k.masked_fill(~mask.transpose(-1, -2), 100.0), v.masked_fill(~mask.transpose(-1, -2), 100.0)
        torch.testing.assert_close(learned, attention(q, *loud, mask))
    learned.square().sum().backward()
    assert not k.grad[~mask.expand(2, 3, 1, 6)[:, :, 0]].any() and k.grad.any()


def test_what_is_compiled_rotates_like_what_is_not() -> None:
    from lens_mmdit.norms import RotaryRMSNorm, norm_and_rotate
    from lens_mmdit.rope import rotations

    rng = torch.Generator().manual_seed(3)
    norm = RotaryRMSNorm(12, 1e-6)
    torch.nn.init.normal_(norm.weight, generator=rng)
    rotation = rotations(2, 3, 4, (4, 4, 4), torch.device("cpu"), torch.complex64)
    x = torch.randn(2, 10, 3, 12, generator=rng).requires_grad_()
    weights = torch.randn(2, 10, 3, 12, generator=rng)
    results = []
    for out in (norm(x, rotation), norm_and_rotate(x, norm.weight, rotation, 1e-6)):
        (out * weights).sum().backward()
        results.append((out.detach(), x.grad, norm.weight.grad))
        x.grad = norm.weight.grad = None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_a_gpus_way_to_norm_and_rotate_without_gradient_is_the_other(dtype: torch.dtype, near: float) -> None:
    from lens_mmdit.norms import RotaryRMSNorm, norm_then_rotate

    rng = torch.Generator().manual_seed(0)
    norm = RotaryRMSNorm(64, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=rng)
    x = torch.randn(2, 12, 3, 64, generator=rng, dtype=torch.float64).to(dtype)
    precise = torch.complex128 if dtype == torch.float64 else torch.complex64
    turn = rotations(2, 3, 6, (8, 28, 28), torch.device("cpu"), precise)
    kept = x.clone()
    with torch.no_grad():
        got = norm_then_rotate(x, norm.weight, turn, 1e-6)
        assert got.dtype == dtype and distance(got, norm(x, turn)) < near
    assert torch.equal(x, kept)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("masks", [[[0, 0], [7, 7]], [[0, 0, 0], [3, 7, 0]]], ids=["whole", "padded"])
def test_rows_without_text_before_those_with_it_have_no_text_stream(
    dtype: torch.dtype, near: float, masks: list[list[int]]
) -> None:
    net = model(dtype)
    rng = torch.Generator().manual_seed(3)
    lengths = torch.tensor([*masks[0], *masks[1]])
    count = len(lengths)
    x = torch.randn(count, 8, 3, 5, generator=rng, dtype=torch.float64).to(dtype)
    features = 50 * torch.randn(count, 2, 7, 12, generator=rng, dtype=torch.float64).to(dtype)
    text, t = TextFeatures(features, torch.arange(7) < lengths[:, None]), torch.rand(count, generator=rng)
    got = net(x, t, text)
    for i in range(count):
        assert distance(got[i], net(x[i : i + 1], t[i : i + 1], text[i : i + 1])[0]) < near
    seen: list[int] = []
    hook = net.transformer_blocks[0].attn.txt_qkv.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net(x, t, text)
    hook.remove()
    assert seen == [len(masks[1])]


def test_in_training_every_row_keeps_its_text_stream() -> None:
    net = model()
    text = TextFeatures(torch.randn(2, 2, 7, 12), torch.arange(7) < torch.tensor([[0], [7]]))
    seen: list[int] = []
    net.transformer_blocks[0].attn.txt_qkv.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net(torch.randn(2, 8, 3, 5), torch.rand(2), text)
    assert seen == [2]


@torch.no_grad()
def test_an_accelerator_computes_both_branches_of_guidance_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for it; what one call gives is checked above."""
    from lens_core import flow
    from lens_core.inference import guidance

    net = model().to("meta")
    calls: list[tuple[int, int]] = []
    net.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), len(args[2].known[0]))))
    mask = torch.ones(1, 7, dtype=torch.bool)
    text = TextFeatures(torch.empty(1, 2, 7, 12, device="meta"), mask.to("meta"), mask)
    x = torch.empty(1, 8, 3, 5, device="meta")
    v = guidance.guided_velocity(net, text, None, 5.0)
    assert v(x, flow.at(0.5, x)).shape == x.shape and calls == [(2, 7)]
    assert flow.known(flow.twice(flow.at(0.5, x))) == [0.5, 0.5]
    monkeypatch.setattr(guidance, "TOGETHER", 14)
    v(x, flow.at(0.5, x))
    assert calls[1:] == [(1, 7), (1, 0)]
    guidance.guided_velocity(net, text, text, 5.0)(x, flow.at(0.5, x))
    assert calls[3:] == [(1, 7), (1, 7)]
