"""The script that trained the embedded model: what it caches, how it learns, and what comes out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lens_core import LensPipeline


@pytest.fixture(scope="module")
def script(import_script: Callable[[str], Any]) -> Any:
    return import_script("train_embedded")


@pytest.fixture(scope="module")
def tiny() -> LensPipeline:
    return LensPipeline.from_pretrained("tiny:", dtype=torch.bfloat16, device="cpu")


def tokens_of(encoder: Any, captions: list[str]) -> list[bytes]:
    ids, mask = encoder.rendered(captions)
    head = encoder.head_length
    rows = zip(ids[:, head:].numpy().astype(np.int16), mask[:, head:].sum(1).tolist(), strict=True)
    return [row[:n].tobytes() for row, n in rows]


def test_stored_captions_are_what_the_encoder_makes_of_them(script: Any, tiny: LensPipeline) -> None:
    encoder: Any = tiny.text_encoder
    captions = ["a red circle", 'the word "CAT"', "a red circle", "two stars on a mint background"]
    long = ", ".join(["a red circle"] * 30)
    store = script.TextStore(encoder.layers, encoder.width, 40, 8, torch.device("cpu"))
    rows = store.add(encoder, tokens_of(encoder, [*captions, long]))
    assert rows == [1, 2, 1, 3, 0]  # equal ones once; one that does not fit has the row of no text
    text = encoder.encode(captions)
    width = text.mask.shape[1]
    assert torch.equal(store.features[rows[:4], :, :width], text.features.to(torch.bfloat16))
    assert store.lengths[rows].tolist() == [*text.mask.sum(1).tolist(), 0]
    assert store.add(encoder, tokens_of(encoder, captions[:1])) == [1]


def test_a_cache_draws_latents_with_their_captions(script: Any, tiny: LensPipeline) -> None:
    encoder, vae = tiny.text_encoder, tiny.vae
    store = script.TextStore(encoder.layers, encoder.width, 40, 8, torch.device("cpu"))
    rows = torch.tensor(store.add(encoder, tokens_of(encoder, ["a red circle", "a blue star"])))
    group = script.Group("64", (64, 64), 1, False, 40, 2)
    cache = script.Cache(group, vae.channels, vae.downscale, store, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    cache.add(vae, images, rows)
    rng = torch.Generator().manual_seed(1)
    z, features, mask = cache.draw(64, 0.0, rng)
    for latent, text, known in zip(z, features, mask, strict=True):
        (place,) = [n for n in range(2) if torch.equal(latent, cache.latents[n])]
        assert torch.equal(text, store.features[rows[place]]) and known.sum() == store.lengths[rows[place]]
    _, _, mask = cache.draw(400, 0.25, rng)
    assert 0.15 < (~mask.any(1)).float().mean() < 0.35  # a dropped caption leaves no token


def test_a_step_learns_and_its_average_follows(script: Any) -> None:
    torch.manual_seed(0)
    options = argparse.Namespace(small=True, go_on=False)
    net = script.LensTransformer2DModel(script.backbone_config(options))
    method = script.FlowMatching(script.FlowMatching.Config(**script.FLOW), None)
    step = script.Step(method, net, "eager", 0.5)
    step.rng.manual_seed(2)
    z, features = torch.ones(8, 32, 4, 4).bfloat16(), torch.randn(8, 2, 6, 128, generator=step.rng).bfloat16()
    mask = torch.arange(6) < torch.arange(1, 9).clamp(max=6)[:, None]
    step.lr.fill_(3e-3)
    step("64", z, features, mask)
    first = step.take_losses()["64"]
    for _ in range(25):
        step("64", z, features, mask)
    assert step.take_losses()["64"] < 0.8 * first
    assert step.take_losses() == {}
    step.lr.fill_(0.0)
    for _ in range(30):
        step("64", z, features, mask)
    for average, weight in zip(step.average, step.parameters, strict=True):
        torch.testing.assert_close(average, weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs work there")
def test_where_a_gpu_is_missing_graphs_give_way(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(small=True, go_on=False)
    net = script.LensTransformer2DModel(script.backbone_config(options))
    step = script.Step(script.FlowMatching(script.FlowMatching.Config(**script.FLOW), None), net, "graph", 0.5)
    batch = torch.ones(2, 32, 4, 4).bfloat16(), torch.ones(2, 2, 6, 128).bfloat16(), torch.ones(2, 6, dtype=torch.bool)
    for _ in range(2):
        step("64", *batch)
    assert not step.graphed and step.take_losses()["64"] > 0
    assert "goes on without graphs" in capsys.readouterr().out


def test_the_rate_follows_the_clock_down_to_zero(script: Any) -> None:
    rates = [script.rate(share / 1000, 1.0) for share in range(1001)]
    assert rates[0] < 0.02 and max(rates) == 1.0 and rates[300] == 1.0 and rates[1000] == 0.0
    assert all(0 <= later <= earlier for earlier, later in pairwise(rates[600:]))


@pytest.mark.parametrize(
    ("results", "mode"),
    [
        ({}, "eager"),
        ({"eager": 30.0}, "eager"),
        ({"eager": 30.0, "graph": 20.0, "compile": 25.0}, "graph"),
        ({"eager": 30.0, "graph": 40.0}, "eager"),
        ({"graph": 20.0}, "eager"),  # nothing to compare its losses with
    ],
)
def test_the_fastest_mode_that_learns_alike_is_chosen(script: Any, tmp_path: Path, results: Any, mode: str) -> None:
    log = script.Log(tmp_path)
    measured = {m: {g: {"ms": ms, "last": 1.0} for g in ("64", "128")} for m, ms in results.items()}
    assert script.choose_mode(argparse.Namespace(mode="auto"), measured, log) == mode
    broken = measured | {"compile-graph": {g: {"ms": 1.0, "last": float("nan")} for g in ("64", "128")}}
    assert script.choose_mode(argparse.Namespace(mode="auto"), broken, log) == mode
