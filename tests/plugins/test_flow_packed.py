"""flow_matching on packed batches: the same gradients as in buckets, the same weights after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lens_data
import lens_flow
import lens_mmdit
import pytest
import torch
import toy
from attrs import evolve
from lens_flow.matching import EncodedBatch, FlowMatching
from test_data_dataset import fill
from test_flow_matching import Averages, Letters, Recorder, method
from test_mmdit_model import distance, model
from torch import Tensor, nn

from lens_core import flow
from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import Recipe, structure
from lens_core.testing import check_method
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, TextFeatures

SIZES = [(4, 4), (3, 5), (4, 4), (2, 2), (3, 5), (4, 4)]


def sample(dtype: torch.dtype = torch.float32) -> EncodedBatch:
    draw = torch.Generator().manual_seed(0)
    z = tuple(torch.randn(8, *size, generator=draw, dtype=dtype) for size in SIZES)
    mask = torch.arange(5) < torch.tensor([5, 2, 0, 4, 1, 5])[:, None]
    return EncodedBatch(z, TextFeatures(torch.randn(6, 2, 5, 12, generator=draw, dtype=dtype), mask))


def learn(net: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


class Watched(nn.Module):
    """Notes what a backbone is asked, so that the same can be asked of it in buckets."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def packed(self, xs: list[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        self.arguments = xs, t, text
        return self.net.packed(xs, t, text)


def test_packed_and_bucketed_give_the_same_gradients_for_the_same_samples() -> None:
    net, batch = model(), sample()
    watched = Watched(net)
    m = FlowMatching(FlowMatching.Config(caption_dropout=0.3), LensPipeline())
    loss = m.loss("backbone", {"backbone": watched}, batch, torch.Generator().manual_seed(5))
    got = learn(net, loss.total)
    xs, t, text = watched.arguments
    buckets = []
    for size in dict.fromkeys(SIZES):
        rows = [i for i, other in enumerate(SIZES) if other == size]
        x, z = torch.stack([xs[i] for i in rows]), torch.stack([batch.z[i] for i in rows])
        noise = z + (x - z) / t[rows].view(-1, 1, 1, 1)
        v = net(x, t[rows], TextFeatures(text.features[rows], text.mask[rows]))
        buckets.append((v - flow.velocity(z, noise)).square().mean() * len(rows) / len(SIZES))
    want = learn(net, *buckets)
    assert float(loss.parts["loss"]) == pytest.approx(float(sum(b.detach() for b in buckets)), rel=1e-5)
    assert got.keys() == want.keys() and all(distance(got[k], want[k]) < 1e-5 for k in want)
    assert 0 < sum(not row.any() for row in text.mask) < 6, "some captions are dropped"


def test_a_packed_batch_of_one_size_learns_as_the_batch_itself() -> None:
    net, rng = model(), torch.Generator
    z, text = torch.randn(3, 8, 4, 4, generator=rng().manual_seed(1)), sample().text[:3]  # 128 numbers: drawn alike
    m = FlowMatching(FlowMatching.Config(caption_dropout=0.5), LensPipeline())
    both = [
        learn(net, m.loss("backbone", {"backbone": net}, EncodedBatch(latents, text), rng().manual_seed(4)).total)
        for latents in (z, tuple(z))
    ]
    assert all(distance(both[1][k], both[0][k]) < 1e-5 for k in both[0])


def test_t_is_drawn_for_the_size_of_each_sample() -> None:
    m = FlowMatching(FlowMatching.Config(std=1e-6, base_tokens=4, max_tokens=16), LensPipeline())
    watched = Watched(model())
    m.loss("backbone", {"backbone": watched}, sample(), torch.Generator().manual_seed(5))
    want = [1.0 + (h * w - 4) / 12 * 0.3 for h, w in SIZES]
    torch.testing.assert_close(watched.arguments[1].logit(), torch.tensor(want), atol=1e-4, rtol=0)


def test_a_weight_multiplies_the_loss_and_what_is_reported() -> None:
    net, m = model(), FlowMatching(FlowMatching.Config(), LensPipeline())
    whole = sample()
    one = [EncodedBatch(torch.stack(whole.z[::2][:2]), whole.text[:2]), whole]
    for micro in one:
        losses = [
            m.loss("backbone", {"backbone": net}, evolve(micro, weight=w), torch.Generator().manual_seed(2))
            for w in (1.0, 1.25)
        ]
        assert float(losses[1].parts["loss"]) == pytest.approx(1.25 * float(losses[0].parts["loss"]))
        assert torch.equal(losses[1].parts["loss"], losses[1].total.detach())


