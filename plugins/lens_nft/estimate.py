"""What a run of `diffusion_nft` would need, before anything is loaded or sent: memory by part, calls, dollars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core import checkpoint
from lens_core.catalog import Catalog
from lens_core.config import Recipe, Use, build
from lens_core.types import ConfigError, LensError

PUBLISHED = {"vae": "flux2", "text_encoder": "gpt_oss", "backbone": "mmdit"}
"""What stands in for a checkpoint that is not on this disk: the parts of the published one; its sizes are defaults."""
FLOAT32 = 4  # bytes; a run holds its weights so, whatever its precision


@frozen
class Estimate:
    """`memory`: bytes by part, on a device that holds everything, without activations. `calls` and `usd`: by judge, at
    most, without retries; 0 for one that costs nothing. `notes`: what was assumed."""

    rollouts: int
    pictures: int
    memory: Mapping[str, int]
    calls: Mapping[str, int]
    usd: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rollouts:,} rollouts, {self.pictures:,} judged pictures", "", "memory, GB (10^9 bytes)"]
        lines += [f"  {name:28}{size / 1e9:10.2f}" for name, size in self.memory.items()]
        lines += [f"  {'all of it':28}{sum(self.memory.values()) / 1e9:10.2f}", "", "judges, at most"]
        lines += [f"  {name:28}{self.calls[name]:10,} calls {self.usd[name]:12,.2f} USD" for name in self.calls]
        return "\n".join([*lines, *(f"note: {note}" for note in ("activations come on top", *self.notes))])


def estimate(config: Any, recipe: Recipe, catalog: Catalog) -> Estimate:
    """`config` is the method's, from the same recipe. Networks are built without their weights. Raises ConfigError."""
    rollouts = -(-recipe.train.steps // config.updates)
    pictures = rollouts * config.prompts_per_rollout * config.pictures_per_prompt
    memory, notes = _memory(recipe, catalog, keeps_base=config.kl > 0)
    parts = {path: build(catalog, kind, use, f"$.method.{path}") for path, kind, use in config.uses()}
    _, benchmark, options = parts.pop("prompts")
    try:
        prompts = benchmark(options).prompts()
    except LensError as error:
        prompts = []
        notes.append(f"a judge's usual request is assumed, for the prompts cannot be read: {error}")
    calls: dict[str, int] = {}
    usd: dict[str, float] = {}
    for path, (name, reward, options) in parts.items():
        if path.endswith(".fallback"):
            continue  # asked where another failed: instead of it, and not often
        judge = reward(options)
        found = judge.estimate(prompts, pictures) if hasattr(judge, "estimate") else None
        calls[f"{path} {name}"] = found.calls if found else 0
        usd[f"{path} {name}"] = found.usd if found else 0.0
    return Estimate(rollouts, pictures, memory, calls, usd, tuple(notes))


def _memory(recipe: Recipe, catalog: Catalog, keeps_base: bool) -> tuple[dict[str, int], list[str]]:
    import torch

    from lens_core import adapters

    uses, notes = _uses(recipe, catalog)
    memory: dict[str, int] = {}
    for part, use in uses.items():
        _, cls, options = build(catalog, part, use, f"$.pipeline.{part}")
        with torch.device("meta"):
            net = cls(options).requires_grad_(False)
            size = _bytes(net.state_dict().values())
            memory[f"{part}: weights"] = size
            if part != "backbone":
                continue
            adapter = recipe.train.adapters.get("backbone")
            if adapter is not None:
                adapters.attach(net, adapter)
        learned = [p for name, p in net.named_parameters() if adapter is None or adapters.owned(name)]
        grows = _bytes(learned)
        if adapter is not None:
            memory["backbone: adapter"] = grows
            size += grows
        memory["backbone: gradients"] = grows
        memory["backbone: AdamW's moments"] = 2 * grows
        if recipe.train.ema:
            memory["backbone: moving average"] = grows if adapter is not None else size
        memory["backbone: old policy"] = size
        if keeps_base:
            memory["backbone: start, for kl"] = size
    return memory, notes


def _uses(recipe: Recipe, catalog: Catalog) -> tuple[dict[str, Use], list[str]]:
    """What each part with weights will be: as the recipe names it, or as its start does, or as published."""
    start, notes = recipe.pipeline.start, []
    uses = {part: Use(name) for part, name in PUBLISHED.items()}
    if start is not None:
        try:
            folder = catalog.first("lens_fetch", start) or Path(start).expanduser()
            components = checkpoint.describe(folder, catalog)["components"]
            uses |= {part: Use(c["use"], dict(c.get("config", {}))) for part, c in components.items() if part in uses}
        except LensError:
            notes.append(f"{start} is not on this disk; the sizes are those of the published parts")
    for part in PUBLISHED:
        named = getattr(recipe.pipeline, part)
        if named is not None:
            uses[part] = named
        elif start is None:
            raise ConfigError(f"$.pipeline.{part}: missing; name one, or a checkpoint to start from")
    return uses, notes


def _bytes(tensors: Any) -> int:
    return sum(FLOAT32 * t.numel() for t in tensors)
