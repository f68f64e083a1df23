"""The method diffusion_nft: what is drawn and judged, what is learned from it, and what a resumed run repeats."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens_nft
import pytest
import torch
import toy
from attrs import evolve, frozen
from lens_flow.solvers import EulerAncestral
from lens_nft.method import DiffusionNFT
from lens_nft.micro_batches import MicroBatch, interpolate
from lens_nft.objective import advantages, reflected_loss
from lens_nft.policies import ema_update
from lens_nft.rollout import prompt_indices
from torch import Tensor, nn

from lens_core import flow, hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_images
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, LoraSpec, Recipe, Training, build, read_recipe
from lens_core.testing import check_method
from lens_core.training.distributed import Ranks, seed_of
from lens_core.training.spikes import SpikeDetector
from lens_core.training.step import optimizer_step
from lens_core.training.trainer import Trainer
from lens_core.types import ConfigError, LensError, Prompt, Score, Shard


class Colours:
    """Benchmark: prompts whose ids are no indices."""

    @frozen
    class Config:
        count: int = 6
        twins: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> list[Prompt]:
        ids = [1 if self.config.twins else 2**40 + 3 * i for i in range(self.config.count)]
        return [Prompt("abcdefgh"[i % 8] * (1 + i % 3), key, ("even", "odd")[i % 2], {"wish": i})
                for i, key in enumerate(ids)]  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        raise NotImplementedError


class Glow:
    """Reward: the mean of the red channel. `calls` keeps what every instance was asked."""

    @frozen
    class Config:
        fails: tuple[int, ...] = ()  # which pictures of each prompt fail, counted from 0
        zero: bool = False  # they get a 0 instead: the fault of which there must be none
        abstains: tuple[int, ...] = ()
        broken: tuple[int, ...] = ()  # calls, counted from 0, in which everything fails
        value: float | None = None  # what every picture gets
        dull: int = -1  # the wish that scores alike in every picture
        short: bool = False  # one score too few

    calls: list[tuple[Tensor, list[Prompt]]]

    def __init__(self, config: Config) -> None:
        self.config, self.count = config, 0
        Glow.calls = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        Glow.calls.append((images, list(prompts)))
        broken, self.count = self.count in self.config.broken, self.count + 1
        seen: dict[int, int] = {}
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            number = seen[prompt.id] = seen.get(prompt.id, -1) + 1
            if broken or (number in self.config.fails and not self.config.zero):
                scores.append(Score("failed", evidence="the judge is away"))
            elif number in self.config.abstains:
                scores.append(Score("abstain"))
            else:
                red = float(image[0].float().mean()) / 255
                value = red if self.config.value is None else self.config.value
                value = 0.5 if prompt.data["wish"] == self.config.dull else value
                scores.append(Score("ok", 0.0 if number in self.config.fails else value, {"red": red}))
        return scores[1:] if self.config.short else scores


class Dark:
    """Reward: how dark a picture is."""

    @frozen
    class Config:
        weight: float = 0.0  # never seen: a recipe's weight is the method's

    def __init__(self, config: Config) -> None:
        assert config.weight == 0

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", 1 - float(i.float().mean()) / 255) for i in images]


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    return {"colours": Colours}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    return {"glow": Glow, "dark": Dark}


OPTIONS: dict[str, Any] = {
    "prompts": "colours",
    "rewards": ["glow"],
    "prompts_per_rollout": 2,
    "pictures_per_prompt": 4,
    "sizes": [[16, 32]],
    "rollout_steps": 3,
    "timesteps_per_image": 2,
    "micro_batch_size": 3,
    "kl": 0.5,
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.of(toy, lens_nft, sys.modules[__name__])


@pytest.fixture
def pipeline(catalog: Catalog, pipeline: LensPipeline) -> LensPipeline:
    pipeline.catalog = catalog
    return pipeline


def method(pipeline: LensPipeline, **options: Any) -> DiffusionNFT:
    _, cls, config = build(
        pipeline.catalog, "method", ComponentSpec("diffusion_nft", {**OPTIONS, **options}), "$.method"
    )
    return cls(config, pipeline)


def glow(**options: Any) -> list[dict[str, Any]]:
    return [{"use": "glow", **options}]


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(m: DiffusionNFT, seed: int = 3) -> Sequence[MicroBatch]:
    return next(m.steps(iter(()), m.trainable_modules(), rng(seed)))


def nudged(m: DiffusionNFT, by: float = 0.1) -> DiffusionNFT:
    """The backbone moves away from the old policy and from the start, of which there are copies by now."""
    _ = m.old, m.reference
    with torch.no_grad():
        for n, parameter in enumerate(m.pipeline.backbone.parameters()):
            parameter += by * torch.randn(parameter.shape, generator=rng(n))
    return m


def behind(m: DiffusionNFT) -> DiffusionNFT:
    """The old policy is another one than the backbone."""
    with torch.no_grad():
        for parameter in m.old.parameters():
            parameter *= 1.05
    return m


class Turn(Trainer):
    """A run of one turn: what the loop makes of the micro-batches that a method has already made."""

    def __init__(self, m: DiffusionNFT, folder: Path) -> None:
        train = Training(steps=1, lr=1e-3, max_grad_norm=0.0)
        super().__init__(
            Recipe(ComponentSpec("fit"), train, ComponentSpec("squares"), toy.PARTS),
            Catalog.of(toy),
            folder,
            lambda _: None,
        )
        self.method, self.modules = m, dict(m.trainable_modules())
        self.trainable_parameters = {"backbone": list(m.pipeline.backbone.parameters())}
        self.optimizers = {"backbone": torch.optim.SGD(self.trainable_parameters["backbone"])}
        self.spike_detector = SpikeDetector(0.0, ("backbone",))

    def __call__(self, *parts: Sequence[MicroBatch]) -> tuple[list[Tensor], dict[str, float]]:
        self.ranks = Ranks(self.accelerator, len(parts))
        weights = self.trainable_parameters["backbone"]
        before = [p.detach().clone() for p in weights]
        metrics = {
            name: float(total) / weight for name, (total, weight) in optimizer_step(self, "backbone", 0, parts).items()
        }
        with torch.no_grad():  # the gradient is wanted, and not the step
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        return [p.grad.clone() for p in weights], metrics


def learned(m: DiffusionNFT, *parts: Sequence[MicroBatch]) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient that the loop gathers from the micro_batches of a step, part by part, and its logged parts."""
    with tempfile.TemporaryDirectory() as folder:
        return Turn(m, Path(folder))(*parts)


