"""diffusion_nft at work in the plane: a velocity that knows two modes learns to prefer the one that is rewarded."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens_nft
import pytest
import torch
import toy
from attrs import frozen
from torch import Tensor, nn

from lens_core import flow, hookimpl
from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training
from lens_core.training.trainer import Trainer
from lens_core.types import Prompt, Score, TextFeatures

MODE, SPREAD = 2.0, 0.3  # a prompt's pictures are points near (±2, its own height)
HEIGHTS = {"a": -1.5, "b": -0.5, "c": 0.5, "d": 1.5}


class Plane(toy.Weights):
    """A VAE whose latent is a point, and whose picture is 16 px of one colour: red tells x, green tells y."""

    folder, channels, downscale = "vae", 2, 16

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels[:, :2, :1, :1] * 4

    def decode(self, z: Tensor) -> Tensor:
        colour = torch.cat([z, z[:, :1] * 0], 1) / 4 * self.scale
        return colour.expand(-1, -1, 16, 16)


class Arrows(toy.Weights):
    """A velocity in the plane: an MLP of the point, the time and the prompt's letter."""

    folder = "transformer"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(11, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        out: Tensor = self.net(torch.cat([x[:, :, 0, 0], t[:, None], text.features[:, 0, 0]], 1))
        return out[:, :, None, None]


class Letters:
    """Benchmark: the four prompts."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def prompts(self) -> list[Prompt]:
        return [Prompt(letter, i) for i, letter in enumerate(HEIGHTS)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        raise NotImplementedError


class Side:
    """Reward: 1 on the right, or on the left, or anywhere."""

    @frozen
    class Config:
        good: str = "right"

    def __init__(self, config: Config) -> None:
        self.good = config.good

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        right = images[:, 0, 0, 0] > 127
        hits = {"right": right, "left": ~right, "any": right | True}[self.good]
        return [Score("ok", float(hit)) for hit in hits]


@hookimpl
def lens_vaes() -> dict[str, type[Any]]:
    return {"plane": Plane}


@hookimpl
def lens_backbones() -> dict[str, type[Any]]:
    return {"arrows": Arrows}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    return {"letters": Letters}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    return {"side": Side}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.of(toy, lens_nft, sys.modules[__name__])


@pytest.fixture(scope="module")
def start(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that draws both modes of every prompt alike."""
    torch.manual_seed(0)
    parts = PipelineSpec(
        vae=ComponentSpec("plane"),
        text_encoder=ComponentSpec("letters"),
        backbone=ComponentSpec("arrows"),
        sampler=ComponentSpec("even"),
    )
    pipeline = LensPipeline.from_parts(parts, catalog)
    optimizer = torch.optim.AdamW(pipeline.backbone.parameters(), 4e-3)
    steps, rng = 800, torch.Generator().manual_seed(0)
    texts, heights = pipeline.encode(list(HEIGHTS)), torch.tensor(list(HEIGHTS.values()))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        which = torch.randint(4, (128,), generator=rng)
        side = MODE * (2.0 * torch.randint(2, (128,), generator=rng) - 1)
        data = torch.stack([side, heights[which]], 1) + SPREAD * torch.randn(128, 2, generator=rng)
        noise, t = torch.randn(128, 2, 1, 1, generator=rng), torch.rand(128, generator=rng)
        data = data[:, :, None, None]
        v = pipeline.backbone(flow.mix(data, noise, t), t, TextFeatures(texts.features[which], texts.mask[which]))
        loss = (v - flow.velocity(data, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipeline.presets |= {"steps": 10, "guidance_scale": 1.0, "base_resolution": 16}
    folder = tmp_path_factory.mktemp("plane") / "model"
    pipeline.save_pretrained(folder)
    return folder


def points(model: Path, catalog: Catalog) -> Tensor:
    """[4, 250, 2]: where the model draws, prompt by prompt."""
    pipeline = LensPipeline.from_pretrained(model, catalog=catalog, device="cpu")
    prompts = [letter for letter in HEIGHTS for _ in range(250)]
    return pipeline(prompts, seed=10**6, output_type="latent").images.reshape(4, 250, 2)


@pytest.fixture
def train(catalog: Catalog, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains from the start with a reward, and returns (points, log lines)."""
    monkeypatch.setattr(LensPipeline, "catalog", catalog, raising=False)

    def go(good: str, steps: int = 40, **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        method = {"prompts": "letters", "rewards": [{"use": "side", "good": good}], "kl": 0, **options}
        method |= {
            "prompts_per_rollout": 4,
            "pictures_per_prompt": 24,
            "rollout_steps": 10,
            "timesteps_per_image": 3,
            "micro_batch_size": 96,
        }
        recipe = Recipe(
            method=ComponentSpec("diffusion_nft", method),
            dataset=ComponentSpec("squares"),
            train=Training(steps=steps, lr=1e-3, betas=(0.9, 0.999), save_every=1000, log_every=5),
            pipeline=PipelineSpec(start=str(start)),
            seed=1,
        )
        report = Trainer(recipe, catalog, tmp_path / good, log=lambda line: None).train()
        lines = (tmp_path / good / "log.jsonl").read_text().splitlines()
        return points(report.model, catalog), [json.loads(line) for line in lines]

    return go


def right(x: Tensor) -> float:
    return float((x[..., 0] > 0).float().mean())


def test_the_start_draws_both_sides_under_every_prompt(start, catalog):
    drawn = points(start, catalog)
    shares = (drawn[..., 0] > 0).float().mean(1)
    assert 0.35 < shares.min() < shares.max() < 0.65
    torch.testing.assert_close(drawn[..., 1].mean(1), torch.tensor(list(HEIGHTS.values())), atol=0.1, rtol=0)


@pytest.mark.parametrize(("good", "loss_space"), [("right", "x0"), ("left", "velocity")])
def test_the_rewarded_side_wins_and_prompts_stay_apart(good, loss_space, train):
    drawn, log = train(good, loss_space=loss_space)
    share = right(drawn) if good == "right" else 1 - right(drawn)
    assert share > 0.9
    assert (drawn[..., 1].mean(1).diff() > 0.5).all()
    rewards = [row["backbone/reward/side"] for row in log]
    assert rewards[0] < 0.6 and rewards[-1] > 0.85


def test_equal_rewards_change_nothing(train, start, catalog):
    drawn, log = train("any", steps=4)
    assert [row["backbone/grad_norm"] for row in log] == [0]
    assert torch.equal(drawn, points(start, catalog))
