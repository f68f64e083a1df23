"""A table of modulation stands for its layers: the same pictures, without their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lens_flow.euler import Euler
from lens_flow.solvers import EulerAncestral, Heun
from lens_mmdit.model import LensTransformer2DModel
from lens_mmdit.modulation import Modulation
from test_mmdit_model import TINY, distance, inputs, model
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.checkpoints.tensor_files import save_tensors
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import LoraSpec
from lens_core.testing import check_backbone

TIMES = Euler(Euler.Config()).times((4, 4), 20)[:-1]


class Count:
    """How often each layer's weights are asked for; in between they are NaN."""

    def __init__(self, net: LensTransformer2DModel) -> None:
        self.visited: list[nn.Module] = []
        self.kept = {id(layer): [p.detach().clone() for p in layer.parameters()] for layer in net.modulations()}
        self.net = net

    def drop(self) -> None:
        with torch.no_grad():
            for layer in self.net.modulations():
                for p in layer.parameters():
                    p.data = torch.full_like(p, math.nan)

    @contextmanager
    def __call__(self, layer: nn.Module) -> Iterator[None]:
        self.visited.append(layer)
        before = [p.data for p in layer.parameters()]
        for p, kept in zip(layer.parameters(), self.kept[id(layer)], strict=True):
            p.data = kept
        yield
        for p, old in zip(layer.parameters(), before, strict=True):
            p.data = old