def pictures(micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
    return {s.picture.seed: s.picture.z for micro_batch in micro_batches for s in micro_batch.samples}


def close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-5) -> bool:
    size = torch.cat([x.flatten() for x in a]).norm()
    return bool(torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)]).norm() <= tolerance * size)


# ---- prompts, seeds, pictures ----------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_of_which_only_the_rest_is_left_out():
    epochs = [[i for rollout in range(3) for i in prompt_indices(10, 3, 3 * epoch + rollout, 7)] for epoch in range(3)]
    assert all(len(set(e)) == 9 and set(e) <= set(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompt_indices(10, 3, 4, 7) == prompt_indices(10, 3, 4, 7) != prompt_indices(10, 3, 4, 8)


def test_seeds_are_stable_numbers_that_differ():
    assert seed_of(1, 2, 3, 4) == 7597657864365363701
    seeds = {seed_of(1, 2, key, k) for key in (5, 6, 2**40, 2**40 + 1) for k in range(50)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)


def test_prompts_can_be_those_of_some_tasks(pipeline):
    m = method(pipeline, tasks=["odd"])
    assert [p.data["wish"] for p in m.prompts] == [1, 3, 5] and len(method(pipeline).prompts) == 6


def test_a_picture_depends_on_seed_rollout_prompt_and_number_alone(pipeline):
    few, many = (step(method(pipeline, pictures_per_prompt=k, micro_batch_size=b)) for k, b in ((2, 1), (5, 7)))
    a, b = pictures(few), pictures(many)
    assert len(a) == 4 and len(b) == 10 and a.keys() < b.keys()
    for seed in a:
        torch.testing.assert_close(a[seed], b[seed], atol=1e-5, rtol=0)
    assert a.keys().isdisjoint(pictures(step(method(pipeline, pictures_per_prompt=2), seed=4)))


@pytest.mark.parametrize("adds_noise", [False, True])
def test_a_picture_is_what_the_pipeline_draws_from_its_seed(pipeline, adds_noise):
    if adds_noise:
        pipeline.sampler = EulerAncestral(EulerAncestral.Config())
    (micro_batch, *_) = step(method(pipeline))
    picture = micro_batch.samples[0].picture
    result = pipeline(picture.prompt.text, seed=picture.seed, height=16, width=32, num_inference_steps=3,
                      guidance_scale=1.0, output_type="latent")  # fmt: skip
    torch.testing.assert_close(picture.z, result.images[0], atol=1e-5, rtol=0)
    assert torch.equal(picture.image, to_images(pipeline.decode(picture.z[None]))[0])


def test_the_old_policy_draws(pipeline):
    m = method(pipeline)
    first = pictures(step(m))
    nudged(m, 0.5)
    again = pictures(step(m))
    assert again.keys() == first.keys() and all(torch.equal(z, again[seed]) for seed, z in first.items())
    ema_update(m.old, pipeline.backbone, 0.0)
    assert not any(torch.equal(z, first[seed]) for seed, z in pictures(step(m)).items())


def test_a_group_has_one_size_and_a_rollout_several(pipeline):
    step(method(pipeline, prompts_per_rollout=6, sizes=[[16, 16], [16, 32], [32, 16]]))
    sizes = {p.id: set() for _, prompts in Glow.calls for p in prompts}
    for images, prompts in Glow.calls:
        for image, prompt in zip(images, prompts, strict=True):
            sizes[prompt.id].add(tuple(image.shape[1:]))
    assert len(Glow.calls) == len({s for group_sizes in sizes.values() for s in group_sizes}) > 1, "one call a size"
    assert all(len(group_sizes) == 1 for group_sizes in sizes.values())


def test_a_judge_sees_uint8_pictures_and_the_facts_of_their_prompts(pipeline):
    step(method(pipeline))
    ((images, prompts),) = Glow.calls
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 16, 32)
    assert [p.id for p in prompts] == [prompts[0].id] * 4 + [prompts[4].id] * 4
    assert all(p.data["wish"] == (p.id - 2**40) // 3 for p in prompts)


def test_guidance_is_one_thing_in_drawing_and_another_in_learning(pipeline):
    def passes(**options: float) -> tuple[int, int, int, int]:
        m = method(pipeline, **options)
        m.old.calls.clear()
        micro_batches = step(m)
        drawn = [tokens for _, tokens in m.old.calls]
        m.old.calls.clear()
        m.loss("backbone", m.trainable_modules(), micro_batches[0], rng())
        seen = [tokens for _, tokens in m.old.calls]
        return drawn.count(0), len(drawn), seen.count(0), len(seen)

    assert passes() == (0, 9, 0, 1)
    assert passes(rollout_guidance=3.0) == (9, 18, 0, 1)
    assert passes(train_guidance=3.0) == (0, 9, 1, 2)


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_times_are_spread_over_the_samplers_schedule():
    schedule = torch.tensor([1.0, 0.9, 0.5, 0.0])
    u = torch.tensor([0.0, 1 / 6, 1 / 3, 0.5, 5 / 6, 1.0])
    torch.testing.assert_close(interpolate(schedule, u), torch.tensor([1.0, 0.95, 0.9, 0.7, 0.25, 0.0]))


def test_each_picture_is_learned_once_in_every_part_of_the_schedule(pipeline):
    m = method(pipeline, timesteps_per_image=4)
    micro_batches = step(m)
    met: dict[int, list[float]] = {}
    for micro_batch in micro_batches:
        t, noise = m._times_and_noise(micro_batch)
        assert noise.shape == (len(micro_batch.samples), 4, 1, 2)
        for sample, value in zip(micro_batch.samples, t.tolist(), strict=True):
            met.setdefault(sample.picture.seed, []).append(value)
    assert len(met) == 8
    for times in met.values():
        assert sorted(int(4 * (1 - t)) for t in times) == [0, 1, 2, 3]  # the toy's schedule is even
    assert len({round(t, 6) for times in met.values() for t in times}) == 32


@pytest.mark.parametrize(("loss_space", "guidance"), [("x0", 1.0), ("velocity", 2.5)])
def test_the_step_is_the_mean_loss_of_its_samples_at_their_own_times_and_noise(loss_space, guidance, pipeline):
    m = behind(nudged(method(pipeline, loss_space=loss_space, train_guidance=guidance, beta=0.3)))
    micro_batches = step(m)
    gradient, parts = learned(m, micro_batches)
    rewards = {p.seed: 0.0 for micro_batch in micro_batches for p in (s.picture for s in micro_batch.samples)}
    losses, distances = [], []
    net = pipeline.backbone.requires_grad_(True)
    net.zero_grad()

    def velocity(backbone: nn.Module, x: Tensor, t: Tensor, text: Any) -> Tensor:
        cond = backbone(x, t, text)
        empty = type(text)(text.features[:, :, :0], text.mask[:, :0])
        return cond if guidance == 1 else flow.guide(cond, backbone(x, t, empty), guidance)

    groups: dict[int, list[Any]] = {}
    for picture in {s.picture.seed: s.picture for micro_batch in micro_batches for s in micro_batch.samples}.values():
        rewards[picture.seed] = float(picture.image[0].float().mean()) / 255
        groups.setdefault(picture.prompt.id, []).append(picture)
    for members in groups.values():
        values = torch.tensor([rewards[p.seed] for p in members], dtype=torch.float64)
        for picture, a in zip(members, (values - values.mean()) / values.std(correction=0), strict=True):
            for turn in range(2):
                draw = rng(seed_of(picture.seed, turn))
                t = 1 - (turn + torch.rand(1, generator=draw)) / 2
                noise = torch.randn(1, 4, 1, 2, generator=draw)
                z, text = picture.z[None], pipeline.encode([picture.prompt.text])
                x = (1 - t) * z + t * noise
                v = velocity(net, x, t, text)
                with torch.no_grad():
                    old, reference = velocity(m.old, x, t, text), velocity(m.reference, x, t, text)
                r = (0.5 + 0.5 * a.clamp(-5, 5) / 5)[None]
                one = reflected_loss(v, old, noise - z, t, r, beta=0.3, clip=5.0, normalise=loss_space == "x0")
                losses.append(one.sum() + 0.5 * (v - reference).square().mean())
                distances.append((v - reference).square().mean().detach())
    (sum(losses) / len(losses)).backward()
    assert len(losses) == 16
    assert close(gradient, [p.grad for p in net.parameters()])
    assert parts["to_reference"] == pytest.approx(float(sum(distances)) / 16, rel=1e-5)


def test_pictures_of_a_prompt_can_share_times_and_noises(pipeline):
    def met(m: DiffusionNFT) -> dict[int, set[tuple[float, ...]]]:
        draws: dict[int, set[tuple[float, ...]]] = {}
        for micro_batch in step(m):
            t, noise = m._times_and_noise(micro_batch)
            for sample, when, what in zip(micro_batch.samples, t, noise, strict=True):
                draws.setdefault(sample.picture.prompt.id, set()).add((float(when), *what.flatten().tolist()))
        return draws

    assert [len(kinds) for kinds in met(method(pipeline)).values()] == [8, 8], "four pictures at two times each"
    one, two = met(method(pipeline, common_noise=True)).values()
    assert len(one) == len(two) == 2 and not one & two


def test_with_common_noise_equal_pictures_teach_nothing_however_they_are_judged(pipeline):
    def gradient(**options: Any) -> list[Tensor]:
        m = method(pipeline, kl=0, loss_space="velocity", **options)
        micro_batches = step(m)
        same = {s.picture.prompt.id: s.picture.z for micro_batch in micro_batches for s in micro_batch.samples}
        batches = [
            evolve(
                x, samples=tuple(evolve(s, picture=evolve(s.picture, z=same[s.picture.prompt.id])) for s in x.samples)
            )
            for x in micro_batches
        ]
        return learned(m, batches)[0]

    noisy = torch.cat([g.flatten() for g in gradient()]).norm()
    assert torch.cat([g.flatten() for g in gradient(common_noise=True)]).norm() < 1e-5 * noisy


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_micro_batches_change_nothing(batch, common, pipeline):
    options = {"sizes": [[16, 16], [16, 32]], "prompts_per_rollout": 5, "common_noise": common}
    whole, other = (behind(method(pipeline, micro_batch_size=n, **options)) for n in (3, batch))
    assert len(step(whole)) != len(step(other))
    assert close(learned(other, step(other))[0], learned(whole, step(whole))[0])


def test_the_distance_to_the_start_is_zero_at_the_start_alone(pipeline):
    m = method(pipeline)
    micro_batches = step(m)
    assert learned(m, micro_batches)[1]["to_reference"] < 1e-12
    assert learned(nudged(m), micro_batches)[1]["to_reference"] > 1e-4
    ema_update(m.reference, pipeline.backbone, 0.0)
    assert learned(m, micro_batches)[1]["to_reference"] < 1e-12


def test_without_a_weight_the_distance_to_the_start_costs_nothing(pipeline):
    m = method(pipeline, kl=0)
    micro_batches = step(m)
    assert m.reference is None and not any(k.startswith("reference/") for k in m.state_dict())
    assert "to_reference" not in learned(m, micro_batches)[1]


def test_equal_rewards_change_nothing(pipeline):
    m = nudged(method(pipeline, rewards=glow(value=0.7), kl=0))
    before = [p.detach().clone() for p in pipeline.backbone.parameters()]
    gradient, parts = learned(m, step(m))
    assert all(not g.any() for g in gradient)
    optimizer = torch.optim.AdamW(pipeline.backbone.parameters(), 0.1, weight_decay=0.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pipeline.backbone.parameters(), strict=True))
    assert parts["zero_variance"] == 1 and parts["reward/glow"] == pytest.approx(0.7)
    other = method(pipeline, kl=0)
    assert any(g.any() for g in learned(other, step(other))[0]), "rewards that differ do teach"


def test_a_group_that_scored_alike_teaches_nothing_but_counts_in_the_mean(pipeline):
    plain = step(method(pipeline))
    dull = plain[0].samples[0].picture.prompt
    micro_batches = step(method(pipeline, rewards=glow(dull=dull.data["wish"])))
    seeds = {s.picture.seed for micro_batch in plain for s in micro_batch.samples if s.picture.prompt != dull}
    assert len(seeds) == 4 and pictures(micro_batches).keys() == seeds
    for batches, part in ((plain, 1.0), (micro_batches, 0.5)):  # the weights of all samples at all times
        assert sum(x.share * len(x.samples) for x in batches) / len(batches) == pytest.approx(part)
    assert float(micro_batches[0].metrics["zero_variance"]) == 0.5


def test_a_failed_picture_leaves_the_gradient_as_if_it_had_never_been_drawn(pipeline):
    def gradient(pictures: int, **reward: Any) -> list[Tensor]:
        m = behind(method(pipeline, pictures_per_prompt=pictures, rewards=glow(**reward), max_failed=1.0))
        return learned(m, step(m))[0]

    absent = gradient(3)
    assert close(gradient(4, fails=[3]), absent)
    assert close(gradient(4, abstains=[3]), absent)
    assert not close(gradient(4, fails=[3], zero=True), absent, 0.1), "a zero would have taught something"


def test_the_parts_of_a_rollout_add_up_to_the_whole(pipeline):
    whole, halves = (behind(method(pipeline, updates_per_rollout=n)) for n in (1, 2))
    one = learned(whole, step(whole))[0]
    steps = halves.steps(iter(()), halves.trainable_modules(), rng())
    first, second = (next(steps) for _ in range(2))
    assert pictures(first).keys().isdisjoint(pictures(second))
    assert pictures(first).keys() | pictures(second).keys() == pictures(step(whole)).keys()
    parts = [learned(halves, micro_batches)[0] for micro_batches in (first, second)]
    assert close([(a + b) / 2 for a, b in zip(*parts, strict=True)], one)


def test_several_rewards_are_weighed(pipeline):
    m = method(pipeline, rewards=[{"use": "glow", "weight": 3}, {"use": "dark", "weight": 0.5}])
    micro_batches = step(m)
    members = {s.picture.seed: s for micro_batch in micro_batches for s in micro_batch.samples}
    order = [members[seed_of(3, 0, p.id, k)] for p in (s.picture.prompt for s in members.values()) for k in range(4)]
    red = torch.tensor([float(s.picture.image[0].float().mean()) / 255 for s in order], dtype=torch.float64)
    dark = torch.tensor([1 - float(s.picture.image.float().mean()) / 255 for s in order], dtype=torch.float64)
    for start in range(0, len(order), 4):
        a, b = ((v - v.mean()) / v.std(correction=0) for v in (red[start : start + 4], dark[start : start + 4]))
        by_hand = 0.5 + (3 * a + 0.5 * b) / 3.5 / 10
        assert [s.r for s in order[start : start + 4]] == pytest.approx(by_hand.tolist())
    facts = micro_batches[0].metrics
    assert float(facts["reward/glow"]) == pytest.approx(float(red.unique().mean()), abs=0.05)
    assert {"reward/glow", "reward/glow/red", "reward/dark"} <= facts.keys()


# ---- when the judge fails --------------------------------------------------------------------------------------------


def test_a_rollout_with_too_many_failures_is_thrown_away_and_counted(pipeline):
    m = method(pipeline, rewards=glow(broken=[0, 1]))
    micro_batches = step(m)
    assert (m.rollout, m.aborted) == (0, 2)
    assert float(micro_batches[0].metrics["aborted"]) == 2 and float(micro_batches[0].metrics["failed"]) == 0
    sound = step(method(pipeline))
    prompt_ids, others = (
        {s.picture.prompt.id for x in batches for s in x.samples} for batches in (micro_batches, sound)
    )
    assert prompt_ids == others, "the same prompts"
    assert pictures(micro_batches).keys().isdisjoint(pictures(sound)), "but new pictures"


def test_a_step_in_parts_is_the_step_as_a_whole(pipeline):
    options = {"prompts_per_rollout": 4, "kl": 0.5}
    whole = behind(nudged(method(pipeline, **options)))
    expected, metrics = learned(whole, step(whole))
    parts = [next(whole.steps(iter([Shard(n, 2)]), whole.trainable_modules(), rng())) for n in range(2)]
    seen = [{s.picture.prompt.id for x in part for s in x.samples} for part in parts]
    assert len(seen[0]) == len(seen[1]) == 2 and not seen[0] & seen[1]
    gradient, both = learned(whole, *parts)
    assert close(gradient, expected)
    for name in ("policy", "to_old", "to_reference", "reward/glow", "pictures"):
        assert both[name] == pytest.approx(metrics[name], rel=1e-5)


@pytest.mark.parametrize("combine", ["normalise_then_sum", "sum_then_normalise"])
@pytest.mark.parametrize("parts", [2, 4])
def test_the_spread_of_a_rollout_is_that_of_all_its_parts(parts, combine, pipeline):
    options = {"prompts_per_rollout": 4, "std_scope": "rollout", "combine": combine, "updates_per_rollout": 2,
               "rewards": [{"use": "glow", "weight": 3, "dull": 1}, "dark"]}  # fmt: skip
    whole, divided = (method(pipeline, **options) for _ in range(2))

    def rs(m: DiffusionNFT, *shards: Shard) -> dict[int, float]:
        streams = [m.steps(iter([shard]), m.trainable_modules(), rng()) for shard in shards]
        steps = [micro_batches for stream in streams for micro_batches in (next(stream), next(stream))]
        return {s.picture.seed: s.r for micro_batches in steps for x in micro_batches for s in x.samples}

    alone, together = rs(whole, Shard()), rs(divided, *(Shard(n, parts) for n in range(parts)))
    assert len(alone) >= 12 and together == pytest.approx(alone, abs=1e-12)
    whole.rollout = divided.rollout = 1
    one, other = rs(whole, Shard()), rs(divided, *(Shard(n, parts) for n in range(parts)))
    assert other == pytest.approx(one, abs=1e-12) and one.keys().isdisjoint(alone), "and of the next rollout"


def test_a_part_that_is_asked_alone_knows_the_whole_rollout_too(pipeline):
    m = method(pipeline, prompts_per_rollout=4, std_scope="rollout")
    whole = {
        s.picture.seed: s.r
        for x in step(method(pipeline, prompts_per_rollout=4, std_scope="rollout"))
        for s in x.samples
    }
    for shard in (Shard(1, 2), Shard(1, 2), Shard(0, 2)):  # a stream that begins anew draws again
        micro_batches = next(m.steps(iter([shard]), m.trainable_modules(), rng()))
        mine = {s.picture.seed: s.r for x in micro_batches for s in x.samples}
        assert len(mine) == 8 and mine == pytest.approx({k: whole[k] for k in mine}, abs=1e-12)


def test_prompts_that_cannot_be_shared_out_are_refused(pipeline):
    m = method(pipeline, prompts_per_rollout=3)
    with pytest.raises(ConfigError, match="3 prompts have no equal shares for 2 parts"):
        next(m.steps(iter([Shard(0, 2)]), m.trainable_modules(), rng()))


@pytest.mark.parametrize(("allowed", "aborted"), [(0.24, True), (0.25, False)])
def test_how_many_failures_are_too_many_is_a_setting(allowed, aborted, pipeline):
    m = method(pipeline, rewards=glow(fails=[1]), max_failed=allowed)
    if aborted:
        with pytest.raises(LensError, match=r"5 rollouts in a row .* glow says failed \(the judge is away\): fix it"):
            step(m)
        assert m.aborted == 5
    else:
        facts = step(m)[0].metrics
        assert (float(facts["failed"]), float(facts["masked"]), m.aborted) == (0.25, 0.25, 0)


def test_a_judge_that_only_abstains_is_reported(pipeline):
    with pytest.raises(LensError, match="the reward glow says abstain"):
        step(method(pipeline, rewards=glow(abstains=[0, 1, 2, 3])))


def test_a_score_that_is_not_finite_is_a_failure(pipeline):
    with pytest.raises(LensError, match=r"failed \(not finite: nan\)"):
        step(method(pipeline, rewards=glow(value=math.nan)))


def test_a_reward_that_loses_a_score_is_named(pipeline):
    with pytest.raises(LensError, match=r"glow\.score returned 7 scores for 8 images"):
        step(method(pipeline, rewards=glow(short=True)))


# ---- the old policy --------------------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {}
LATE = {"old_policy_wait": 75, "old_policy_decay_rise": 0.0075, "old_policy_max_decay": 0.999}


@pytest.mark.parametrize(
    ("options", "lags"),
    [
        ({"old_policy_decay_rise": 0}, [0, 0, 0, 0, 0]),
        (LINEAR, [0.075, 0.1, 0.18, 0.209, 0.5]),
        (LATE, [0, 0.1875, 0.7875, 0.999, 0.999]),
    ],
)
def test_the_lag_is_that_of_the_published_schedules(options, lags, pipeline):
    config = method(pipeline, **options).config
    assert [config.old_policy_decay(s) for s in (75, 100, 180, 209, 500)] == pytest.approx(lags)


def test_a_lag_of_zero_copies_and_of_one_freezes(pipeline):
    m = nudged(method(pipeline))
    before = {k: v.clone() for k, v in m.old.state_dict().items()}
    ema_update(m.old, pipeline.backbone, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in m.old.state_dict().items())
    ema_update(m.old, pipeline.backbone, 0.25)
    for k, v in m.old.state_dict().items():
        torch.testing.assert_close(v, 0.25 * before[k] + 0.75 * pipeline.backbone.state_dict()[k])
    ema_update(m.old, pipeline.backbone, 0.0)
    assert all(torch.equal(v, pipeline.backbone.state_dict()[k]) for k, v in m.old.state_dict().items())


def test_counts_are_copied_and_not_averaged():
    old, new = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    new.num_batches_tracked += 5
    ema_update(old, new, 0.5)
    assert int(old.num_batches_tracked) == 5


def test_the_old_policy_follows_once_a_rollout(pipeline):
    m = nudged(method(pipeline, updates_per_rollout=2, old_policy_decay_rise=0.1))
    before = m.old.inner.weight.clone()
    m.after_step(0, m.trainable_modules())
    assert torch.equal(m.old.inner.weight, before) and (m.rollout, m.update) == (0, 1)
    m.after_step(1, m.trainable_modules())
    torch.testing.assert_close(m.old.inner.weight, 0.2 * before + 0.8 * pipeline.backbone.inner.weight)
    assert (m.rollout, m.update) == (1, 0)


def test_neither_copy_learns(pipeline):
    m = method(pipeline)
    learned(m, step(m))
    copies = [*m.old.parameters(), *m.reference.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in copies)
    assert not {id(p) for p in copies} & {id(p) for p in pipeline.backbone.parameters()}


# ---- in the loop -----------------------------------------------------------------------------------------------------

RECIPE = Recipe(
    method=ComponentSpec(
        "diffusion_nft",
        {**OPTIONS, "updates_per_rollout": 2, "old_policy_decay_rise": 0.1, "sizes": [[16, 16], [16, 32]]},
    ),
    dataset=ComponentSpec("squares"),
    train=Training(steps=6, lr=1e-2, ema_decay=0.9, save_every=1, keep_checkpoints=9, log_every=2),
    pipeline=toy.PARTS,
    seed=3,
)


@pytest.fixture
def run(catalog: Catalog, tmp_path: Path) -> Any:
    return lambda name, recipe=RECIPE: Trainer(recipe, catalog, tmp_path / name, log=lambda line: None)


def state(folder: Path, number: int = 6) -> tuple[dict[str, Tensor], dict[str, Any]]:
    where = folder / "checkpoints" / f"step-{number:07d}"
    return tensor_files.read_tensors(where / "state.safetensors"), atomic_files.read_json(where / "state.json")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_goes_on_bit_for_bit_even_inside_a_rollout(stop, run, tmp_path, monkeypatch):
    run("whole").train()
    halted = run("halted")
    after = halted.method.after_step

    def halt(number: int, modules: Any) -> None:
        after(number, modules)
        if number + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    halted.method.after_step = halt
    assert halted.train().steps == stop
    torch.manual_seed(99)
    run("halted").train()
    (whole, counters), (resumed, others) = state(tmp_path / "whole"), state(tmp_path / "halted")
    assert same(whole, resumed)
    assert counters["method"] == others["method"] == {"rollout": 3, "update": 0, "aborted": 0}
    # A run that forgot the method's state would have been another run.
    for folder in sorted((tmp_path / "halted" / "checkpoints").iterdir())[stop:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    monkeypatch.setattr(DiffusionNFT, "load_state_dict", lambda self, state: None)
    run("halted").train()
    assert not same(whole, state(tmp_path / "halted")[0])


def test_a_policy_that_learns_through_an_adapter_resumes_too_and_keeps_no_copy_of_the_rest(run, tmp_path):
    low = evolve(RECIPE, train=evolve(RECIPE.train, lora={"backbone": LoraSpec(rank=2)}))
    whole = run("whole", low)
    whole.train()
    halted = run("halted", low)

    def turns(number: int) -> list[str]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return ["backbone"]

    halted.method.update_order = turns
    assert halted.train().steps == 3
    run("halted", low).train()
    tensors = state(tmp_path / "whole")[0]
    assert same(tensors, state(tmp_path / "halted")[0])
    kept = {k for k in tensors if k.startswith("method/")}
    assert kept and all(k.startswith("method/old/") and ".lora_" in k for k in kept)
    name = "outer.lora_B.default.weight"
    learned, old = tensors[f"net/backbone/{name}"], tensors[f"method/old/{name}"]
    assert old.abs().max() > 0 and not torch.equal(old, learned)


def test_a_policy_that_learns_through_an_adapter_holds_one_frozen_backbone(run):
    going = run("low", evolve(RECIPE, train=evolve(RECIPE.train, lora={"backbone": LoraSpec(rank=2)})))
    method, policy = going.method, going.pipeline.backbone
    modules = {"policy": policy, "old": method.old, "reference": method.reference}
    low = {name: {n: p for n, p in net.named_parameters() if ".lora_" in n} for name, net in modules.items()}
    rest = {name: {n: p for n, p in net.named_parameters() if ".lora_" not in n} for name, net in modules.items()}
    assert all(rest["policy"][n] is p for name in ("old", "reference") for n, p in rest[name].items())
    assert len({id(p) for each in low.values() for p in each.values()}) == 3 * len(low["policy"]) > 0
    before = {n: p.clone() for n, p in rest["policy"].items()}
    versions = {n: p._version for n, p in rest["policy"].items()}
    with torch.no_grad():
        for p in low["policy"].values():
            p += 1
    ema_update(method.old, policy, 0.5)
    assert all(torch.equal(p, before[n]) and p._version == versions[n] for n, p in rest["policy"].items())
    assert all((low["policy"][n] - p).mean().item() == pytest.approx(0.5) for n, p in low["old"].items())
    assert all((low["policy"][n] - p).mean().item() == pytest.approx(1.0) for n, p in low["reference"].items())


def test_the_method_keeps_its_contract(catalog):
    def made() -> DiffusionNFT:
        pipeline = LensPipeline.from_parts(RECIPE.pipeline, catalog)
        pipeline.catalog = catalog
        return method(pipeline, updates_per_rollout=2, old_policy_decay_rise=0.1)

    check_method(made, [Shard()], steps=3)


def test_a_run_logs_what_there_is_to_watch(run, tmp_path):
    report = run("a").train()
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    watched = {"reward/glow", "reward/glow/red", "failed", "masked", "zero_variance", "r_10", "r_50", "r_90"}
    watched |= {"diversity", "to_old", "to_reference", "policy", "pictures", "aborted", "loss", "grad_norm"}
    assert {f"backbone/{name}" for name in watched} <= rows[-1].keys()
    assert [row["backbone/pictures"] for row in rows] == [8, 16, 24]
    assert all(row["backbone/r_10"] < 0.5 < row["backbone/r_90"] and row["backbone/diversity"] > 0 for row in rows)
    assert all(v == v for row in rows for v in row.values())
    assert report.model is not None and (report.model / "lens.json").is_file()


def test_the_saved_state_holds_the_old_policy_and_the_start(run, tmp_path):
    run("a").train()
    start = run("b").pipeline.backbone.state_dict()
    tensors = state(tmp_path / "a")[0]
    assert all(torch.equal(tensors[f"method/reference/{k}"], v) for k, v in start.items())
    assert not any(torch.equal(tensors[f"method/old/{k}"], v) for k, v in start.items())
    assert not any(torch.equal(tensors[f"method/old/{k}"], tensors[f"net/backbone/{k}"]) for k in start)


# ---- the border ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": []}, "rewards: must have at least 1 item"),
        ({"rewards": glow(weight=0)}, r"rewards\[0\]\.weight: must be above 0, not 0"),
        ({"rewards": glow(weight=True)}, r"rewards\[0\]\.weight: must be a number, not True"),
        ({"pictures_per_prompt": 1}, "pictures_per_prompt: must be at least 2"),
        ({"beta": 0.0, "timesteps_per_image": 0}, "timesteps_per_image: must be at least 1, not 0"),
        ({"beta": 0.0, "timesteps_per_image": 0}, "beta: must be above 0, not 0.0"),
        ({"kl": -1.0}, "kl: must be at least 0, not -1.0"),
        ({"old_policy_max_decay": 1.5}, "old_policy_max_decay: must be at least 0 and at most 1"),
        ({"loss_space": "eps"}, "loss_space"),
        ({"std_scope": "all"}, "std_scope"),
        ({"rewards": ["glowe"]}, r"\$\.method\.rewards\[0\]: no reward is called 'glowe'\. Did you mean 'glow'\?"),
        ({"rewards": ["dark", {"use": "glow", "failz": [1]}]}, r"\$\.method\.rewards\[1\]\.failz: unknown"),
        ({"tasks": ["evens"]}, "no task of the prompts is called 'evens'. Did you mean 'even'?"),
        ({"prompts": {"use": "colours", "count": 1}}, "has 1 prompts, fewer than a rollout takes"),
        ({"prompts": {"use": "colours", "twins": True}}, "prompts of one id"),
        ({"sizes": [[16, 20]]}, "width 20 is not a multiple of 16"),
    ],
)
def test_an_impossible_config_is_refused(options, words, pipeline):
    with pytest.raises(ConfigError, match=words):
        method(pipeline, **options)


