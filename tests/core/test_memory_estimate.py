"""What a dry run tells is what a run then holds, and it needs neither weights nor a network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from huggingface_hub.errors import LocalEntryNotFoundError

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.recipe import LoraSpec, read_recipe
from lens_core.training.memory_estimate import describe, memory
from lens_core.training.trainer import Trainer

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


@pytest.fixture(scope="module")
def everything() -> Catalog:
    return Catalog.installed()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum({id(t): t.nbytes for t in tensors}.values())


def floats(tensors: Iterable[torch.Tensor]) -> int:
    return 4 * sum({id(t): t.numel() for t in tensors}.values())


@pytest.mark.parametrize("path", sorted((RECIPES / "tiny").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_small_recipe_has_a_dry_run_before_the_recipes_that_it_starts_from_were_run(
    path: Path, everything: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where runs/ holds nothing; those at published scale have theirs in test_rival.py
    text = describe(read_recipe(path, everything), everything)
    assert "memory, GB" in text or "dollars" in text


@pytest.mark.parametrize("name", ["3d_flow_matching", "5_distill_turbo", "lora_moon"])
def test_it_tells_what_the_run_holds(name: str, everything: Catalog, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "tiny" / f"{name}.yaml", everything)
    recipe = evolve(recipe, pipeline=evolve(recipe.pipeline, start="tiny:"))
    sizes, learns, notes = memory(recipe, everything)
    assert not notes
    run = Trainer(recipe, everything, tmp_path / "run", log=lambda line: None)
    assert learns == {
        module_name: sum(p.numel() for p in learning) for module_name, learning in run.trainable_parameters.items()
    }
    for module_name, learning in run.trainable_parameters.items():
        assert sizes[f"{module_name}: gradients"] == floats(learning)
        assert sizes[f"{module_name}: AdamW's moments"] == 2 * floats(learning)
    for module_name, average in run.ema.items():
        assert sizes[f"{module_name}: moving average"] == pytest.approx(floats(average.values()), rel=1e-3)
    modules = [run.pipeline.vae, run.pipeline.text_encoder, *run.modules.values()]
    modules += [v for v in vars(run.method).values() if isinstance(v, torch.nn.Module)]
    held = bytes_of(t for net in modules for t in (*net.parameters(), *net.buffers()))
    total = sum(size for part, size in sizes.items() if part.endswith(("weights", "adapter")))
    assert total == pytest.approx(held, rel=1e-3)


def test_two_adapters_on_one_teacher_hold_its_weights_once(everything: Catalog) -> None:
    whole, _, _ = memory(read_recipe(RECIPES / "distill_turbo.yaml", everything), everything)
    shared, learns, notes = memory(read_recipe(RECIPES / "distill_turbo_lora.yaml", everything), everything)
    backbone = 16_416_900_608  # float32: four bytes for each of the 4.104 B parameters
    assert [whole[f"{n}: weights"] for n in ("generator", "fake", "teacher")] == [backbone, backbone, backbone // 2]
    assert shared["generator: weights"] == backbone // 2, "what adapters leave alone sits in bfloat16"
    assert "fake: weights" not in shared and "teacher: weights" not in shared
    assert learns["generator"] == learns["fake"] == pytest.approx(226e6, rel=0.02)
    assert sum(shared.values()) < sum(whole.values()) / 2
    assert "is not on this disk" in notes[0]


def test_a_dry_run_fetches_nothing(everything: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    local_only: list[bool] = []

    def snapshot_download(name: str, **options: Any) -> str:
        local_only.append(options["local_files_only"])
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    for start in ("YuCollection/Lens-Diffusers", "microsoft/Lens@main", "somebody/else"):
        recipe = read_recipe(RECIPES / "lora.yaml", everything)
        memory(evolve(recipe, pipeline=evolve(recipe.pipeline, start=start)), everything)
    assert local_only == [True] * 3


def test_an_adapter_costs_what_it_learns(everything: Catalog) -> None:
    recipe = read_recipe(RECIPES / "lora.yaml", everything)
    _, learns, _ = memory(recipe, everything)
    d, blocks, rank = 1536, 48, 16
    a_block = 2 * rank * ((d + 3 * d) + (d + d))  # qkv and output, of both streams
    assert learns == {"backbone": blocks * a_block}
    more = evolve(recipe, train=evolve(recipe.train, lora={"backbone": LoraSpec(32, 1.0, ("attn.img_qkv",))}))
    assert memory(more, everything)[1] == {"backbone": blocks * 32 * (d + 3 * d)}


def test_what_is_divided_is_reported_by_the_process(everything: Catalog) -> None:
    recipe = read_recipe(RECIPES / "distill_turbo.yaml", everything)
    sizes, learns, _ = memory(recipe, everything)
    bytes_per_process = sum(size for name, size in sizes.items() if name.partition(":")[0] in {*learns, "teacher"})
    assert {"teacher: weights", "text_encoder: weights", "vae: weights"} < sizes.keys()
    each = (sum(sizes.values()) - bytes_per_process + bytes_per_process / 8) / 1e9
    lines = [line for line in describe(recipe, everything).splitlines() if "of a process of 8" in line]
    assert len(lines) == 1 and float(lines[0].split()[-1]) == pytest.approx(each, abs=1e-3)


def test_a_dry_run_refuses_a_tracker_that_a_run_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / "tiny" / "5_distill_turbo.yaml"
    assert main(["train", str(path), "--dry-run", "--set", "train.trackers=[tensorbord]"]) != 0
    assert "$.train.trackers: no tracker is called 'tensorbord'. Did you mean" in capsys.readouterr().err


def test_the_command_prints_the_recipe_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(RECIPES / "tiny" / "5_distill_turbo.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "matching: decoupled" in out, "defaults are told too"
    assert "teacher: weights" in out and "all of it" in out and "parameters" in out
    assert not list(tmp_path.iterdir())
    assert main(["train", str(RECIPES / "tiny" / "4_rl_nft.yaml"), "--dry-run"]) == 0
    assert "scored pictures" in capsys.readouterr().out


def test_the_page_has_the_figures_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (RECIPES.parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\w+\.yaml)` \| [\d.]+ \| ([\d.]+) \| [\d.]* ?\| ([\d.]*) ?\|", page)
    assert len(rows) == 5
    for name, whole, each in rows:
        assert main(["train", str(RECIPES / name), "--dry-run"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [f"{float(w[-1]):.1f}" for w in lines if w[:3] == ["all", "of", "it"]] == [whole], name
        figures = [f"{float(w[-1]):.1f}" for w in lines if w[:3] == ["of", "a", "process"]]
        assert figures == ([each] if each else []), name
        assert float(each or whole) < 85.2, "it fits"
