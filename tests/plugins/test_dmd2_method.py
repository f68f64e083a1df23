"""The method dmd2: who learns when, from what, which gradients reach whom, and that a stopped run goes on exactly."""

from __future__ import annotations

import copy
import os
import signal
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens_dmd2
import pytest
import torch
import toy
from attrs import evolve
from lens_dmd2 import losses
from lens_dmd2.method import DMD2, MicroBatch
from torch import Tensor, nn

from lens_core import flow, hookimpl
from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_pixels
from lens_core.recipe import ComponentSpec, LoraSpec, PipelineSpec, Recipe, Training
from lens_core.testing import check_method
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, CheckpointError, ConfigError, LensError, Loss, TextFeatures


class Tapped(toy.Mixer):
    """The toy backbone with two blocks to tap: what goes into its last layer, and that squared."""

    def features(self, x: Tensor, t: Tensor, text: TextFeatures, blocks: Sequence[int]) -> list[Tensor]:
        time = t.to(x.dtype).view(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        inner = torch.tanh(self.inner(torch.cat([x, time], 1).movedim(1, -1))).movedim(-1, 1)
        return [(inner, inner.square())[b] for b in blocks]


class Captions(toy.Squares):
    """The toy dataset without its pictures."""

    def batches(self, rank: int, world: int) -> Any:
        for batch in super().batches(rank, world):
            yield evolve(batch, images=None)


tapped = types.ModuleType("tapped")
tapped.lens_backbones = hookimpl(lambda: {"tapped": Tapped})  # type: ignore[attr-defined]  # a module made here
tapped.lens_backbones.__name__ = "lens_backbones"
tapped.lens_datasets = hookimpl(lambda: {"captions": Captions})  # type: ignore[attr-defined]
CATALOG = Catalog.of(toy, lens_dmd2, tapped)
PARTS = evolve(toy.PARTS, backbone=ComponentSpec("tapped"))
GAN = {"gan_weight": 0.1, "discriminator_blocks": (0, 1)}


def method(**config: Any) -> DMD2:
    """A method whose three networks differ, as they do after some training."""
    torch.manual_seed(0)
    pipeline = LensPipeline.from_parts(PARTS, CATALOG)
    made = DMD2(DMD2.Config(**config), pipeline)
    for number, module_name in enumerate(("generator", "fake")):
        for p in made.trainable_modules()[module_name].parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=rng(number))
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.backbone):
        part.requires_grad_(False).eval()
    return made


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(m: DMD2, rows: int = 4, h: int = 3, w: int = 2) -> MicroBatch:
    text = m.pipeline.encode(["red", "green", "blue", ""][:rows])
    return MicroBatch(text, (h, w), torch.randn(rows, 4, h, w, generator=rng(8)))


@pytest.mark.parametrize("module_name", ["generator", "fake", "heads"])
def test_the_weight_of_a_batch_weighs_its_losses(module_name: str) -> None:
    m = method(**GAN)
    m.trainable_modules()[module_name].requires_grad_(True)
    plain = next(toy.Squares(toy.Squares.Config()).batches(0, 1))
    totals = {}
    for weight in (1.0, 0.25):
        (made,) = next(iter(m.steps(iter([evolve(plain, weight=weight)]), m.trainable_modules(), rng())))
        totals[weight] = m.loss(module_name, m.trainable_modules(), made, rng()).total
    assert torch.equal(totals[0.25], 0.25 * totals[1.0]) and totals[1.0] != 0


def loss_of(m: DMD2, module_name: str, seed: int = 3) -> Loss:
    """The loss as the loop asks for it: `module_name` alone can learn."""
    m.trainable_modules()[module_name].requires_grad_(True)
    loss = m.loss(module_name, m.trainable_modules(), sample(m), rng(seed))
    m.trainable_modules()[module_name].requires_grad_(False)
    return loss


