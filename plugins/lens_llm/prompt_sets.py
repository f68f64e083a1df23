"""Prompt sets in a file, written by a language model from a taxonomy or from the world of shapes: `lens rl prompts`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError


def write_prompt_set(
    taxonomy: Path | None, output: Path, *, shapes: int | None = None, seed: int = 0, log: Callable[[str], None]
) -> int:
    """Write a prompt set by the taxonomy file, or `shapes` prompts about shapes -> the number of prompts.

    Killed and called again, it goes on from OUTPUT.partial. Raises ConfigError unless one of both is named.
    """
    output = output.expanduser()
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}; make it first")
    catalog = Catalog.installed()
    if shapes is not None and taxonomy is None:
        count = _about_shapes(catalog, shapes, seed, output)
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
        count = compose(llm, plan, output, log=log)
    return count


def _about_shapes(catalog: Catalog, count: int, seed: int, out: Path) -> int:
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
