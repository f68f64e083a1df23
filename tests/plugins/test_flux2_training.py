"""The method autoencode: its loss, and the latent statistics it gathers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import lens_flux2
import pytest
import torch
from attrs import evolve, frozen
from lens_flux2.training import Autoencode
from lens_flux2.vae import Flux2VAE

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training, unstructure
from lens_core.testing import check_method
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, LensError, Loss, NumericalError

SMALL = Flux2VAE.Config(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=2, mid_block_add_attention=False
)


def method(**config: float) -> Autoencode:
    torch.manual_seed(0)
    return Autoencode(Autoencode.Config(**config), SimpleNamespace(vae=Flux2VAE(SMALL)))


def batch(seed: int = 0, height: int = 12, width: int = 8) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=draw), ("",) * 3)


def rng(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_weighted_sum_of_its_four_terms():
    m = method(l1=0.5, l2=2.0, edges=3.0, kl=0.25)
    loss = m.loss("vae", m.trainable_modules(), batch(), rng())
    x = batch().images / 127.5 - 1
    posterior = m.vae.net.encode(x).latent_dist
    noise = torch.randn(3, 2, 6, 4, generator=rng())
    error = m.vae.net.decode(posterior.mean + posterior.std * noise).sample - x
    down = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    kl = posterior.kl().sum() / posterior.mean.numel()
    expected = {"l1": error.abs().mean(), "l2": (error**2).mean(), "edges": (down + across) / 2, "kl": kl}
    torch.testing.assert_close(dict(loss.parts), {k: v.detach() for k, v in expected.items()})
    torch.testing.assert_close(
        loss.total, 0.5 * expected["l1"] + 2 * expected["l2"] + 3 * expected["edges"] + 0.25 * expected["kl"]
    )
    assert loss.total.requires_grad and not any(part.requires_grad for part in loss.parts.values())


@pytest.mark.parametrize("crop", [0, 8])
def test_the_weight_of_a_batch_weighs_its_loss(crop: int):
    m = method(crop=crop)
    totals = {}
    for weight in (1.0, 0.25):
        (made,) = next(iter(m.steps(iter([evolve(batch(), weight=weight)]), m.trainable_modules(), rng(1))))
        totals[weight] = m.loss("vae", m.trainable_modules(), made, rng()).total
    assert torch.equal(totals[0.25], 0.25 * totals[1.0]) and totals[1.0] > 0


def test_every_weight_learns():
    m = method()
    m.loss("vae", m.trainable_modules(), batch(), rng()).total.backward()
    assert [n for n, p in m.vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def learn(m: Autoencode, *batches: Batch) -> None:
    """What the loop does about the latent statistics in a step of several micro-batches."""
    sums = [m.loss("vae", m.trainable_modules(), each, rng()).sums for each in batches]
    m.after_update("vae", m.trainable_modules(), {name: sum(one[name] for one in sums) for name in sums[0]})


def test_with_one_weight_the_statistics_are_those_of_all_cells():
    m = method(statistics_momentum=0.1)
    with torch.no_grad():
        cells = [m.vae.net.encode(batch(i).images / 127.5 - 1).latent_dist.mean for i in range(4)]
    for i in range(4):
        learn(m, batch(i))
    folded = torch.cat(cells).unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 4, 5, 0, 2, 3).reshape(8, -1)
    bn = m.vae.net.bn
    torch.testing.assert_close(bn.running_mean, folded.mean(1))
    torch.testing.assert_close(bn.running_var, folded.var(1, correction=0))


def test_latents_have_unit_variance_after_training_on_them():
    m = method()
    for i in range(4):
        learn(m, batch(i))
    with torch.no_grad():
        z = torch.cat([m.vae.encode(batch(i).images / 127.5 - 1) for i in range(4)]).transpose(0, 1).flatten(1)
        eps_shrinks = m.vae.net.bn.running_var / (m.vae.net.bn.running_var + 1e-4)
    torch.testing.assert_close(z.mean(1), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(1, correction=0), eps_shrinks, atol=1e-3, rtol=0)


def test_the_newest_batch_weighs_the_momentum():
    m = method(statistics_momentum=0.5)
    for value in (0.0, 2.0, 4.0):
        m.vae.track_statistics(torch.full((1, 2, 2, 2), value), 0.5)
    bn = m.vae.net.bn
    # weights 1/4, 1/4, 1/2 of 0, 2, 4
    torch.testing.assert_close(bn.running_mean, torch.full((8,), 2.5))
    torch.testing.assert_close(bn.running_var, torch.full((8,), 0.25 * 6.25 + 0.25 * 0.25 + 0.5 * 2.25))


def test_without_gradients_the_statistics_stand_still():
    m = method()
    with torch.no_grad():
        assert not m.loss("vae", m.trainable_modules(), batch(), rng()).sums
    assert int(m.vae.net.bn.num_batches_tracked) == 0
    assert torch.equal(m.vae.net.bn.running_mean, torch.zeros(8))


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_statistics():
    m = method()
    m.vae.track_statistics(torch.tensor(float("nan")).expand(1, 2, 2, 2), 0.5)
    assert int(m.vae.net.bn.num_batches_tracked) == 0 and m.vae.net.bn.running_var.isfinite().all()


class Rows:
    """Dataset: every part gets its share of the same rows."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        rows = torch.cat([batch(i).images for i in range(4)])[:, :, :8]  # 12, on the grid of the small VAE
        while True:
            yield Batch(rows[rank::world], ("",) * len(rows[rank::world]))

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


