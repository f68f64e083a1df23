"""Packed batches: samples of any sizes in one pass are the samples one by one, and none notices another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lens_mmdit import segments
from lens_mmdit.attention import attention
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.segments import Segments, expand_to_tokens, segmented_attention
from test_mmdit_model import distance, model
from torch import Tensor, nn

from lens_core.types import ConfigError, TextFeatures

SIZES = [(4, 4), (3, 5), (4, 4), (2, 1), (5, 2)]  # latent cells; the first and the third are of one shape
WORDS = [5, 0, 5, 7, 3]  # tokens that count


def samples(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, TextFeatures]:
    rng = torch.Generator().manual_seed(2)
    xs = [torch.randn(8, *size, generator=rng, dtype=torch.float64).to(dtype) for size in SIZES]
    features = 100 * torch.randn(5, 2, 7, 12, generator=rng, dtype=torch.float64).to(dtype)
    mask = torch.arange(7) < torch.tensor(WORDS)[:, None]
    return xs, torch.rand(5, generator=rng), TextFeatures(features, mask)


def alone(net: LensTransformer2DModel, xs: list[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
    return [net(x[None], t[i : i + 1], text[i : i + 1])[0] for i, x in enumerate(xs)]


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_packed_pass_is_the_samples_one_by_one(dtype: torch.dtype, near: float) -> None:
    net, batch = model(dtype), samples(dtype)
    for got, want in zip(net.packed(*batch), alone(net, *batch), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert distance(got, want) < near


@torch.no_grad()
def test_a_hole_in_the_text_and_what_stands_in_it_do_not_matter() -> None:
    net, (xs, t, text) = model(torch.float64), samples(torch.float64)
    text.mask[0, 1] = False
    want = alone(net, xs, t, text)
    text.features[~text.mask[:, None].expand(-1, 2, -1)] = math.nan
    for got, single in zip(net.packed(xs, t, text), want, strict=True):
        assert distance(got, single) < 1e-12


@torch.no_grad()
def test_without_any_text_no_text_stream_runs() -> None:
    net, (xs, t, _) = model(), samples()
    empty = TextFeatures.empty(5, 2, 12, like=xs[0])
    want = alone(net, xs, t, empty)
    for name, p in net.named_parameters():
        if "txt" in name or "added" in name or "to_add_out" in name:
            p.fill_(math.nan)
    for got, single in zip(net.packed(xs, t, empty), want, strict=True):
        assert distance(got, single) < 1e-6


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_gradients_of_a_mean_over_samples_are_those_of_its_buckets(dtype: torch.dtype, near: float) -> None:
    net, (xs, t, text) = model(dtype), samples(dtype)
    got = gradients(net, torch.stack([v.square().mean() for v in net.packed(xs, t, text)]).mean())
    buckets: Any = 0
    for size in dict.fromkeys(SIZES):
        rows = [i for i, other in enumerate(SIZES) if other == size]
        v = net(torch.stack([xs[i] for i in rows]), t[rows], TextFeatures(text.features[rows], text.mask[rows]))
        buckets = buckets + v.square().mean() * len(rows) / len(xs)
    want = gradients(net, buckets)
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert distance(grad, want[name]) < near, name


def test_no_sample_notices_another() -> None:
    net, (xs, t, text) = model(), samples()
    with torch.no_grad():
        before = net.packed(xs, t, text)
        for changed in range(5):
            noise, later, louder = [x.clone() for x in xs], t.clone(), text.features.clone()
            noise[changed] += 1
            later[changed] = 1 - later[changed]
            louder[changed] *= -3
            after = net.packed(noise, later, TextFeatures(louder, text.mask))
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [i != changed for i in range(5)]


def test_the_gradient_of_one_sample_reaches_no_other() -> None:
    net, (xs, t, text) = model(), samples()
    for x in xs:
        x.requires_grad_()
    net.packed(xs, t, text)[2].square().sum().backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in xs] == [False, False, True, False, False]


def test_checkpointing_and_autocast_are_as_in_a_plain_pass() -> None:
    net, batch = model(), samples()

    def loss() -> Tensor:
        return torch.stack([v.square().mean() for v in net.packed(*batch)]).mean()

    want = gradients(net, loss())
    net.enable_gradient_checkpointing()
    got = gradients(net, loss())
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in got)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for half, full in zip(net.packed(*batch), alone(net, *batch), strict=True):
            assert half.dtype == torch.float32 and 0 < distance(half, full) < 0.03


def test_spreading_is_exact_both_ways() -> None:
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    to = torch.tensor([0, 0, 2, 1, 2])
    assert torch.equal(expand_to_tokens(rows, to)[0], rows[to]) and torch.equal(
        expand_to_tokens(rows, None)[:, 0], rows
    )
    assert torch.autograd.gradcheck(lambda r: expand_to_tokens(r, to), (rows,))


def kernel(calls: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """What a fused kernel computes, one sequence after the other, with the bounds that it is told."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, to_q: Tensor, to_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
        assert to_q.dtype == to_k.dtype == torch.int32 and (int(to_q[-1]), int(to_k[-1])) == (len(q), len(k))
        assert (longest_q, longest_k) == (int(to_q.diff().max()), int(to_k.diff().max()))
        calls.append((len(q), len(k)))
        out = []
        for i in range(len(to_q) - 1):
            a, b = slice(to_q[i], to_q[i + 1]), slice(to_k[i], to_k[i + 1])
            out.append(nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[a], k[b], v[b]))))
        return torch.cat(out, 1).transpose(0, 1)

    return varlen


def test_one_call_of_a_fused_kernel_is_attention_shape_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch, calls = model(torch.float64), samples(torch.float64), list[tuple[int, int]]()
    want = gradients(net, torch.stack([v.square().mean() for v in net.packed(*batch)]).mean())
    monkeypatch.setattr(segments, "varlen_kernel", lambda q: kernel(calls))
    got = gradients(net, torch.stack([v.square().mean() for v in net.packed(*batch)]).mean())
    tokens = sum(h * w for h, w in SIZES)
    assert calls == [(tokens + 20, tokens + 20)] * 2 + [(tokens, tokens + 20)]  # nobody reads the last text
    assert all(distance(got[k], want[k]) < 1e-12 for k in want)


def test_equal_shapes_are_attended_to_in_one_call() -> None:
    where = Segments.from_lengths([16, 15, 16], [5, 0, 5], torch.device("cpu"))
    assert where.samples_by_shape() == {(16, 5): [0, 2], (15, 0): [1]}
    q = torch.randn(1, 57, 2, 4, generator=torch.Generator().manual_seed(0))
    shapes = []

    def seen(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return attention(q, k, v, mask)

    assert segmented_attention(q, q, q, where, seen).shape == q.shape
    assert shapes == [((2, 2, 21, 4), (2, 2, 21, 4)), ((1, 2, 15, 4), (1, 2, 15, 4))]


def test_a_cpu_and_float32_have_no_fused_kernel() -> None:
    assert segments.varlen_kernel(torch.zeros(1, 2, 4, dtype=torch.bfloat16)) is None


def test_samples_without_a_time_or_a_text_are_refused() -> None:
    xs, t, text = samples()
    with pytest.raises(ConfigError, match="5 samples with 4 times and 5 texts"):
        model().packed(xs, t[:4], text)
    with pytest.raises(ConfigError, match="pair it with the text encoder"):
        model().packed(xs, t, TextFeatures(text.features[:, :1], text.mask))
    with pytest.raises(ConfigError, match="the latents have 7 channels, but it reads 8; pair it with the VAE"):
        model().packed([*xs[:4], xs[4][:7]], t, text)
