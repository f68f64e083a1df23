"""Distribution matching as arithmetic: identities, directions, and what each regulariser must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lens_dmd2 import losses
from lens_dmd2.heads import HEADS, Heads
from lens_dmd2.losses import MatchingOptions, Schedule, Views
from torch import Tensor, nn

from lens_core import flow
from lens_core.types import ConfigError

DOUBLE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=DOUBLE)


def cells(t: Tensor) -> Tensor:
    return t.to(DOUBLE).view(-1, 1, 1, 1)


def linear(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A velocity field of x and t, another one for each seed."""
    weight, bias = draw(3, 3, seed=seed), draw(3, seed=seed + 100)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", weight.to(x.dtype), x) + bias.to(x.dtype).view(-1, 1, 1) * cells(t)

    return field


def views(guidance: float = 5.0, fake: int = 3) -> Views:
    return Views(linear(1), linear(2), linear(fake), guidance)


OPTIONS = MatchingOptions(Schedule(3.0), min_distance=0.1)
X = draw(5, 3, 2, 4, seed=9)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- times ------------------------------------------------------------------------------------------------------


def test_a_shift_is_undone_and_keeps_the_ends() -> None:
    u = torch.linspace(0, 1, 11, dtype=DOUBLE)
    t = losses.shifted(u, 7.62)
    assert (t[0], t[-1]) == (0, 1)
    close(torch.tensor([losses.unshifted(float(v), 7.62) for v in t], dtype=DOUBLE), u, 1e-12)
    # four steps at 512 px, as published (reference grid)
    assert losses.shifted(torch.tensor([1, 0.75, 0.5, 0.25]), 7.62).tolist() == pytest.approx(
        [1, 0.958, 0.884, 0.718], abs=5e-4
    )


@pytest.mark.parametrize("until", [1.0, 0.9, 0.2])
def test_noise_levels_stay_cleaner_than_the_exit_step_and_fill_the_range(until: float) -> None:
    _, t, _ = losses.noised(torch.zeros(20_000, 1, 1, 1), rng(), Schedule(3.0), until)
    assert float(t.min()) >= 0 and float(t.max()) < until
    # even before the shift: quartiles of u / u_exit are 1/4, 1/2, 3/4
    u = t.double() / (3 - 2 * t.double()) / losses.unshifted(until, 3.0)
    quartiles = u.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE)).tolist()
    assert quartiles == pytest.approx([0.25, 0.5, 0.75], abs=0.015)


def test_noise_levels_can_be_logit_normal() -> None:
    _, t, _ = losses.noised(torch.zeros(20_000, 1, 1, 1), rng(), Schedule(3.0, "logit_normal"), 0.9)
    u = t.double() / (3 - 2 * t.double()) / losses.unshifted(0.9, 3.0)
    tenths = u.logit().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)).tolist()
    assert tenths == pytest.approx([-1.2816, 0, 1.2816], abs=0.04)  # of N(0, 1)


