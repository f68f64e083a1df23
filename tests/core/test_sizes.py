"""`like`: parts of a recipe whose sizes come from the start checkpoint or from their neighbours; what cannot fit is
refused in one line before anything is read."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lens_flow
import lens_flux2
import lens_gpt_oss
import lens_mmdit
import lens_shapes
import pytest
import toy
import yaml

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.sizes import resolve_sizes, start_parts
from lens_core.recipe import ComponentSpec, PipelineSpec, read_recipe
from lens_core.training import memory_estimate
from lens_core.types import ConfigError

CATALOG = Catalog.of(lens_flow, lens_flux2, lens_gpt_oss, lens_mmdit, lens_shapes)
START = "tiny:"
TINY = start_parts(START, CATALOG)


def like(how: str, use: str = "mmdit", **options: Any) -> ComponentSpec:
    return ComponentSpec(use, {"like": how, **options})


def test_like_start_keeps_the_options_that_are_not_written() -> None:
    spec = resolve_sizes(PipelineSpec(START, backbone=like("start", num_layers=2)), CATALOG).backbone
    assert spec == ComponentSpec("mmdit", {**TINY["backbone"].options, "num_layers": 2})
    same = resolve_sizes(PipelineSpec(START, vae=like("start", "flux2")), CATALOG).vae
    assert same == ComponentSpec("flux2", TINY["vae"].options)


def test_like_neighbours_takes_the_sizes_alone() -> None:
    options = resolve_sizes(PipelineSpec(START, backbone=like("neighbours", num_layers=3)), CATALOG).backbone.options
    assert options == {
        "num_layers": 3, "in_channels": 32, "out_channels": 8, "enc_hidden_dim": 128, "selected_layer_index": [0, 1],
    }  # fmt: skip


def test_a_backbone_follows_a_vae_that_is_replaced_too() -> None:
    parts = PipelineSpec(START, vae=like("start", "flux2", latent_channels=4), backbone=like("start", num_layers=1))
    pipeline = LensPipeline.from_parts(parts, CATALOG)
    assert pipeline.vae.channels == 16 and pipeline.backbone.takes() == (16, 2, 128)
    assert pipeline.specs["backbone"].options["num_attention_heads"] == TINY["backbone"].options["num_attention_heads"]
    assert "like" not in pipeline.specs["backbone"].options
    images = pipeline("a red circle", height=32, width=32, num_inference_steps=1, seed=0).images
    assert images[0].size == (32, 32)


def test_without_a_start_the_neighbours_of_the_recipe_count() -> None:
    tiny = {kind: ComponentSpec(TINY[kind].use, TINY[kind].options) for kind in ("vae", "text_encoder")}
    parts = resolve_sizes(PipelineSpec(None, **tiny, backbone=like("neighbours", num_layers=1)), CATALOG)
    assert parts.backbone.options["in_channels"] == 32 and parts.backbone.options["enc_hidden_dim"] == 128


class Wrong(toy.Mixer):
    """A backbone that fails to say its sizes."""

    @classmethod
    def fitting(cls, options: Mapping[str, Any], channels: int, layers: int, width: int) -> Mapping[str, Any]:
        raise ArithmeticError("no such size")


def plugin() -> types.ModuleType:
    module = types.ModuleType("lens_wrong")
    module.lens_backbones = hookimpl(lambda: {"wrong": Wrong}, specname="lens_backbones")  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (PipelineSpec(backbone=like("start")), r"\$\.pipeline\.backbone\.like: pipeline\.start names no checkpoint"),
        (PipelineSpec(backbone=like("neighbours")), "the pipeline has no vae to take sizes from"),
        (PipelineSpec(START, vae=like("neighbours", "flux2")), "size of lens_flux2:flux2 follows from its neigh"),
        (
            PipelineSpec(START, backbone=like("start", "wrong")),
            "tiny: has the backbone lens_mmdit:mmdit, not lens_wrong:wrong; write the sizes, or use like: neighbours",
        ),
        (PipelineSpec(START, backbone=like("neighbours", "wrong")), "lens_wrong:wrong cannot be built: .*no such size"),
    ],
)
def test_what_gives_no_sizes_is_named(parts: PipelineSpec, words: str) -> None:
    catalog = Catalog.of(lens_flow, lens_flux2, lens_gpt_oss, lens_mmdit, lens_shapes, plugin())
    with pytest.raises(Exception, match=words) as caught:
        resolve_sizes(parts, catalog)
    assert "\n" not in str(caught.value)


RECIPE = {
    "pipeline": {"start": START},
    "method": "flow_matching",
    "dataset": {"use": "shapes", "batch": 4, "sizes": [[64, 64]]},
    "train": {"steps": 8},
}


def recipe(folder: Path, **changes: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"use": "mmdit", "like": "stat"}, r"backbone\.like: must be start or neighbours, not 'stat'"),
        ({"use": "mmdit", "like": ["start"]}, r"backbone\.like: must be start or neighbours"),
        ({"use": "mmdit", "like": "start", "num_layer": 2}, r"num_layer: unknown\. Did you mean 'num_layers'"),
        ({"use": "mmdit", "like": "start", "num_layers": 0}, "num_layers"),
    ],
)
def test_what_a_recipe_writes_beside_like_is_checked_when_it_is_read(
    backbone: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = recipe(tmp_path, pipeline={"start": START, "backbone": backbone})
    with pytest.raises(ConfigError, match=words) as caught:
        read_recipe(path, CATALOG)
    assert len(caught.value.problems) == 1


def test_the_dry_run_writes_the_sizes_out(tmp_path: Path) -> None:
    backbone = {"use": "mmdit", "like": "start", "num_layers": 2}
    plan = read_recipe(recipe(tmp_path, pipeline={"start": START, "backbone": backbone}), CATALOG)
    text = memory_estimate.describe(plan, CATALOG)
    written = yaml.safe_load(text.split("\nlearns")[0])["pipeline"]["backbone"]
    assert written == {"use": "mmdit", **TINY["backbone"].options, "num_layers": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"pipeline": {"start": START, "vae": {"use": "flux2", "like": "start", "latent_channels": 16}}},
            "lens_mmdit:mmdit reads 32 latent channels, and lens_flux2:flux2 gives 64; change one of them",
        ),
        (
            {"pipeline": {"start": START, "backbone": {"use": "mmdit", "like": "start", "enc_hidden_dim": 64}}},
            "lens_mmdit:mmdit reads 64 channels of a text feature, and lens_gpt_oss:gpt_oss gives 128",
        ),
        (
            {"pipeline": {"start": START, "backbone": {"use": "mmdit", "like": "start", "selected_layer_index": [0]}}},
            "lens_mmdit:mmdit reads 1 layers of text features, and lens_gpt_oss:gpt_oss gives 2",
        ),
        ({"train": {"steps": 8, "lora": {"back": {}}}}, r"\$\.train\.lora: no trainable module is called 'back'"),
        (
            {"train": {"steps": 8, "lr_multipliers": {"vae": 2}}},
            r"\$\.train\.lr_multipliers: .* 'vae'; there are",
        ),
        ({"dataset": {"use": "shapes", "batch": 4, "sizes": [[64, 100]]}}, r"\$\.dataset\.sizes: width 100 is not a m"),
        ({"evaluation": {"every": 4, "prompts": ["a"], "size": [65, 64]}}, r"\$\.evaluation\.size: height 65 is not"),
    ],
)
def test_the_dry_run_refuses_in_one_line_what_cannot_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    plan = read_recipe(recipe(tmp_path, **changes), CATALOG)
    with pytest.raises(ConfigError, match=words) as caught:
        memory_estimate.describe(plan, CATALOG)
    assert len(caught.value.problems) == 1
