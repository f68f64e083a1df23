"""What `lens rl` can do, as plain functions. Methods, rewards and benchmarks come from the catalog, by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, Recipe, build, read_recipe
from lens_core.types import ConfigError, Prompt, prompts_of_tasks


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prompts(taxonomy: Path | None = None, *, output: Path, shapes: int | None = None, seed: int = 0) -> int:
    """Write a prompt set with rubrics (`lens-rl/1`): by a language model from a taxonomy, or from the world of shapes.

    Killed and run again, it goes on: what was written is kept in OUTPUT.partial.

    Parameters
    ----------
    taxonomy
        A YAML file: llm and license; also, where they shall differ from the paper's ten categories and five aspects,
        classes {class: {subclass: [items]}}, aspects, prompts_per_item and rubrics.
    output
        The file of JSON lines to write.
    shapes
        Write so many prompts about shapes instead, a tenth of them for evaluation: exact, and without a language model.
    seed
        Of the prompts about shapes.
    """
    output = output.expanduser()
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}; make it first")
    catalog = Catalog.installed()
    if shapes is not None and taxonomy is None:
        count = _of_shapes(catalog, shapes, seed, output)
    elif taxonomy is None or shapes is not None:
        raise ConfigError("lens rl prompts: give a taxonomy file, or --shapes N, and not both")
    else:
        from lens_llm.taxonomy import read_taxonomy
        from lens_llm.writing import compose

        plan = read_taxonomy(taxonomy)
        name, cls, config = build(catalog, "llm", plan.llm, f"{taxonomy}: $.llm")
        llm = cls(config)
        if not hasattr(llm, "map"):
            raise ConfigError(f"{taxonomy}: $.llm: {name} cannot map over requests; use 'openai'")
        count = compose(llm, plan, output, log=_log)
    print(f"{output}: {count} prompts")
    return 0


def audit(recipe: Path, *, num_images: int = 48, batch_size: int = 8, seed: int = 0, model: str | None = None) -> int:
    """Score pictures twice and print how far each reward of a recipe can be trusted, as JSON.

    Prints the share of components that flip, the noise of one score, and what blank, noise and swapped pictures score.
    A reward's fallback is its auditor: the share of rubrics on which the two agree is printed too.

    Parameters
    ----------
    recipe
        The YAML file of a run that learns from rewards; its own model draws its own prompts.
    num_images
        How many to draw, each of another prompt, sampled from those of the recipe's tasks; two at least.
    batch_size
        Pictures drawn at once.
    seed
        Of the sample of prompts, and of the first picture; the others count on.
    model
        A checkpoint to draw with instead of the one that the recipe starts from.
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
    plan, config = _plan(recipe, catalog)
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
    _log(f"drawn {len(images)}")
    reports = {}
    for path, (name, reward) in rewards.items():
        if not path.endswith(".fallback"):
            _, auditor = rewards.get(f"{path}.fallback", ("", None))
            reports[f"{path} {name}"] = examine(reward, images, chosen, seed, auditor)
    print(json.dumps(reports, indent=2))
    return 0


def sampled(prompts: Sequence[Prompt], tasks: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """`count` different prompts of the tasks, in their order, or all where there are fewer; every one is as likely."""
    import numpy as np

    mine = prompts_of_tasks(prompts, tasks)
    picked = np.random.default_rng(seed).choice(len(mine), min(count, len(mine)), replace=False) if mine else []
    return [mine[i] for i in sorted(picked)]


def estimate(recipe: Path) -> int:
    """Print what a run by a recipe would need: memory by part, pictures to score, calls and dollars. Sends nothing.

    Parameters
    ----------
    recipe
        The YAML file of a run that learns from rewards.
    """
    catalog = Catalog.installed()
    plan, config = _plan(recipe, catalog)
    print(catalog.find("method", plan.method.use).cls.estimate(config, plan, catalog))
    return 0


def _plan(recipe: Path, catalog: Catalog) -> tuple[Recipe, Any]:
    """A recipe, and the config of its method, which must learn from rewards."""
    plan = read_recipe(recipe, catalog)
    name, cls, config = build(catalog, "method", plan.method, "$.method")
    if not (hasattr(cls, "estimate") and hasattr(config, "uses") and hasattr(config, "rewards")):
        raise ConfigError(f"{recipe}: its method is {name}, which has no rewards; use `diffusion_nft`")
    return plan, config


def _of_shapes(catalog: Catalog, count: int, seed: int, out: Path) -> int:
    """The benchmark `shapes` as a prompt set: its training prompts, and a tenth of the split that models are selected
    by; those of the split `test` are for the last figure alone."""
    from lens_llm.prompts import write

    held = max(1, count // 10)
    if count < 2:
        raise ConfigError(f"--shapes is {count}; a set needs one prompt to learn from and one to evaluate, 2 at least")
    entries: dict[str, dict[str, Any]] = {}
    for split, name, most in (("train", "train", count - held), ("eval", "select", held)):
        wanted, tried = len(entries) + most, most
        while len(entries) < wanted:  # "a circle" has no split of its own, and is in the set once
            _, cls, config = build(
                catalog, "benchmark", ComponentSpec("shapes", {"split": name, "prompts": tried, "seed": seed})
            )
            for p in cls(config).prompts():
                entries.setdefault(
                    p.text,
                    {
                        "prompt_id": len(entries),
                        "split": split,
                        "prompt": p.text,
                        "lang": "en",
                        "taxonomy": {"class": p.task},
                        **p.data,
                        "provenance": {"generator": f"shapes, {name}, seed {seed}", "license": "Apache-2.0"},
                    },
                )
            tried += wanted - len(entries)
    write(out, list(entries.values()), rubrics=None, similarity_threshold=None)
    return len(entries)


app = App(name="rl", help="Reinforcement learning: prompt sets, judges, and what a run would need.")
for _name, _command in (("prompts", prompts), ("audit", audit), ("estimate", estimate)):
    app.command(_command, name=_name)
