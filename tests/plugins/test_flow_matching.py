"""The method flow_matching: what is drawn, what is lost, what is cached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import lens_mmdit
import pytest
import torch
import toy
from attrs import evolve
from lens_flow.matching import EncodedBatch, FlowMatching, TensorCache
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec
from lens_core.testing import check_method
from lens_core.types import Batch, ConfigError, LensError, TextFeatures


class Recorder(nn.Module):
    """A backbone that remembers what it saw, and answers with one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.x, self.t, self.text = x, t, text
        return self.answer.view(1, 2, 1, 1).expand_as(x)


class Averages:
    """A VAE: 4 px cells, two channels."""

    calls, downscale = 0, 4

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls += len(pixels)
        return nn.functional.avg_pool2d(pixels, 4)[:, :2]


class Letters:
    """A text encoder: one token a letter, one feature."""

    calls = 0

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        self.calls += len(prompts)
        longest = max(map(len, prompts))
        codes = torch.tensor([[ord(c) for c in p.ljust(longest, "\0")] for p in prompts]).float()
        return TextFeatures(codes[:, None, :, None], codes > 0)


def method(**config: Any) -> FlowMatching:
    pipeline = SimpleNamespace(vae=Averages(), text_encoder=Letters(), backbone=Recorder())
    return FlowMatching(FlowMatching.Config(**config), pipeline)


def batch(captions: tuple[str, ...] = ("abc", "de"), keys: tuple[int, ...] = (), width: int = 8) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (len(captions), 3, 8, width)
    return Batch(torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw), captions, keys)


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(m: FlowMatching, *batches: Batch) -> list[EncodedBatch]:
    return [micro for step in m.steps(iter(batches), m.trainable_modules(), rng()) for micro in step]


def many(rows: int, h: int = 4, w: int = 4) -> EncodedBatch:
    return EncodedBatch(
        torch.zeros(rows, 2, h, w), TextFeatures(torch.ones(rows, 1, 1, 1), torch.ones(rows, 1, dtype=torch.bool))
    )


def test_a_step_holds_the_latents_and_the_texts_of_its_batch():
    m = method()
    (sample,) = encoded(m, batch())
    torch.testing.assert_close(sample.z, Averages().encode(batch().images / 127.5 - 1))
    assert sample.text.mask.tolist() == [[True, True, True], [True, True, False]]
    assert not sample.z.requires_grad


@pytest.mark.parametrize("cache", [False, True])
def test_it_keeps_the_contract_of_a_method(cache):
    made = partial(method, cache_latents=cache, cache_texts=cache)
    check_method(made, [batch(keys=(5, 6)), batch(("gh", "abc"), (7, 8)), batch(keys=(5, 6))])


SMALL = {"in_channels": 4, "out_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
         "axes_dims_rope": [4, 4, 4], "enc_hidden_dim": 8, "selected_layer_index": [0]}  # fmt: skip


def test_the_contract_asks_that_the_backbones_table_of_modulation_follows_each_step(monkeypatch):
    catalog = Catalog.of(toy, lens_mmdit)

    def made() -> FlowMatching:
        pipeline = LensPipeline.from_parts(evolve(toy.PARTS, backbone=ComponentSpec("mmdit", SMALL)), catalog)
        with torch.no_grad():
            for weight in pipeline.backbone.parameters():  # a new one is 0 in many places, and then hides faults
                weight += 0.2 * torch.randn(weight.shape, generator=rng(weight.numel()))
        return FlowMatching(FlowMatching.Config(), pipeline)

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=rng())
    check_method(made, [Batch(images, ("abc", "de"))])
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensors: None)
    with pytest.raises(AssertionError, match="draws with what it kept of earlier weights"):
        check_method(made, [Batch(images, ("abc", "de"))])