def learn(m: DMD2, module_name: str, batch: MicroBatch | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Gradients after one update of `module_name` as the loop takes it, by network and parameter."""
    m.trainable_modules()[module_name].requires_grad_(True)
    m.loss(module_name, m.trainable_modules(), batch or sample(m), rng(seed)).total.backward()  # type: ignore[no-untyped-call]
    m.trainable_modules()[module_name].requires_grad_(False)
    everyone = {**m.trainable_modules(), "teacher": m.teacher}
    return {f"{n}.{k}": p.grad for n, net in everyone.items() for k, p in net.named_parameters() if p.grad is not None}


# ---- update order ------------------------------------------------------------------------------------------------


def test_the_critic_learns_several_times_before_the_generator() -> None:
    assert method(fake_score_updates=3).update_order(0) == ["fake", "fake", "fake", "generator"]
    assert method(fake_score_updates=2, **GAN).update_order(7) == ["fake", "heads", "fake", "heads", "generator"]
    warm = method(fake_score_updates=2, warmup=3)
    assert [len(warm.update_order(s)) for s in range(5)] == [2, 2, 2, 3, 3]


def test_teacher_and_fake_start_as_the_backbone_and_share_nothing_with_it() -> None:
    torch.manual_seed(0)
    pipeline = LensPipeline.from_parts(PARTS, CATALOG)
    m = DMD2(DMD2.Config(), pipeline)
    assert m.trainable_modules()["generator"] is pipeline.backbone
    modules = [pipeline.backbone, m.trainable_modules()["fake"], m.teacher]
    for a, b, c in zip(*(net.parameters() for net in modules), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3


def test_the_pipeline_takes_the_students_presets_and_the_teacher_keeps_its_guidance() -> None:
    m = method(steps=3)
    assert (m.pipeline.presets["steps"], m.pipeline.presets["guidance_scale"]) == (3, 1.0)
    assert m.guidance == 5.0
    assert method(guidance_scale=2.5).guidance == 2.5


@pytest.mark.parametrize("module_name", ["generator", "fake", "heads"])
@pytest.mark.parametrize("rollout", ["ode", "renoise"])
def test_only_the_module_that_is_updated_gets_gradients(module_name: str, rollout: str) -> None:
    for seed in range(4):  # other exit steps
        gradients = learn(method(rollout=rollout, isg_weight=0.5, **GAN), module_name, seed=seed)
        assert gradients and {name.split(".")[0] for name in gradients} == {module_name}
        assert all(g.any() for name, g in gradients.items() if "bias" not in name)


def test_gradients_of_the_exit_step_survive_a_rollout_under_autocast() -> None:
    # A rollout without gradients must not leave casts of the weights behind that have none.
    m = method()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about autocast on some CPUs
        with torch.autocast("cpu", torch.bfloat16):
            m.trainable_modules()["generator"].requires_grad_(True)
            loss = m.loss("generator", m.trainable_modules(), sample(m), rng(3)).total
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in m.trainable_modules()["generator"].parameters())


def test_only_the_exit_step_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    m = method()
    graded: list[list[bool]] = []
    forward = toy.Mixer.forward

    def watch(self: toy.Mixer, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        if self is m.trainable_modules()["generator"]:
            graded[-1].append(torch.is_grad_enabled())
        return forward(self, x, t, text)

    monkeypatch.setattr(toy.Mixer, "forward", watch)
    for seed in range(20):
        graded.append([])
        learn(m, "generator", seed=seed)
    assert all(calls == [False] * (len(calls) - 1) + [True] for calls in graded)
    assert {len(calls) for calls in graded} == {1, 2, 3, 4}


def test_the_exit_step_is_drawn_evenly_and_before_anything_else() -> None:
    m, counts = method(), [0] * 4
    for seed in range(400):
        _, t, after, _ = m._exit_step(m.trainable_modules(), sample(m, rows=1, h=1, w=1), rng(seed))
        index = int(torch.randint(4, (), generator=rng(seed)))
        assert (t, after) == (1 - index / 4, 0.75 - index / 4)
        counts[index] += 1
    assert min(counts) > 70


# ---- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", ["joint", "decoupled"])
def test_an_undistilled_model_without_guidance_has_nothing_to_learn(matching: str) -> None:
    torch.manual_seed(0)
    pipeline = LensPipeline.from_parts(PARTS, CATALOG)
    m = DMD2(DMD2.Config(guidance_scale=1.0, matching="joint"), pipeline)
    m.config = DMD2.Config(guidance_scale=1.0, matching=matching)  # which a recipe could not say: there is no engine
    assert not any(g.any() for g in learn(m, "generator").values())
    m.guidance = 5.0
    assert all(g.any() for g in learn(m, "generator").values())


def test_the_generators_gradient_is_that_of_its_formula() -> None:
    m = method(matching="joint", shift=1.0)
    batch = sample(m)
    gradients = learn(m, "generator", batch, seed=11)
    draws = rng(11)
    exit_step = int(torch.randint(4, (), generator=draws))
    x = torch.randn(4, 4, 3, 2, generator=draws)
    net = copy.deepcopy(m.trainable_modules()["generator"]).requires_grad_(True)
    nothing = TextFeatures(batch.text.features[:, :, :0], batch.text.mask[:, :0])

    def at(t: float) -> Tensor:
        return torch.full((4,), t)

    for i in range(exit_step):
        x = (x - 0.25 * net(x, at(1 - i / 4), batch.text)).detach()
    s = 1 - exit_step / 4
    made = x - s * net(x, at(s), batch.text)
    t = torch.rand(4, generator=draws)
    x_t = flow.mix(made, torch.randn(made.shape, generator=draws), t).detach()
    with torch.no_grad():
        guided = flow.guide(m.teacher(x_t, t, batch.text), m.teacher(x_t, t, nothing), 5.0)
        fake = m.trainable_modules()["fake"](x_t, t, batch.text)
        difference = t.view(-1, 1, 1, 1) * (guided - fake)
        distance = (made - flow.data_from(x_t, guided, t)).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
        target = made - difference / distance
    (0.5 * (made - target).square().mean()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[f"generator.{name}"], p.grad, rtol=1e-4, atol=1e-7)


def test_a_true_fake_explains_all_that_can_be_explained() -> None:
    m = method()
    blind = nn.Module()
    blind.forward = lambda x, t, text: torch.zeros_like(x)  # type: ignore[method-assign]  # the mean of its target, about
    part = m.loss("fake", {**m.trainable_modules(), "fake": blind}, sample(m), rng()).parts["unexplained"]
    assert float(part) == pytest.approx(1, abs=0.1)


def test_the_gan_adds_its_weighted_gradient_and_reports_its_size() -> None:
    # The draws of the GAN come last, so the rest of the loss is the same with and without it.
    with_gan, without = method(**GAN), method()
    a, b = loss_of(with_gan, "generator"), loss_of(without, "generator")
    gap = float((a.total - b.total).detach())
    assert gap == pytest.approx(0.1 * float(a.parts["gan"]), rel=1e-4)
    a, b = learn(with_gan, "generator"), learn(without, "generator")
    assert a.keys() == b.keys() and not any(torch.equal(a[k], b[k]) for k in a)
    twice = method(gan_weight=0.2, discriminator_blocks=(0, 1))
    twice._modules["heads"] = with_gan.trainable_modules()["heads"]
    double, once = (loss_of(m, "generator").parts["gan_dm_ratio"] for m in (twice, with_gan))
    assert float(double) == pytest.approx(2 * float(once), rel=1e-5)


def test_the_discriminator_can_read_the_fake_which_does_not_learn_of_it() -> None:
    reads = method(discriminator_features="fake", **GAN)
    like = method(**GAN)
    like._modules["heads"] = reads.trainable_modules()["heads"]
    reads.trainable_modules()["fake"].load_state_dict(reads.teacher.state_dict())
    same = [loss_of(m, "generator").parts["gan"] for m in (reads, like)]
    assert torch.equal(*same), "where the fake is the teacher"
    with torch.no_grad():
        for p in reads.trainable_modules()["fake"].parameters():
            p.mul_(1.5)
    assert not torch.equal(loss_of(reads, "generator").parts["gan"], same[0])
    for module_name in ("generator", "heads"):
        learn(reads, module_name)
        assert all(
            p.grad is None for p in (*reads.trainable_modules()["fake"].parameters(), *reads.teacher.parameters())
        )


def test_isg_adds_its_weighted_loss_at_a_time_within_the_exit_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, inner = [], losses.guidance_within_a_step
    monkeypatch.setattr(losses, "guidance_within_a_step", lambda *a: shares.append(a[-1]) or inner(*a))
    with_isg, without = method(isg_weight=0.5), method()
    for seed in range(40):
        a, b = loss_of(with_isg, "generator", seed), loss_of(without, "generator", seed)
        assert float((a.total - b.total).detach()) == pytest.approx(0.5 * float(a.parts["isg"]), rel=1e-3, abs=1e-6)
    assert min(shares) > 0.1 and max(shares) < 0.9 and max(shares) - min(shares) > 0.6


def test_a_matching_hears_the_time_of_the_exit_step(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, inner = [], losses.decoupled
    monkeypatch.setitem(losses.MATCHINGS, "decoupled", lambda *a: heard.append(a[2]) or inner(*a))
    m, drawn = method(), []
    for seed in range(20):
        loss_of(m, "generator", seed)
        drawn.append(1 - int(torch.randint(4, (), generator=rng(seed))) / 4)
    assert heard == drawn and set(drawn) == {1, 0.75, 0.5, 0.25}


def test_real_and_made_latents_meet_under_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    features = Tapped.features
    monkeypatch.setattr(Tapped, "features", lambda s, x, t, *a: seen.append(x.clone()) or features(s, x, t, *a))
    m = method(shift=1.0, r1_sigma=0.5, **GAN)
    seen.clear()  # of the probe for the width
    batch, draws = sample(m), rng(5)
    total = m.loss("heads", m.trainable_modules(), batch, rng(5)).total
    count = int(torch.randint(4, (), generator=draws))
    x = torch.randn(4, 4, 3, 2, generator=draws)
    net = m.trainable_modules()["generator"]
    for i in range(count):
        x = x - 0.25 * net(x, torch.full((4,), 1 - i / 4), batch.text)
    s = 1 - count / 4
    made = x - s * net(x, torch.full((4,), s), batch.text)
    t = torch.rand(4, generator=draws)
    noise = torch.randn(x.shape, generator=draws)
    n = torch.randn(x.shape, generator=draws)
    assert batch.z is not None
    real, fake = flow.mix(batch.z, noise, t), flow.mix(made, noise, t)
    for noised, expected in zip(seen, (real, fake, real + 0.5 * n), strict=True):
        torch.testing.assert_close(noised, expected)
    d = [
        m.trainable_modules()["heads"](features(m.teacher, y, t, batch.text, (0, 1)))
        for y in (real, fake, real + 0.5 * n)
    ]
    r1 = ((d[2] - d[0]) / 0.5).square().mean()
    soft = nn.functional.softplus
    torch.testing.assert_close(total, soft(-d[0]).mean() + soft(d[1]).mean() + 0.01 * r1)


def test_heads_learn_to_tell_real_latents_from_the_students() -> None:
    m = method(fake_score_updates=1, **GAN)
    batch = MicroBatch(m.pipeline.encode(["red"] * 16), (3, 2), torch.full((16, 4, 3, 2), 2.0))
    optimizer = torch.optim.Adam(m.trainable_modules()["heads"].requires_grad_(True).parameters(), 1e-2)
    draws, log = rng(), []
    for _ in range(40):
        loss = m.loss("heads", m.trainable_modules(), batch, draws)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        log.append({k: float(v) for k, v in loss.parts.items()})
    assert log[0].keys() == {"real", "fake", "r1"}
    first, late = (sum(line["real"] - line["fake"] for line in part) / len(part) for part in (log[:1], log[-10:]))
    assert abs(first) < 0.5 and late > 2


def test_what_predicts_collapse_is_logged() -> None:
    m = method(**GAN)
    assert loss_of(m, "generator").parts.keys() == {
        "gap", "cosine", "ca_dm_ratio", "x_std", "gradient_rms", "gan", "gan_dm_ratio",
    }  # fmt: skip
    assert loss_of(m, "fake").parts.keys() == {"unexplained"}


# ---- what it learns from ----------------------------------------------------------------------------------------


def batch(images: bool = True, px: int = 16) -> Batch:
    return Batch(torch.full((2, 3, px, 2 * px), 99, dtype=torch.uint8) if images else None, ("red", "blue"))


def encoded(m: DMD2, *batches: Batch) -> list[MicroBatch]:
    return [micro for step in m.steps(iter(batches), m.trainable_modules(), rng()) for micro in step]


def test_the_size_is_that_of_the_pictures_whose_latents_only_a_gan_needs() -> None:
    (plain,), (gan,) = encoded(method(), batch(px=32)), encoded(method(**GAN), batch(px=32))
    assert plain.size == gan.size == (2, 4) and plain.z is None and gan.z is not None
    m = method(**GAN)
    torch.testing.assert_close(gan.z, m.pipeline.vae.encode(to_pixels(batch(px=32).images)))
    torch.testing.assert_close(gan.text.features, m.pipeline.encode(["red", "blue"]).features)


def test_captions_alone_are_drawn_in_the_sizes_of_the_recipe() -> None:
    m = method(sizes=((16, 32), (48, 16)))
    assert {s.size for s in encoded(m, *[batch(images=False)] * 20)} == {(1, 2), (3, 1)}
    m = method()
    m.pipeline.presets["base_resolution"] = 64
    assert [s.size for s in encoded(m, batch(images=False))] == [(4, 4)]
    with pytest.raises(LensError, match="need one that yields pictures"):
        encoded(method(**GAN), batch(images=False))


def test_batches_are_not_pulled_ahead_and_gradients_stay_on() -> None:
    left, m = iter([batch(), batch()]), method()
    next(iter(m.steps(left, m.trainable_modules(), rng())))
    assert len(list(left)) == 1
    for _ in m.steps(iter([batch()]), m.trainable_modules(), rng()):
        assert torch.is_grad_enabled()


# ---- between steps ----------------------------------------------------------------------------------------------


def test_the_fake_is_drawn_to_the_student_after_each_of_its_updates() -> None:
    m = method(ida=0.75, warmup=2)
    fake, student = (copy.deepcopy(m.trainable_modules()[r]) for r in ("fake", "generator"))
    for step, keep in ((1, 1.0), (2, 0.75)):
        m.after_step(step, m.trainable_modules())
        for now, f, s in zip(
            m.trainable_modules()["fake"].parameters(), fake.parameters(), student.parameters(), strict=True
        ):
            torch.testing.assert_close(now, keep * f + (1 - keep) * s)


RECIPE = Recipe(
    method=ComponentSpec(
        "dmd2",
        {
            "fake_score_updates": 3,
            "gan_weight": 0.1,
            "discriminator_blocks": [0, 1],
            "isg_weight": 0.1,
            "rollout": "renoise",
        },
    ),
    dataset=ComponentSpec("squares"),
    train=Training(steps=5, lr=1e-2, ema_decay=0.9, save_every=2, log_every=1),
    pipeline=PARTS,
    seed=3,
)


def run(recipe: Recipe, out: Path) -> Trainer:
    return Trainer(recipe, CATALOG, out, log=lambda line: None)


def state(out: Path, step: int) -> dict[str, Tensor]:
    return tensor_files.read_tensors(out / "checkpoints" / f"step-{step:07d}" / "state.safetensors")


@pytest.mark.parametrize("turn", [1, 4, 6])
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_interrupted_within_a_cycle_goes_on_bit_for_bit(
    turn: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(RECIPE, tmp_path / "whole").train()
    halted = run(RECIPE, tmp_path / "halted")
    loss, left = DMD2.loss, [7 * 2 + turn]  # turns taken before the third step's interruption

    def interrupted(self: DMD2, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if how == "killed":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *arguments)

    monkeypatch.setattr(DMD2, "loss", interrupted)
    if how == "killed":
        with pytest.raises(MemoryError):
            halted.train()
    else:
        assert halted.train().steps == 3
    monkeypatch.setattr(DMD2, "loss", loss)
    torch.manual_seed(99)
    run(RECIPE, tmp_path / "halted").train()
    whole, resumed = state(tmp_path / "whole", 5), state(tmp_path / "halted", 5)
    assert whole.keys() == resumed.keys()
    assert {k.split("/")[1] for k in whole if k.startswith("optimizer/")} == {"generator", "fake", "heads"}
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("config", [{}, {"rollout": "renoise", "matching": "joint", "isg_weight": 0.1, **GAN}])
def test_it_keeps_the_promises_of_a_method(config: dict[str, Any]) -> None:
    def make() -> DMD2:
        pipeline = LensPipeline.from_parts(PARTS, CATALOG)
        return DMD2(DMD2.Config(fake_score_updates=2, **config), pipeline)

    check_method(make, [batch(), batch(px=32)])


def test_a_run_from_a_checkpoint_exports_a_student_and_resumes_with_the_same_teacher(tmp_path: Path) -> None:
    torch.manual_seed(1)
    LensPipeline.from_parts(evolve(PARTS, steps=20, guidance_scale=3.0), CATALOG).save_pretrained(tmp_path / "start")
    recipe = evolve(
        RECIPE,
        pipeline=PipelineSpec(start=str(tmp_path / "start")),
        method=ComponentSpec("dmd2"),
        dataset=ComponentSpec("captions"),
    )
    recipe = evolve(recipe, pipeline=evolve(recipe.pipeline, base_resolution=32))
    first = run(recipe, tmp_path / "run")
    report = first.train()
    again = run(recipe, tmp_path / "run")
    assert first.method.guidance == again.method.guidance == 3.0
    for a, b, c in zip(
        first.method.teacher.parameters(),
        again.method.teacher.parameters(),
        LensPipeline.from_pretrained(tmp_path / "start", catalog=CATALOG).backbone.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b) and torch.equal(a, c)
    model = LensPipeline.from_pretrained(report.model, catalog=CATALOG)
    drawn = model("red", height=16, width=16, seed=0)
    assert (drawn.settings["steps"], drawn.settings["guidance_scale"]) == (4, 1.0)
    assert len(model.backbone.calls) == 4, "four passes in all: none is unconditional"
    # another teacher under the same name is refused
    torch.manual_seed(2)
    LensPipeline.from_parts(PARTS, CATALOG).save_pretrained(tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"the start .*, whose hash was \w+ and is \w+;"):
        run(recipe, tmp_path / "run").train()


def test_generator_and_fake_can_be_adapters_without_alignment(tmp_path: Path) -> None:
    adapters = {module_name: LoraSpec(rank=2) for module_name in ("generator", "fake")}
    recipe = evolve(RECIPE, train=evolve(RECIPE.train, lora=adapters, ema_decay=0.0))
    with pytest.raises(ConfigError, match="an adapter is learning; use ida: 1"):
        run(evolve(recipe, method=ComponentSpec("dmd2", {"warmup": 3})), tmp_path / "refused").train()
    done = run(evolve(recipe, method=ComponentSpec("dmd2", {"ida": 1.0, **GAN})), tmp_path / "run")
    done.train()
    teacher, student = done.method.teacher.inner.weight, done.pipeline.backbone.inner.weight
    assert torch.linalg.matrix_rank((student - teacher).detach(), tol=1e-5) == 2
    held = {k.split("/")[1] for k in state(tmp_path / "run", 5) if k.startswith("net/")}
    assert held == {"generator", "fake", "heads"}


def test_one_copy_of_the_weights_trains_as_three_do_and_exports_the_generators_change_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    LensPipeline.from_parts(PARTS, CATALOG).save_pretrained(tmp_path / "start")
    adapters = {module_name: LoraSpec(rank=2) for module_name in ("generator", "fake")}
    recipe = evolve(
        RECIPE,
        pipeline=PipelineSpec(start=str(tmp_path / "start")),
        train=evolve(RECIPE.train, lora=adapters, ema_decay=0.0),
    )
    sizes, models, ends = [], [], []
    for name, shared in (("one", ["generator", "fake"]), ("three", [])):
        made = run(
            evolve(recipe, method=ComponentSpec("dmd2", {"ida": 1.0, "lora_on_shared_base": shared})), tmp_path / name
        )
        modules = (made.method.teacher, *made.modules.values())
        sizes.append(len({p.data_ptr() for net in modules for n, p in net.named_parameters() if ".lora_" not in n}))
        models.append(LensPipeline.from_pretrained(made.train().model, catalog=CATALOG))
        ends.append(state(tmp_path / name, 5))
    assert 3 * sizes[0] == sizes[1]
    assert ends[0].keys() == ends[1].keys() and any(".lora_B." in k and v.any() for k, v in ends[0].items())
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name
    for name, weight in models[0].backbone.state_dict().items():
        assert torch.equal(weight, models[1].backbone.state_dict()[name]), name


def test_weights_that_are_shared_are_not_trained_in_full(tmp_path: Path) -> None:
    for module_name in ("generator", "fake"):
        recipe = evolve(RECIPE, method=ComponentSpec("dmd2", {"ida": 1.0, "lora_on_shared_base": [module_name]}))
        with pytest.raises(ConfigError, match=f"{module_name} shares the teacher's weights and would change them"):
            run(recipe, tmp_path / module_name).train()


def test_a_share_of_the_draws_begins_at_noised_pictures() -> None:
    m, begun = method(real_data_ratio=0.5), 0
    mine = sample(m)
    for seed in range(200):
        x, t, _, _ = m._exit_step(m.trainable_modules(), mine, rng(seed))
        draws = rng(seed)
        torch.randint(4, (), generator=draws)
        torch.rand((), generator=draws)
        noise = torch.randn(mine.z.shape, generator=draws)
        begun += torch.equal(x, flow.mix(mine.z, noise, torch.full((4,), t))) and t < 1
    assert 55 < begun < 95, "half of the three quarters that do not begin at noise"
    assert encoded(m, batch(px=32))[0].z is not None


def test_the_parts_of_a_batch_begin_their_turns_at_the_same_steps() -> None:
    """Where weights are divided, a process that made more passes than another would wait for ever."""
    m = method(real_data_ratio=0.5, fake_score_updates=3)
    one, two = (next(iter(m.steps(iter([batch(px=32)]), m.trainable_modules(), rng(4))))[0] for _ in range(2))
    begun = [
        [m._exit_step(m.trainable_modules(), mine, rng(seed))[1] for _ in m.update_order(100)]
        for seed, mine in ((1, one), (2, two))
    ]
    assert begun[0] == begun[1] and len(set(begun[0])) > 1
    later = next(iter(m.steps(iter([batch(px=32)]), m.trainable_modules(), rng(5))))[0]
    assert [m._exit_step(m.trainable_modules(), later, rng(1))[1] for _ in m.update_order(100)] != begun[0]
    with pytest.raises(LensError, match="gan_weight and real_data_ratio need one that yields pictures"):
        encoded(m, batch(images=False))


# ---- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rollout": "odd"}, "rollout: must be ode or renoise, not 'odd'. Did you mean 'ode'?"),
        ({"matching": "join"}, "matching: must be joint or decoupled, not 'join'. Did you mean 'joint'?"),
        ({"steps": 0}, "steps: must be at least 1 and at most 65536, not 0"),
        ({"min_distance": 0.0}, "min_distance: must be above 0, not 0.0"),
        ({"dm_weight": -1.0}, "dm_weight: must be at least 0, not -1.0"),
        ({"ida": 1.5}, "ida: must be at least 0 and at most 1, not 1.5"),
        ({"real_data_ratio": -0.5}, "real_data_ratio: must be at least 0 and at most 1, not -0.5"),
        (
            {"lora_on_shared_base": ("heads",), "ida": 1.0},
            "lora_on_shared_base[0]: must be generator or fake, not 'heads'",
        ),
        (
            {"lora_on_shared_base": ("fake",)},
            "ida averages whole weights, which lora_on_shared_base makes one; use ida: 1, not 0.97",
        ),
        ({"noise_levels": "evn"}, "noise_levels: must be even or logit_normal, not 'evn'. Did you mean 'even'?"),
        ({"discriminator_head": "cnv"}, "discriminator_head: must be conv or linear, not 'cnv'. Did you mean 'conv'?"),
        (
            {"discriminator_features": "fke"},
            "discriminator_features: must be teacher or fake, not 'fke'. Did you mean 'fake'?",
        ),
        ({"gan_weight": 0.1}, "gan_weight reads discriminator_blocks of the teacher"),
    ],
)
def test_an_impossible_config_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DMD2.Config(**config)
    assert words in str(caught.value)


def test_what_a_pipeline_cannot_give_is_refused(pipeline: LensPipeline) -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale is 1; use a guided teacher, or matching: joint"):
        DMD2(DMD2.Config(guidance_scale=1.0), pipeline)
    with pytest.raises(ConfigError, match="reads features, which this backbone does not offer"):
        DMD2(DMD2.Config(**GAN), pipeline)


def test_the_matching_of_a_recipe_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name, matching in losses.MATCHINGS.items():
        monkeypatch.setitem(losses.MATCHINGS, name, lambda *a, n=name, m=matching: used.append(n) or m(*a))
    for name in ("joint", "decoupled"):
        m = method(matching=name)
        m.loss("generator", m.trainable_modules(), sample(m), rng())
    assert used == ["joint", "decoupled"]