plugin = ModuleType("rows")
plugin.lens_datasets = hookimpl(lambda: {"rows": Rows}, specname="lens_datasets")


@pytest.fixture
def statistics(tmp_path):
    """The mean and variance of latents that a run of some parts ends with, by channel, and its number of steps."""

    def run(parts: int, **train: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        recipe = Recipe(
            method=ComponentSpec("autoencode"),
            dataset=ComponentSpec("rows"),
            pipeline=PipelineSpec(vae=ComponentSpec("flux2", unstructure(SMALL))),
            train=Training(**{"steps": 1, "lr": 1e-3, "micro_batches": parts, **train}),
        )
        going = Trainer(
            recipe, Catalog.of(lens_flux2, plugin), tmp_path / f"{parts}-{len(train)}", log=lambda line: None
        )
        try:
            going.train()
        finally:
            bn = going.pipeline.vae.net.bn
            run.seen = bn.running_mean.clone(), bn.running_var.clone(), int(bn.num_batches_tracked)
        return run.seen

    return run


def test_the_statistics_of_a_step_in_parts_are_those_of_the_step_as_a_whole(statistics):
    mean, variance, steps = statistics(1)
    assert steps == 1 and mean.abs().min() > 1e-4
    for parts in (2, 3, 4):
        other = statistics(parts)
        torch.testing.assert_close(other[0], mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(other[1], variance, atol=1e-6, rtol=1e-6)
        assert other[2] == 1


def test_a_step_that_is_skipped_leaves_the_statistics_alone(statistics, monkeypatch):
    loss = Autoencode.loss

    def broken(*arguments: Any) -> Loss:
        losses = loss(*arguments)
        return evolve(losses, total=losses.total * float("nan"))

    monkeypatch.setattr(Autoencode, "loss", broken)
    with pytest.raises(NumericalError):
        statistics(2, max_skipped_steps=2, steps=3)
    mean, variance, steps = statistics.seen
    assert steps == 0 and torch.equal(mean, torch.zeros(8)) and torch.equal(variance, torch.ones(8))


def test_it_keeps_the_contract_of_a_method():
    check_method(lambda: method(crop=8, crop_share=0.5), [batch(i) for i in range(3)])


def test_a_few_steps_make_the_reconstruction_better():
    m = method()
    optimizer = torch.optim.AdamW(m.vae.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = m.loss("vae", m.trainable_modules(), batch(0), rng())
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_each_batch_is_one_step():
    m = method()
    batches = [batch(0), batch(1)]
    assert [list(micro) for micro in m.steps(iter(batches), m.trainable_modules(), rng())] == [
        [batches[0]],
        [batches[1]],
    ]
    assert m.update_order(0) == ("vae",) and m.trainable_modules() == {"vae": m.vae} and m.state_dict() == {}


def test_captions_alone_are_refused():
    m = method()
    with pytest.raises(LensError, match="captions only"):
        m.loss("vae", m.trainable_modules(), evolve(batch(), images=None), rng())


def test_another_vae_is_refused():
    with pytest.raises(ConfigError, match="not a Linear"):
        Autoencode(Autoencode.Config(), SimpleNamespace(vae=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(
    "config", [{"kl": -1.0}, {"l1": 0.0, "l2": 0.0}, {"statistics_momentum": 0.0}, {"statistics_momentum": 1.5}]
)
def test_an_impossible_config_is_refused(config):
    with pytest.raises(ConfigError, match=next(iter(config))):
        Autoencode.Config(**config)
