"""What a run of `diffusion_nft` would need, before anything is loaded or sent: memory by part, calls, dollars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.recipe import Recipe, build
from lens_core.types import ConfigError, LensError


@frozen
class Estimate:
    """`memory`: bytes by part, on a device that holds everything, without activations. `calls` and `usd`: by reward, at
    most, without retries; 0 for one that costs nothing. `notes`: what was assumed."""

    rollouts: int
    pictures: int
    memory: Mapping[str, int]
    calls: Mapping[str, int]
    usd: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rollouts:,} rollouts, {self.pictures:,} scored pictures", "", "memory, GB (10^9 bytes)"]
        lines += [f"  {name:28}{size / 1e9:10.2f}" for name, size in self.memory.items()]
        lines += [f"  {'all of it':28}{sum(self.memory.values()) / 1e9:10.2f}", "", "rewards, at most"]
        lines += [f"  {name:28}{self.calls[name]:10,} calls {self.usd[name]:12,.2f} USD" for name in self.calls]
        return "\n".join([*lines, *(f"note: {note}" for note in ("activations come on top", *self.notes))])


def estimate(config: Any, recipe: Recipe, catalog: Catalog) -> Estimate:
    """`config` is the method's, from the same recipe. Networks are built without their weights. Raises ConfigError."""
    rollouts = -(-recipe.train.steps // config.updates_per_rollout)
    pictures = rollouts * config.prompts_per_rollout * config.pictures_per_prompt
    memory, notes = _memory(recipe, catalog, keeps_reference=config.kl > 0)
    parts = {path: build(catalog, kind, use, f"$.method.{path}") for path, kind, use in config.uses()}
    _, benchmark, options = parts.pop("prompts")
    try:
        prompts = benchmark(options).prompts()
    except LensError as error:
        prompts = []
        notes.append(f"a request of usual length is assumed, for the prompts cannot be read: {error}")
    calls: dict[str, int] = {}
    usd: dict[str, float] = {}
    for path, (name, reward, options) in parts.items():
        if path.endswith(".fallback"):
            continue  # it replaces another reward that failed, which is not often
        scorer = reward(options)
        cost = scorer.estimate(prompts, pictures) if hasattr(scorer, "estimate") else None
        calls[f"{path} {name}"] = cost.calls if cost else 0
        usd[f"{path} {name}"] = cost.usd if cost else 0.0
    return Estimate(rollouts, pictures, memory, calls, usd, tuple(notes))


def _memory(recipe: Recipe, catalog: Catalog, keeps_reference: bool) -> tuple[dict[str, int], list[str]]:
    from lens_core.inference.parts import MODEL_PARTS
    from lens_core.training.memory_estimate import cost, on_meta

    pipeline, notes = on_meta(recipe, catalog)
    held = {part: getattr(pipeline, part) for part in MODEL_PARTS}
    for part, net in held.items():
        if net is None:
            raise ConfigError(f"$.pipeline.{part}: missing; name one, or a checkpoint to start from")
    published = any("is not on this disk" in note for note in notes)
    memory, _ = cost(held, {"backbone": held["backbone"]}, list(held.values()), recipe, published)
    # Of a policy that learns through an adapter, adapters alone are copied: what they stand beside is held once.
    adapter = memory.get("backbone: adapter", 0)
    memory["backbone: old policy"] = adapter or memory["backbone: weights"]
    if keeps_reference:
        half = recipe.train.precision == "bf16"
        memory["backbone: reference, for kl"] = adapter or memory["backbone: weights"] // (2 if half else 1)
    return memory, notes
