"""What a run would need is told before anything is loaded or sent, at the published size too."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, Recipe, build, read_recipe
from lens_core.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.installed()


def estimate_of(recipe: Recipe, catalog: Catalog):
    _, cls, config = build(catalog, "method", recipe.method, "$.method")
    return cls.estimate(config, recipe, catalog)


@pytest.fixture(scope="module")
def published(catalog: Catalog) -> Recipe:
    return read_recipe(RECIPES / "rl_nft.yaml", catalog)


@pytest.fixture(scope="module")
def figures(published: Recipe, catalog: Catalog):
    return estimate_of(published, catalog)


def test_the_published_run_judges_as_many_pictures_as_the_paper_says(figures):
    assert (figures.rollouts, figures.pictures) == (180, 180 * 48 * 24) == (180, 207_360)
    (calls,) = figures.calls.values()
    assert calls == 207_360


def test_dollars_are_tokens_times_prices(figures, published, catalog):
    (usd,) = figures.usd.values()
    llm = dict(published.method.options["rewards"][0]["llm"])
    double = {**published.method.options["rewards"][0], "llm": {**llm, "price_in": 0.8, "price_out": 3.2}}
    twice = evolve(published, method=ComponentSpec("diffusion_nft", {**published.method.options, "rewards": [double]}))
    assert estimate_of(twice, catalog).usd.popitem()[1] == pytest.approx(2 * usd)
    assert 100 < usd < 1000  # 0.1 to 0.5 cents a picture: a thousand tokens or two in, a few hundred out


def test_memory_is_that_of_the_tensors_of_the_published_model(figures, published, catalog):
    memory = figures.memory
    assert round(memory["backbone: weights"] / 2e9, 3) == 4.104
    # LoRA of rank 32 on every linear layer: rank x (in + out) each, here counted from the published sizes
    d, mlp, blocks = 1536, 4096, 48
    linears = [(128, d), (4 * 2880, d), (256, d), (d, d), (d, 2 * d), (d, 128)]
    stream = [(d, 6 * d), (d, 3 * d), (d, d), (d, mlp), (d, mlp), (mlp, d)]
    learned = 32 * (sum(a + b for a, b in linears) + blocks * 2 * sum(a + b for a, b in stream))
    assert memory["backbone: adapter"] == 4 * learned
    assert memory["backbone: gradients"] == memory["backbone: moving average"] == 4 * learned
    assert memory["backbone: AdamW's moments"] == 8 * learned
    assert memory["backbone: old policy"] == memory["backbone: reference, for kl"] == 4 * learned, "one frozen backbone"
    freed = evolve(published, method=ComponentSpec("diffusion_nft", {**published.method.options, "kl": 0.0}))
    assert "backbone: reference, for kl" not in estimate_of(freed, catalog).memory


def test_what_was_assumed_is_said(figures):
    notes = " ".join(figures.notes)
    assert "YuCollection/Lens-Base-Diffusers is not on this disk" in notes
    assert "the prompts cannot be read" in notes
    assert str(figures).splitlines()[0] == "180 rollouts, 207,360 scored pictures"


def test_a_checkpoint_on_this_disk_tells_its_own_sizes(catalog):
    recipe = read_recipe(RECIPES / "tiny" / "4_rl_nft.yaml", catalog)
    small = estimate_of(recipe, catalog)
    folder = catalog.first("lens_fetch", "tiny:")
    stored = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert small.memory["backbone: weights"] == pytest.approx(2 * stored, rel=0.01)  # stored as bfloat16
    assert set(small.usd.values()) == {0.0} and not small.notes


def test_without_a_start_a_missing_part_is_named(catalog, published):
    with pytest.raises(ConfigError, match=r"\$\.pipeline\.vae: missing"):
        estimate_of(evolve(published, pipeline=evolve(published.pipeline, start=None)), catalog)