def test_ca_is_cleaner_than_the_exit_step_and_dm_is_not_bounded() -> None:
    seen: dict[str, list[Tensor]] = {"uncond": [], "fake": []}

    def spy(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: seen[name].append(t) or linear(1)(x, t)  # type: ignore[func-returns-value]  # append: None

    x = draw(64, 3, 1, 1)
    for seed in range(20):
        losses.decoupled(x, Views(linear(1), spy("uncond"), spy("fake"), 5.0), 0.4, OPTIONS, rng(seed))
    assert float(torch.cat(seen["uncond"]).max()) < 0.4  # only CA asks for the view without text
    assert 0.98 < float(torch.cat(seen["fake"]).max()) < 1


# ---- identities -------------------------------------------------------------------------------------------------


def test_velocities_data_noise_and_score_are_one_thing() -> None:
    data, noise, t = X, draw(*X.shape, seed=4), torch.linspace(0.1, 1, 5, dtype=DOUBLE)
    x, v = flow.mix(data, noise, t), flow.velocity(data, noise)
    close(flow.data_from(x, v, t), data, 1e-12)
    close(x + (1 - cells(t)) * v, noise, 1e-12)
    score = -(x - (1 - cells(t)) * data) / cells(t) ** 2
    close(score, -(x + (1 - cells(t)) * v) / cells(t), 1e-12)
    # an Euler step is a re-noising with the noise that the velocity predicts
    after = t / 2
    close(x + (cells(after) - cells(t)) * v, flow.mix(data, noise, after), 1e-12)


def test_the_gradient_is_the_difference_of_two_guesses_over_the_distance_of_a_third() -> None:
    x_t, t, _ = losses.noised(X, rng(), Schedule(3.0))
    ahead, behind, anchor = (linear(s)(x_t, t) for s in (1, 2, 3))
    g = losses.gradient(X, x_t, t, ahead, behind, anchor, 1e-9)
    for row in range(len(X)):
        s = float(t[row])
        guess = {n: x_t[row] - s * v[row] for n, v in (("ahead", ahead), ("behind", behind), ("anchor", anchor))}
        close(g[row], (guess["behind"] - guess["ahead"]) / (X[row] - guess["anchor"]).abs().mean(), 1e-12)


def test_a_distance_below_the_floor_is_the_floor() -> None:
    x_t, t, _ = losses.noised(X, rng(), Schedule(3.0))
    right = (x_t - X) / cells(t)  # the anchor guesses x itself: distance 0
    g = losses.gradient(X, x_t, t, right + 1, right, right, 0.1)
    close(g, (cells(t) / 0.1).expand_as(X), 1e-12)


@pytest.mark.parametrize("rescaled", [True, False])
def test_ca_and_dm_are_dmd_where_noise_and_normaliser_are_shared(rescaled: bool) -> None:
    x_t, t, _ = losses.noised(X, rng(), Schedule(3.0))
    cond, uncond, fake = (linear(s)(x_t, t) for s in (1, 2, 3))
    guided = flow.guide(cond, uncond, 5.0) if rescaled else uncond + 5.0 * (cond - uncond)
    whole = losses.gradient(X, x_t, t, guided, fake, guided, 0.1)
    ca = losses.gradient(X, x_t, t, guided, cond, guided, 0.1)
    dm = losses.gradient(X, x_t, t, cond, fake, guided, 0.1)
    close(ca + dm, whole, 1e-12)
    assert not torch.allclose(whole, ca, rtol=0.1) and not torch.allclose(whole, dm, rtol=0.1)


@pytest.mark.parametrize(("matching", "seed"), [("joint", 5), ("decoupled", 5)])
def test_a_matching_is_its_formula(matching: str, seed: int) -> None:
    loss = losses.MATCHINGS[matching](X, views(), 0.6, OPTIONS, rng(seed))
    again, expected = rng(seed), torch.zeros_like(X)

    def noise(until: float) -> tuple[Tensor, Tensor]:
        u = torch.rand(5, generator=again) * (until / (3 - 2 * until))
        t = 3 * u / (1 + 2 * u)
        e = torch.randn(X.shape, generator=again, dtype=DOUBLE)
        return torch.stack([(1 - cells(t)[i]) * X[i] + cells(t)[i] * e[i] for i in range(5)]), t

    def guess(x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return x_t - cells(t) * v

    def over(difference: Tensor, anchor: Tensor) -> Tensor:
        return difference / (X - anchor).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)

    if matching == "decoupled":
        x_t, t = noise(0.6)
        cond = guess(x_t, t, linear(1)(x_t, t))
        guided = guess(x_t, t, flow.guide(linear(1)(x_t, t), linear(2)(x_t, t), 5.0))
        expected += over(cond - guided, cond)
        x_t, t = noise(1.0)
        cond, fake = guess(x_t, t, linear(1)(x_t, t)), guess(x_t, t, linear(3)(x_t, t))
        expected += over(fake - cond, cond)
    else:
        x_t, t = noise(1.0)
        guided = guess(x_t, t, flow.guide(linear(1)(x_t, t), linear(2)(x_t, t), 5.0))
        expected += over(guess(x_t, t, linear(3)(x_t, t)) - guided, guided)
    close(loss.g, expected, 1e-12)


@pytest.mark.parametrize("matching", ["joint", "decoupled"])
def test_a_fake_that_is_the_unguided_teacher_leaves_nothing_to_learn(matching: str) -> None:
    loss = losses.MATCHINGS[matching](X, views(guidance=1.0, fake=1), 0.6, OPTIONS, rng())
    assert not loss.g.any()
    assert float(loss.parts["gap"]) == 0 and float(loss.parts["cosine"]) == pytest.approx(1)
    other = losses.MATCHINGS[matching](X, views(guidance=1.0, fake=3), 0.6, OPTIONS, rng())
    assert other.g.abs().mean() > 0.1 and float(other.parts["gap"]) > 0.1


def test_the_weights_of_the_two_branches_scale_them_apart() -> None:
    both, ca, dm = (
        losses.decoupled(X, views(), 0.6, MatchingOptions(Schedule(3.0), 0.1, a, b), rng())
        for a, b in ((1, 1), (2, 0), (0, 3))
    )
    close(both.g, ca.g / 2 + dm.g / 3, 1e-12)
    assert float(both.parts["ca_dm_ratio"]) == pytest.approx(float((ca.g / 2).norm() / (dm.g / 3).norm()), rel=1e-12)


# ---- the student's loss -----------------------------------------------------------------------------------------


def test_descent_moves_x_from_the_fakes_guess_to_the_guided_one() -> None:
    x = X.clone().requires_grad_()
    x_t, t, _ = losses.noised(X, rng(), Schedule(3.0))
    cond, uncond, fake = (linear(s)(x_t, t) for s in (1, 2, 3))
    guided = flow.guide(cond, uncond, 5.0)
    g = losses.gradient(X, x_t, t, guided, fake, guided, 1e9)  # one divisor for all rows: directions compare
    losses.descend(x, g * 1e9).backward()
    assert x.grad is not None
    towards = flow.data_from(x_t, guided, t) - flow.data_from(x_t, fake, t)
    assert float(torch.cosine_similarity(-x.grad.flatten(), towards.flatten(), dim=0)) == pytest.approx(1, abs=1e-6)


def test_the_gradient_on_x_is_g_over_the_number_of_elements_in_float32() -> None:
    x = (100 + X.float()).requires_grad_()  # far from 0, where x - (x - g) would lose g's digits
    g = 1e-4 * draw(*X.shape, seed=7).float()
    loss = losses.descend(x, g)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g / g.numel(), rtol=1e-6, atol=0)
    assert float(loss.detach()) == pytest.approx(0.5 * float(g.double().square().mean()), rel=1e-6)