def test_the_loss_is_the_mean_squared_error_of_the_velocity():
    m = method(caption_dropout=0.0)
    (sample,) = encoded(m, batch())
    loss = m.loss("backbone", m.trainable_modules(), sample, rng())
    draw = rng()
    t = (1.0 + (4 - 256) / (4096 - 256) * 0.3 + torch.randn(2, generator=draw)).sigmoid()
    noise = torch.randn(2, 2, 2, 2, generator=draw)
    net = m.trainable_modules()["backbone"]
    torch.testing.assert_close(net.t, t)
    torch.testing.assert_close(net.x, torch.stack([(1 - t[i]) * sample.z[i] + t[i] * noise[i] for i in range(2)]))
    v = torch.tensor([0.5, -0.25]).view(2, 1, 1)
    torch.testing.assert_close(loss.total.detach(), ((v - (noise - sample.z)) ** 2).sum() / 16)
    assert torch.equal(loss.parts["loss"], loss.total.detach())
    loss.total.backward()
    assert net.answer.grad.any()


def test_the_true_velocity_has_no_loss():
    m = method()
    (sample,) = encoded(m, batch())
    loss = m.loss("backbone", {"backbone": lambda x, t, text: (x - sample.z) / t.view(-1, 1, 1, 1)}, sample, rng())
    assert float(loss.total) < 1e-9


@pytest.mark.parametrize(("h", "w", "mean"), [(16, 16, 1.0), (32, 32, 1.06), (64, 64, 1.3), (34, 64, 1.15)])
def test_the_mean_of_logit_t_is_the_papers_line_in_the_latent_cells(h, w, mean):
    # A cell is 16 px wide: 256^2 px have 256 cells, 512^2 px 1024 and 1024^2 px 4096.
    assert FlowMatching.Config().logit_mean(h * w) == pytest.approx(mean, abs=1e-12)
    assert mean == pytest.approx(0.98 + 0.3 * h * w / 3840), "the same line, by its value at no cell"


def test_the_median_time_at_512_px_is_the_papers():
    m = method()
    m.loss("backbone", m.trainable_modules(), many(4_000, 32, 32), rng())
    # Half of a logit-normal lies below the sigmoid of its mean.
    assert float(m.trainable_modules()["backbone"].t.median()) == pytest.approx(1 / (1 + math.exp(-1.06)), abs=0.01)


def test_t_is_logit_normal_with_the_shifted_mean():
    m = method(std=0.7, base_tokens=16, base_shift=-0.3, max_tokens=17)
    m.loss("backbone", m.trainable_modules(), many(20_000), rng())
    logit = m.trainable_modules()["backbone"].t.double().logit()
    assert float(logit.mean()) == pytest.approx(-0.3, abs=0.02)
    assert float(logit.std()) == pytest.approx(0.7, abs=0.02)
    # A normal's quartile, not only its moments.
    assert float((logit < -0.3 - 0.7 * 0.6745).double().mean()) == pytest.approx(0.25, abs=0.02)


