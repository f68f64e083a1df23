"""What is known of a recipe that learns from rewards before it runs: how far to trust its rewards, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lens_core.catalog import Catalog
from lens_core.recipe import Recipe, build, read_recipe
from lens_core.types import ConfigError, Prompt, prompts_of_tasks


def audit_recipe(
    recipe: Path,
    *,
    num_images: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    model: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Draw prompts of a recipe with its model, or with `model`, and score them twice -> a report for each reward.

    Raises ConfigError for fewer than two pictures or two different prompts.
    """
    import torch
    from attrs import evolve

    from lens_core.evaluation.run import generate_images
    from lens_core.inference.pipeline import LensPipeline
    from lens_llm.audit import audit as examine

    if num_images < 2 or batch_size < 1 or seed < 0:
        raise ConfigError(
            f"--num-images must be at least 2, --batch-size 1 and --seed 0, not {num_images}, {batch_size} and {seed}"
        )
    catalog = Catalog.installed()
    plan, config = rewarding_recipe(recipe, catalog)
    parts = {path: build(catalog, kind, use, f"$.method.{path}") for path, kind, use in config.uses()}
    _, benchmark, options = parts["prompts"]
    chosen = sampled(benchmark(options).prompts(), getattr(config, "tasks", ()), num_images, seed)
    if len({p.text for p in chosen}) < 2:
        raise ConfigError(f"{recipe}: an audit needs two different prompts at least to swap; ask for more")
    rewards = {path: (name, cls(options)) for path, (name, cls, options) in parts.items() if path != "prompts"}
    start = evolve(plan.pipeline, start=model) if model else plan.pipeline
    pipeline = LensPipeline.from_parts(start, catalog).to("cuda" if torch.cuda.is_available() else "cpu")
    height, width = config.sizes[0] if config.sizes else (None, None)
    settings = {"num_inference_steps": config.rollout_steps, "guidance_scale": config.rollout_guidance}
    images = torch.cat(
        list(generate_images(pipeline, chosen, seed, batch_size, height=height, width=width, **settings))
    ).cpu()
    log(f"drawn {len(images)}")
    reports = {}
    for path, (name, reward) in rewards.items():
        if not path.endswith(".fallback"):
            _, auditor = rewards.get(f"{path}.fallback", ("", None))
            reports[f"{path} {name}"] = examine(reward, images, chosen, seed, auditor)
    return reports


def sampled(prompts: Sequence[Prompt], tasks: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """`count` different prompts of the tasks, in their order, or all where there are fewer; every one is as likely."""
    import numpy as np

    mine = prompts_of_tasks(prompts, tasks)
    if not mine:
        return []
    picked = np.random.default_rng(seed).choice(len(mine), min(count, len(mine)), replace=False)
    return [mine[i] for i in sorted(picked)]


def estimate_recipe(recipe: Path) -> str:
    """What a run by a recipe would need, as text: memory by part, pictures to score, calls and dollars."""
    catalog = Catalog.installed()
    plan, config = rewarding_recipe(recipe, catalog)
    text: str = catalog.find("method", plan.method.use).cls.estimate(config, plan, catalog)
    return text


def rewarding_recipe(recipe: Path, catalog: Catalog) -> tuple[Recipe, Any]:
    """A recipe, and the config of its method, which must learn from rewards."""
    plan = read_recipe(recipe, catalog)
    name, cls, config = build(catalog, "method", plan.method, "$.method")
    if not (hasattr(cls, "estimate") and hasattr(config, "uses") and hasattr(config, "rewards")):
        raise ConfigError(f"{recipe}: its method is {name}, which has no rewards; use `diffusion_nft`")
    return plan, config