def test_the_fakes_loss_is_least_at_the_mean_velocity() -> None:
    noise = draw(*X.shape, seed=3)
    assert float(losses.tracking(noise - X, X, noise)) == 0
    assert float(losses.tracking(noise - X + 0.5, X, noise)) == pytest.approx(0.25)


# ---- discriminator ----------------------------------------------------------------------------------------------


def test_the_gan_losses_are_cross_entropies_of_the_logits() -> None:
    real, fake = draw(6, 2, seed=1), draw(6, 2, seed=2)
    entropy = nn.functional.binary_cross_entropy_with_logits
    close(
        losses.real_or_fake(real, fake),
        entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)),
        1e-12,
    )
    close(losses.passes_as_real(fake), entropy(fake, torch.ones_like(fake)), 1e-12)


def test_approximate_r1_is_the_squared_norm_of_the_gradient() -> None:
    torch.manual_seed(0)
    heads = Heads([4], width=8)

    def logits(x: Tensor) -> Tensor:
        return heads([x])

    x = torch.randn(512, 4, 4, 4, generator=rng(1)).requires_grad_()
    (exact,) = torch.autograd.grad(logits(x).sum(), x)
    with torch.no_grad():
        at = logits(x)
        estimates = [
            float(losses.approximate_r1(logits, x, at, 0.01, torch.randn(x.shape, generator=rng(n)))) for n in range(64)
        ]
    assert sum(estimates) / len(estimates) == pytest.approx(float(exact.square().sum((1, 2, 3)).mean()), rel=0.03)


