"""What `lens rl` can do, as plain functions. Methods, rewards and benchmarks come from the catalog, by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cyclopts import App


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
    from lens_llm.prompt_sets import write_prompt_set

    count = write_prompt_set(taxonomy, output, shapes=shapes, seed=seed, log=_log)
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
    from lens_llm.recipe_audit import audit_recipe

    reports = audit_recipe(recipe, num_images=num_images, batch_size=batch_size, seed=seed, model=model, log=_log)
    print(json.dumps(reports, indent=2))
    return 0


def estimate(recipe: Path) -> int:
    """Print what a run by a recipe would need: memory by part, pictures to score, calls and dollars. Sends nothing.

    Parameters
    ----------
    recipe
        The YAML file of a run that learns from rewards.
    """
    from lens_llm.recipe_audit import estimate_recipe

    print(estimate_recipe(recipe))
    return 0


app = App(name="rl", help="Reinforcement learning: prompt sets, judges, and what a run would need.")
for _name, _command in (("prompts", prompts), ("audit", audit), ("estimate", estimate)):
    app.command(_command, name=_name)