def trajectory(net: nn.Module, plain: bool, sampler: Any = None, steps: int = 20) -> Tensor:
    """The latents after `steps` guided steps; `plain`: each step works its modulation out."""

    class Plain(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return net(*arguments)

    inner = Plain()
    inner.inner = net
    noise, _, text = inputs(h=4, w=4)
    text.mask[1, 3:] = False
    pipeline = LensPipeline(backbone=inner if plain else net, sampler=sampler or Euler(Euler.Config()))
    draws = torch.Generator().manual_seed(4)
    *_, (_, x) = pipeline.sample(text, noise, steps, 5.0, draw=lambda: torch.randn(noise.shape, generator=draws))
    return x


def test_twenty_guided_steps_are_those_of_the_plain_path() -> None:
    exact, close = model(torch.bfloat16), model()
    assert torch.equal(trajectory(exact, plain=False), trajectory(exact, plain=True))
    assert distance(trajectory(close, plain=False), trajectory(close, plain=True)) < 1e-6


def test_all_times_of_a_layer_are_one_product_and_no_step_asks_again() -> None:
    net = model()
    calls: list[Tensor] = []
    layers = net.modulations()
    assert len(layers) == 2 * TINY.num_layers + 1
    hooks = [m.register_forward_pre_hook(lambda _, x: calls.append(x[0])) for m in layers]
    trajectory(net, plain=False)
    trajectory(net, plain=False)
    for hook in hooks:
        hook.remove()
    products = [x for x in calls if x.is_floating_point()]
    assert [x.shape for x in products] == [(20, 32)] * len(layers), "the second run reads the first one's table"
    assert len(calls) > 20 * len(layers)


def test_weights_that_are_gone_are_asked_for_once_each_and_change_nothing() -> None:
    net = model()
    want = trajectory(net, plain=False)
    fresh = model()
    visit = Count(fresh)
    visit.drop()
    x, _, text = inputs()
    with fresh.precomputed(TIMES, visit), torch.no_grad():
        assert visit.visited == fresh.modulations() == fresh.unused_modules()
        for t in TIMES:
            assert fresh(x, t.expand(2), text).isfinite().all()
        assert len(visit.visited) == len(fresh.modulations())
    with torch.no_grad():
        assert not fresh(x, TIMES[:1].expand(2), text).isfinite().all(), "the plain path reads the weights"
    assert want.isfinite().all()


def test_rows_of_a_batch_may_be_at_different_times_and_new_times_join() -> None:
    net, (x, t, text) = model(), inputs()
    with torch.no_grad():
        want = net(x, t, text)
        visit = Count(net)
        with net.precomputed(TIMES, visit):
            assert distance(net(x, t, text), want) < 1e-6
            assert len(visit.visited) == 2 * len(net.modulations())
            assert distance(net(x, t.flip(0), text), net(x, t, text)) > 1e-3
            assert len(visit.visited) == 2 * len(net.modulations())
        with net.precomputed(TIMES, visit):
            pass
        assert len(visit.visited) == 2 * len(net.modulations()), "the table of the last run still holds"
        with net.precomputed(TIMES[:5] / 2, visit):
            pass
        assert net.norm_out.linear.table.shape == (5, 64), "and does not grow from run to run"


@pytest.mark.parametrize("sampler", [Heun(Heun.Config()), EulerAncestral(EulerAncestral.Config())])
def test_other_samplers_find_their_times_too(sampler: Any) -> None:
    net = model()
    assert distance(trajectory(net, False, sampler, 6), trajectory(net, True, sampler, 6)) < 1e-6
    assert net.norm_out.linear.table.shape[0] == 6


@pytest.mark.parametrize(
    "layer", ["transformer_blocks.1.img_mod.1", "norm_out.linear", "transformer_blocks.2.txt_mod.1"]
)
def test_a_lora_over_modulation_renews_the_table(layer: str, tmp_path: Path) -> None:
    net, (x, t, text) = model(), inputs()
    pipeline = LensPipeline(backbone=net)
    wide = net.get_submodule(layer).weight.shape
    rng = torch.Generator().manual_seed(0)
    low = {
        f"transformer.{layer}.lora_A.weight": torch.randn(2, wide[1], generator=rng),
        f"transformer.{layer}.lora_B.weight": torch.randn(wide[0], 2, generator=rng),
    }
    save_tensors(tmp_path / "a.safetensors", low)

    def tabled() -> Tensor:
        with torch.no_grad(), net.precomputed(t):
            out: Tensor = net(x, t, text)
            return out

    before = tabled()
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert distance(tabled(), net(x, t, text)) < 1e-6 < 1e-2 < distance(tabled(), before)
    pipeline.unload_lora_weights()
    assert torch.equal(tabled(), before)


def test_a_weight_that_changes_within_a_run_counts_from_then_on() -> None:
    net, (x, t, text) = model(), inputs()
    with torch.no_grad(), net.precomputed(t):
        net(x, t, text)
        net.time_text_embed.timestep_embedder["linear_2"].bias.add_(1)
        assert net._times == tuple(t.tolist())
        got = net(x, t, text)
    with torch.no_grad():
        assert distance(got, net(x, t, text)) < 1e-6


def test_another_precision_and_autocast_have_tables_of_their_own() -> None:
    net, (x, t, text) = model(), inputs()
    with torch.no_grad(), net.precomputed(t):
        net(x, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(x, t, text)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, net(x, t, text))
    net.to(torch.bfloat16)
    with torch.no_grad(), net.precomputed(t):
        got = net(x, t, text)
    with torch.no_grad():
        assert torch.equal(got, net(x, t, text))


def test_training_never_reads_a_table_and_finds_every_weight() -> None:
    net, twin, (x, t, text) = model(), model(), inputs()
    twin(x, t, text).square().sum().backward()
    with net.precomputed(t):
        with torch.no_grad():
            net(x, t, text)
        net(x, t, text).square().sum().backward()
        assert net.state_dict().keys() == twin.state_dict().keys()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert net.transformer_blocks[0].img_mod[1].weight.grad.any()


def test_a_copy_has_a_table_of_its_own() -> None:
    net, (x, t, text) = model(), inputs()
    with torch.no_grad(), net.precomputed(t):
        net(x, t, text)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.norm_out.linear.bias.add_(1)
        with twin.precomputed(t):
            got = twin(x, t, text)
        assert distance(got, twin(x, t, text)) < 1e-6 < 1e-3 < distance(got, net(x, t, text))


def test_an_adapter_beside_modulation_takes_the_plain_path() -> None:
    net, (x, t, text) = model(), inputs()
    lora.attach(net, LoraSpec(rank=2, targets=("img_mod.1",)))
    for name, p in net.named_parameters():
        if lora.owned(name):
            nn.init.ones_(p)
    with torch.no_grad():
        want = net(x, t, text)
        with net.precomputed(t):
            assert torch.equal(net(x, t, text), want)
    assert net.modulations() == net.unused_modules() == []


def test_a_failure_half_way_leaves_no_half_table() -> None:
    net, (x, t, text) = model(), inputs()
    with torch.no_grad():
        want = net(x, t, text)

    def fail(layer: nn.Module) -> Any:
        if layer is net.norm_out.linear:
            raise OSError("no room")
        return visit(layer)

    visit = Count(net)
    with pytest.raises(OSError, match="no room"), net.precomputed(t, fail):
        pass
    with torch.no_grad(), net.precomputed(t):
        assert distance(net(x, t, text), want) < 1e-6


def test_a_backbone_with_a_table_keeps_its_contract_and_its_file(tmp_path: Path) -> None:
    net, arguments = model(), inputs()
    with torch.no_grad(), net.precomputed(arguments[1]):
        net(*arguments)
        net.save(tmp_path)
    again = LensTransformer2DModel.load(tmp_path, TINY)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    check_backbone(net, TINY, channels=8, layers=2, width=12)
    assert isinstance(again.norm_out.linear, Modulation) and again.norm_out.linear.table is None


def test_the_tiny_checkpoint_draws_what_its_plain_path_draws() -> None:
    catalog = Catalog.installed()
    pipeline = LensPipeline.from_pretrained("tiny:", catalog=catalog, device="cpu", dtype=torch.float64)
    call: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "latent"}
    got = pipeline("a red circle", **call).images
    assert pipeline.backbone.norm_out.linear.table.shape[0] == 3
    pipeline.backbone.modulations = list
    assert distance(got, pipeline("a red circle", **call).images) < 1e-12