def test_the_share_of_dropped_captions_is_the_configured_one():
    m = method(caption_dropout=0.3)
    m.loss("backbone", m.trainable_modules(), many(20_000), rng())
    assert 1 - float(m.trainable_modules()["backbone"].text.mask.double().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_dropped_caption_counts_no_token_and_its_padding_is_cut():
    m = method(caption_dropout=0.5)
    (sample,) = encoded(m, batch(("abcdef", "gh")))
    net, lengths = m.trainable_modules()["backbone"], set()
    for seed in range(20):
        m.loss("backbone", m.trainable_modules(), sample, rng(seed))
        counts = net.text.mask.sum(1).tolist()
        assert counts[0] in (0, 6) and counts[1] in (0, 2)
        assert net.text.mask.shape[1] == max(counts) == net.text.features.shape[2]
        lengths.add(max(counts))
    assert lengths == {0, 2, 6}


def test_the_same_generator_gives_the_same_loss():
    m = method()
    (sample,) = encoded(m, batch())
    first, again, other = (m.loss("backbone", m.trainable_modules(), sample, rng(s)).total for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_cached_latents_are_those_that_were_encoded():
    plain, cached = method(), method(cache_latents=True, cache_texts=True)
    for _ in range(2):
        (a,), (b,) = encoded(plain, batch(keys=(5, 6))), encoded(cached, batch(keys=(5, 6)))
        torch.testing.assert_close(a.z, b.z)
        torch.testing.assert_close(a.text.features, b.text.features)
        assert torch.equal(a.text.mask, b.text.mask)
        assert torch.equal(
            *(m.loss("backbone", m.trainable_modules(), s, rng()).total for m, s in ((plain, a), (cached, b)))
        )
    assert (cached.pipeline.vae.calls, cached.pipeline.text_encoder.calls) == (2, 2)
    assert (plain.pipeline.vae.calls, plain.pipeline.text_encoder.calls) == (4, 4)


def test_a_picture_at_another_size_is_another_latent():
    m = method(cache_latents=True)
    narrow, wide = encoded(m, batch(keys=(5, 6)), batch(keys=(5, 6), width=16))
    assert narrow.z.shape[-1] == 2 and wide.z.shape[-1] == 4


def test_without_keys_nothing_is_cached():
    m = method(cache_latents=True)
    encoded(m, batch(), batch())
    assert m.pipeline.vae.calls == 4


def test_a_full_cache_forgets_the_oldest():
    cache = TensorCache(limit=8)
    made = []

    def make(n: int) -> tuple[Tensor, ...]:
        made.append(n)
        return (torch.full((1,), float(n)),)

    for n in (1, 2, 2, 3, 2, 1):
        assert cache.get(n, make, n)[0].item() == n
    assert made == [1, 2, 3, 1] and cache.bytes == 8


def test_captions_alone_are_refused():
    with pytest.raises(LensError, match="captions only"):
        encoded(method(), evolve(batch(), images=None))


@pytest.mark.parametrize("config", [{"caption_dropout": 1.5}, {"std": 0.0}, {"base_tokens": 4096}, {"base_tokens": 0}])
def test_an_impossible_config_is_refused(config):
    with pytest.raises(ConfigError, match=next(iter(config))):
        FlowMatching.Config(**config)


def test_a_batch_that_is_encoded_already_is_taken_as_it_is() -> None:
    z, text = torch.randn(2, 4, 3, 3), TextFeatures(torch.randn(2, 1, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    method = FlowMatching(FlowMatching.Config(), LensPipeline())  # which has nothing to encode with
    batch = Batch(None, ("a", "b"), latents=z, text=text)
    (sample,) = next(method.steps(iter([batch]), {}, torch.Generator()))
    assert sample.z is z and sample.text is text


def test_validation_is_the_squared_error_at_one_time_in_every_bin():
    m, one_batch = method(cache_latents=True, cache_texts=True), batch(keys=(1, 2), width=12)
    metrics = m.validate(one_batch, m.trainable_modules(), rng(5))
    z, draw, bins = Averages().encode(one_batch.images.float() / 127.5 - 1), rng(5), {}
    for number in range(5):
        u, noise = torch.rand(2, generator=draw), torch.randn(z.shape, generator=draw)
        x = z + (noise - z) * ((number + u) / 5)[:, None, None, None]
        error = torch.tensor([0.5, -0.25])[None, :, None, None] - (noise - z)
        bins[f"loss/t{number / 5:.1f}-{(number + 1) / 5:.1f}"] = float(error.square().mean())
        last = x
    assert {k: v for k, v in metrics.items() if "/t" in k} == pytest.approx(bins)
    assert metrics["loss"] == pytest.approx(sum(bins.values()) / 5) and metrics["loss/8x12"] == metrics["loss"]
    torch.testing.assert_close(m.pipeline.backbone.x, last)
    assert m.pipeline.backbone.text.mask.sum() == 5, "no caption is dropped"
    assert (m._latents.bytes, m._texts.bytes) == (0, 0), "what is trained on finds no other picture under its key"


def test_validation_is_the_same_at_every_evaluation_and_needs_no_dropout():
    m = method(caption_dropout=1.0)
    assert m.validate(batch(), m.trainable_modules(), rng()) == m.validate(batch(), m.trainable_modules(), rng())
    with pytest.raises(LensError, match="captions only"):
        m.validate(Batch(None, ("abc",)), m.trainable_modules(), rng())