def test_approximate_r1_compares_noised_with_noised() -> None:
    seen: list[Tensor] = []
    x_t = draw(2, 3, 2, 2)

    def logits(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sum((1, 2, 3))[:, None]

    assert float(losses.approximate_r1(logits, x_t, logits(x_t), 0.5, torch.ones_like(x_t))) == pytest.approx(12.0**2)
    close(seen[-1], x_t + 0.5, 1e-12)


def test_a_linear_head_is_a_direction_in_the_mean_features() -> None:
    heads, f = Heads([5], kind="linear"), draw(3, 5, 2, 4).float()
    weight, bias = (p.detach() for p in heads.parameters())
    torch.testing.assert_close(heads([f])[:, 0], f.mean((2, 3)) @ weight.flatten() + bias)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_heads_read_any_size_and_do_not_mix_rows(kind: str) -> None:
    torch.manual_seed(0)
    heads = Heads([4, 6], width=8, kind=kind)
    features = [torch.randn(3, c, 5, 2, generator=rng(c)) for c in (4, 6)]
    logits = heads(features)
    assert logits.shape == (3, 2)
    alone = heads([f[1:2] for f in features])
    torch.testing.assert_close(alone[0], logits[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heads(features), logits), "logits are float32 under autocast"


# ---- guidance within a step, alignment --------------------------------------------------------------------------


def test_isg_vanishes_where_all_data_is_one_point() -> None:
    point = draw(1, 3, 2, 4, seed=8)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return (x - point) / cells(t)

    t, after = 0.75, 0.25  # float32 holds them, and the time between
    x = flow.mix(point.expand_as(X), draw(*X.shape), torch.full((5,), t, dtype=DOUBLE))
    v = field(x, torch.full((5,), t, dtype=DOUBLE))
    times = (t, after, 0.5)
    exact = losses.guidance_within_a_step(field, field, x, v, *times)
    assert float(exact) < 1e-28  # a square: the two ways end within 1e-14 of each other
    assert float(losses.guidance_within_a_step(linear(1), field, x, v, *times)) > 1e-3


def test_isg_is_its_formula_and_teaches_the_whole_step_only() -> None:
    t, after, u = 0.75, 0.25, 0.5
    x = X.clone().requires_grad_()
    v = draw(*X.shape, seed=2).requires_grad_()
    loss = losses.guidance_within_a_step(linear(1), linear(2), x, v, t, after, u)
    row = torch.full((5,), t)
    half = X - 0.25 * linear(2)(X, row)
    target = half - 0.25 * linear(1)(half, torch.full((5,), 0.5))
    error = X - 0.5 * v.detach() - target
    close(loss.detach(), error.square().mean(), 1e-12)
    loss.backward()
    assert x.grad is None and v.grad is not None
    close(v.grad, 2 * error * -0.5 / error.numel(), 1e-12)


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.97, 1.0])
def test_alignment_multiplies_the_distance_to_the_student(keep: float) -> None:
    torch.manual_seed(0)
    fake, student = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    fakes, students = ([p.detach().clone() for p in net.parameters()] for net in (fake, student))
    losses.align(fake, student, keep)
    for now, before, goal in zip(fake.parameters(), fakes, students, strict=True):
        if keep in (0.0, 1.0):
            assert torch.equal(now, goal if keep == 0 else before)
        close(now.detach() - goal, keep * (before - goal), 1e-12)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), students, strict=True))


def test_alignment_refuses_adapters_whose_middle_is_another_matrix() -> None:
    plain, adapted = nn.Linear(4, 4), nn.Linear(4, 4)
    adapted.lora_A = nn.Linear(4, 2, bias=False)
    for fake, student in ((plain, adapted), (adapted, plain), (adapted, adapted)):
        with pytest.raises(ConfigError, match="an adapter is learning; use ida: 1"):
            losses.align(fake, student, 0.97)


def test_alignment_of_sharded_weights_is_that_of_whole_ones() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(net: nn.Linear) -> nn.Linear:
        other = nn.Linear(5, 4)
        for name, p in net.named_parameters():
            setattr(other, name, nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])))
        return other

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.manual_seed(0)
        fake, student = nn.Linear(5, 4), nn.Linear(5, 4)
        fake_shards, student_shards = sharded(fake), sharded(student)
        losses.align(fake, student, 0.9)
        losses.align(fake_shards, student_shards, 0.9)
        for name, p in fake.named_parameters():
            assert torch.equal(fake_shards.get_parameter(name).full_tensor(), p)
    finally:
        distributed.destroy_process_group()


def test_a_ratio_to_nothing_is_large_and_finite() -> None:
    ratio = float(losses.ratio(torch.ones(4), torch.zeros(4)))
    assert 1e6 < ratio < float("inf")
    assert float(losses.ratio(torch.full((4,), 3.0), torch.ones(4))) == pytest.approx(3)