def mixed(cache: bool) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    images = tuple(torch.randint(0, 256, (3, 8, w), dtype=torch.uint8, generator=draw) for w in (8, 16, 8))
    return [Batch(images, ("abc", "de", "f"), (5, 6, 7) if cache else (), weight=0.75)]


@pytest.mark.parametrize("cache", [False, True])
def test_pictures_of_mixed_sizes_are_encoded_each_as_it_is(cache: bool) -> None:
    m, (batch,) = method(cache_latents=cache), mixed(cache)
    for _ in range(2):
        ((micro,),) = m.steps(iter([batch]), m.trainable_modules(), torch.Generator())
        assert micro.weight == 0.75 and [tuple(z.shape) for z in micro.z] == [(2, 2, 2), (2, 2, 4), (2, 2, 2)]
        for z, image in zip(micro.z, batch.images, strict=True):
            torch.testing.assert_close(z, Averages().encode(image[None] / 127.5 - 1)[0])
    assert m.pipeline.vae.calls == (3 if cache else 6)


class Packing(Recorder):
    def packed(self, xs: list[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        return [self(x[None], t[i : i + 1], text[i : i + 1])[0] for i, x in enumerate(xs)]


def test_it_keeps_the_contract_of_a_method_on_packed_batches() -> None:
    def made() -> FlowMatching:
        pipeline = LensPipeline(vae=Averages(), text_encoder=Letters(), backbone=Packing())
        return FlowMatching(FlowMatching.Config(cache_latents=True), pipeline)

    check_method(made, mixed(True))


def test_a_backbone_that_cannot_take_mixed_sizes_is_named() -> None:
    m = method()
    ((micro,),) = m.steps(iter(mixed(False)), m.trainable_modules(), torch.Generator())
    with pytest.raises(ConfigError, match="Recorder cannot take samples of different sizes in one pass; use a dataset"):
        m.loss("backbone", m.trainable_modules(), micro, torch.Generator())


MMDIT = {
    "use": "mmdit", "in_channels": 4, "out_channels": 1, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 1, "enc_hidden_dim": 8, "axes_dims_rope": [2, 2, 4], "selected_layer_index": [0],
}  # fmt: skip


def recipe(store: Path, **train: int) -> Recipe:
    data = {
        "use": "packed", "store": str(store), "buckets": [[[16, 16], [16, 32], [32, 16]], [[32, 32]]], "budget": 30.0,
        "max_upscale": 2.0, "every_area": True,
    }  # fmt: skip
    parts = {"vae": "blocks", "text_encoder": "letters", "backbone": MMDIT, "sampler": "euler"}
    options = {"steps": 6, "lr": 1e-2, "save_every": 3, "keep_checkpoints": 9, **train}
    data_ = {"seed": 1, "pipeline": parts, "method": "flow_matching", "dataset": data, "train": options}
    return structure(Recipe, data_)


def train(store: Path, out: Path, **options: int) -> None:
    catalog = Catalog.of(toy, lens_data, lens_flow, lens_mmdit)
    Trainer(recipe(store, **options), catalog, out, log=lambda line: None).train()


def test_a_run_on_packed_batches_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 50)
    train(store, tmp_path / "whole", micro_batches=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-0000006")
    train(store, tmp_path / "again", micro_batches=2)
    ends = [
        tensor_files.read_tensors(tmp_path / run / "checkpoints" / "step-0000006" / "state.safetensors")
        for run in ("whole", "again")
    ]
    begun = tensor_files.read_tensors(tmp_path / "whole" / "checkpoints" / "step-0000003" / "state.safetensors")
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert any(not torch.equal(begun[k], ends[0][k]) for k in begun if k.startswith("net/"))


def test_the_work_of_a_batch_is_that_of_its_samples_and_of_tokens_that_count() -> None:
    net, batch = model(), sample()
    fit = method()
    assert fit.flops("backbone", batch) == 0, "a backbone that cannot tell"
    fit.pipeline.backbone = net
    counts = batch.text.mask.sum(1).tolist()
    assert fit.flops("backbone", batch) == sum(net.flops(s, n) for s, n in zip(SIZES, counts, strict=True))
    rows = [n for n, size in enumerate(SIZES) if size == (4, 4)]
    bucket = EncodedBatch(
        torch.stack([batch.z[n] for n in rows]), TextFeatures(batch.text.features[rows], batch.text.mask[rows])
    )
    assert fit.flops("backbone", bucket) == sum(net.flops((4, 4), counts[n]) for n in rows)
