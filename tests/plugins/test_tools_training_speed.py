"""`lens bench train`: what it reports, and that a variant with a wrong gradient has no figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lens_mmdit.model import LensTransformer2DModel
from lens_tools import training_speed

from lens_core.cli.main import main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "pipeline: {start: 'tiny:'}\nmethod: flow_matching\ntrain: {steps: 1}\n"
        "dataset: {use: packed, store: nowhere, buckets: [[[64, 64], [64, 128]], [[128, 128]]]}\n"
    )
    return path


def bench(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict]:
    arguments = ["bench", "train", str(recipe), "--depth", "1", "--samples", "4", "--tokens", "6", "--no-compile"]
    code = main([*arguments, "--device", "cpu", "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def test_every_variant_is_timed_by_part_after_its_gradient_agreed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = bench(recipe, capsys)
    assert code == 0 and report["void"] == {}
    assert set(report["variants"]) == set(report["agreement"]) == {"bucketed", "packed", "checkpointed"}
    assert report["agreement"]["bucketed"] == 0 and 0 < report["agreement"]["packed"] < 1e-5
    for variant in report["variants"].values():
        assert (
            variant["least"] <= variant["step"] <= variant["most"] and variant["mfu"] is None
        )  # nobody knows a CPU's peak
        assert all(variant[part] > 0 for part in training_speed.PARTS)
        assert variant["images_per_second"] == pytest.approx(4 / variant["step"])
    assert set(report["ratios"]) == {"bucketed / packed", "packed / checkpointed"}
    assert all(0 < r["least"] <= r["median"] <= r["most"] for r in report["ratios"].values())
    assert report["settings"]["depth"] == 1 and report["settings"]["latent sizes"] == [[8, 8], [8, 16], [16, 16]]


def test_a_variant_with_a_wrong_gradient_has_no_figures(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = LensTransformer2DModel.packed
    monkeypatch.setattr(LensTransformer2DModel, "packed", lambda *a: [v * 1.001 for v in packed(*a)])
    code, report = bench(recipe, capsys)
    assert code == 1 and set(report["void"]) == {"packed", "checkpointed"}
    assert "from that of the reference" in report["void"]["packed"]
    assert list(report["variants"]) == ["bucketed"] and report["ratios"] == {}


def test_what_cannot_be_timed_is_refused_in_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", str(recipe), "--repeats", "4"]) == 2
    assert "repeats: must be at least 5" in capsys.readouterr().err
    recipe.write_text("pipeline: {backbone: mmdit}\nmethod: flow_matching\ntrain: {steps: 1}\n")
    assert main(["bench", "train", str(recipe)]) == 2
    assert "$.pipeline.vae: missing" in capsys.readouterr().err
