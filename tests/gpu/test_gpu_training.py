"""Three steps of every method's loop on a GPU; stopped runs go on; averages and evaluations are where they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_core import Catalog, LensPipeline
from lens_core.recipe import Recipe, structure
from lens_core.training.trainer import Trainer

SHAPES = {"use": "shapes", "sizes": [[64, 64]], "batch": 4, "seed": 1}
TRAIN = {"steps": 3, "lr": 1e-4, "precision": "bf16", "log_every": 1, "save_every": 3}
ENCODER = {
    "use": "gpt_oss", "vocab_size": 400, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4,
    "num_experts_per_tok": 2, "selected_layers": [0, 1],
}  # fmt: skip
VAE = {"use": "flux2", "block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
NFT = {
    "use": "diffusion_nft", "prompts": {"use": "shapes", "split": "train", "prompts": 8, "seed": 4},
    "rewards": [{"use": "shapes", "partial": True}], "prompts_per_rollout": 2, "pictures_per_prompt": 2,
    "sizes": [[64, 64]], "rollout_steps": 2, "timesteps_per_image": 2, "micro_batch_size": 4,
}  # fmt: skip
DMD2 = {"use": "dmd2", "fake_score_updates": 1, "gan_weight": 0.03, "discriminator_blocks": [0, 1]}
RECIPES: dict[str, dict[str, Any]] = {
    "flow_matching": {"pipeline": {"start": "tiny:"}, "method": "flow_matching", "dataset": SHAPES},
    "autoencode": {"pipeline": {"vae": VAE}, "method": "autoencode", "dataset": SHAPES},
    "language_model": {
        "pipeline": {"start": "tiny:", "text_encoder": ENCODER},
        "method": {"use": "language_model", "tokenizer_batches": 4},
        "dataset": {"use": "shapes", "batch": 4, "images": False, "seed": 1},
    },
    "diffusion_nft": {"pipeline": {"start": "tiny:"}, "method": NFT},
    "dmd2": {"pipeline": {"start": "tiny:"}, "method": DMD2, "dataset": SHAPES},
}


def run(installed: Catalog, folder: Path, name: str, stop: int = 0, **train: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A run of the recipe `name`, stopped after `stop` steps; and its log."""
    plan = {**RECIPES[name], "train": {**TRAIN, **train}, "seed": 3}
    evaluation = plan["train"].pop("evaluation", None)
    recipe = structure(Recipe, plan | ({"evaluation": evaluation} if evaluation else {}))
    trainer = Trainer(recipe, installed, folder, log=lambda line: None)
    if stop:
        step = trainer._step

        def counted(*arguments: Any) -> None:
            step(*arguments)
            trainer._stop = trainer.step >= stop

        trainer._step = counted  # type: ignore[method-assign]  # as a signal would
    result = trainer.train()
    return result, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(run: Any, other: Any, installed: Catalog) -> None:
    """Bit for bit, with how far they are apart where they are not."""
    a, b = (
        LensPipeline.from_pretrained(
            r.model, catalog=installed, dtype=torch.float32, device="cpu"
        ).backbone.state_dict()
        for r in (run, other)
    )
    far = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a), f"largest difference {far:.3g}"


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_of_every_method(name: str, installed: Catalog, tmp_path: Path, device: torch.device) -> None:
    result, log = run(installed, tmp_path / "run", name)
    assert result.steps == 3 and result.model is not None and [line["step"] for line in log] == [1, 2, 3]
    losses = [v for line in log for k, v in line.items() if k.endswith("/loss") or k.endswith("grad_norm")]
    assert losses and all(v == v and abs(v) < 1e9 for v in losses)
    assert not any(k.endswith("skipped") for line in log for k in line)
    if device.type == "cuda":
        assert log[-1]["memory_gb"] > 0.001


@pytest.mark.parametrize("train", [{}, {"activation_checkpointing": True}, {"lora": {"backbone": {"rank": 2}}}])
def test_the_ways_to_train_a_backbone(train: dict[str, Any], installed: Catalog, tmp_path: Path) -> None:
    result, _ = run(installed, tmp_path / "run", "flow_matching", micro_batches=2, **train)
    assert result.steps == 3


def test_a_compiled_run_starts_and_ends(installed: Catalog, tmp_path: Path, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU's compiler takes minutes")
    result, log = run(installed, tmp_path / "run", "flow_matching", compile=True)
    plain, other = run(installed, tmp_path / "plain", "flow_matching")
    assert result.steps == plain.steps == 3
    a, b = ([v for k, v in line.items() if k.endswith("/loss")] for line in (log[0], other[0]))
    assert a == pytest.approx(b, rel=0.05)


def test_a_run_that_was_stopped_ends_with_the_same_bits_and_averages(
    installed: Catalog, tmp_path: Path, deterministic: None
) -> None:
    options = {"ema_decay": 0.9, "steps": 4, "save_every": 2}
    whole, _ = run(installed, tmp_path / "whole", "flow_matching", **options)
    run(installed, tmp_path / "cut", "flow_matching", stop=2, **options)
    again, _ = run(installed, tmp_path / "cut", "flow_matching", **options)
    same_weights(whole, again, installed)


def test_a_run_is_evaluated_with_its_averages_and_learns_the_same(
    installed: Catalog, tmp_path: Path, deterministic: None
) -> None:
    evaluation = {
        "every": 2, "prompts": ["a red circle"], "size": [64, 64], "steps": 2, "batch_size": 2,
        "benchmarks": [{"use": "shapes", "prompts": 6, "seed": 1}],
    }  # fmt: skip
    watched, _ = run(installed, tmp_path / "watched", "flow_matching", ema_decay=0.9, evaluation=evaluation)
    plain, _ = run(installed, tmp_path / "plain", "flow_matching", ema_decay=0.9)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert len(list((tmp_path / "watched" / "samples").glob("*.png"))) == 3
    same_weights(watched, plain, installed)