def test_a_pipeline_that_cannot_draw_is_refused(pipeline):
    pipeline.sampler = None
    with pytest.raises(ConfigError, match="the pipeline has no sampler"):
        method(pipeline)


def test_without_sizes_the_pipelines_own_is_drawn(pipeline):
    pipeline.presets["base_resolution"] = 32
    step(method(pipeline, sizes=[]))
    assert Glow.calls[0][0].shape[-2:] == (32, 32)


def test_advantages_of_a_rollout_are_shared_by_its_micro_batches(pipeline):
    micro_batches = step(method(pipeline, timesteps_per_image=1, micro_batch_size=100, std_scope="rollout"))
    (micro_batch,) = micro_batches
    red = torch.tensor([[float(s.picture.image[0].float().mean()) / 255 for s in micro_batch.samples]]).double()
    none = torch.zeros(len(micro_batch.samples), dtype=torch.bool)
    by_hand = advantages(red, none, [s.picture.prompt.id for s in micro_batch.samples], [1.0], 1e-4, over_rollout=True)
    assert [s.r for s in micro_batch.samples] == pytest.approx((0.5 + by_hand.value / 10).tolist())


# ---- fallbacks, and what a recipe names ------------------------------------------------------------------------------


def test_a_run_whose_judge_is_away_learns_from_its_fallback(pipeline):
    m = method(pipeline, rewards=glow(broken=[0], fallback="dark"))
    micro_batches = step(m)
    assert (
        m.aborted == 0
        and float(micro_batches[0].metrics["fallback"]) == 1
        and float(micro_batches[0].metrics["failed"]) == 0
    )
    alone = step(method(pipeline, rewards=["dark"]))
    mine, theirs = ({s.picture.seed: s.r for x in batches for s in x.samples} for batches in (micro_batches, alone))
    assert mine == theirs
    assert len(set(mine.values())) > 2  # and it does tell pictures apart


@pytest.mark.parametrize("combine", ["normalise_then_sum", "sum_then_normalise"])
def test_the_way_to_combine_rewards_is_a_setting(combine, pipeline):
    rewards = [{"use": "glow", "weight": 9}, "dark"]
    micro_batches = step(method(pipeline, rewards=rewards, combine=combine))
    samples = {s.picture.seed: s for x in micro_batches for s in x.samples}
    groups: dict[int, list[Any]] = {}
    for s in samples.values():
        groups.setdefault(s.picture.prompt.id, []).append(s)
    for group in groups.values():
        red = torch.tensor([float(s.picture.image[0].float().mean()) / 255 for s in group], dtype=torch.float64)
        dark = torch.tensor([1 - float(s.picture.image.float().mean()) / 255 for s in group], dtype=torch.float64)

        def normal(v: Tensor) -> Tensor:
            return (v - v.mean()) / v.std(correction=0)

        both = {
            "normalise_then_sum": 0.9 * normal(red) + 0.1 * normal(dark),
            "sum_then_normalise": normal(0.9 * red + 0.1 * dark),
        }
        assert [s.r for s in group] == pytest.approx((0.5 + both[combine] / 10).tolist())
    assert not torch.allclose(*both.values(), atol=1e-3)


def test_the_histogram_of_r_adds_up(pipeline):
    facts = step(method(pipeline))[0].metrics
    shares = [float(v) for k, v in facts.items() if k.startswith("r_in/")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1)
    assert 0 < max(shares) < 1
    assert float(facts["masked_groups"]) == 0


def test_the_components_that_a_method_names_are_checked_with_its_recipe(catalog, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "pipeline: {vae: blocks, text_encoder: letters, backbone: mixer, sampler: even}\n"
        "method: {use: diffusion_nft, prompts: {use: colors}, rewards: [{use: glow, fallback: {use: dark, wait: 3}},\n"
        "  {use: dark, weight: 2, fallback: glov}]}\n"
        "train: {steps: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog)
    assert [p.removeprefix(f"{path}: $.method.") for p in caught.value.problems] == [
        "prompts: no benchmark is called 'colors'. Did you mean 'colours'?",
        "rewards[0].fallback.wait: unknown. Did you mean 'weight'? Fields: weight.",
        "rewards[1].fallback: no reward is called 'glov'. Did you mean 'glow'?",
    ]
