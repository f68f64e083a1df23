"""Measure a reward before a model learns from it: does it agree with itself, and what do empty pictures score?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens_core.types import LensError, Prompt, Score


def audit(reward: Any, images: Tensor, prompts: Sequence[Prompt], seed: int = 0, auditor: Any = None) -> dict[str, Any]:
    """Score every picture twice, and three probes once. Images uint8 [B,3,H,W] with their prompts.

    `flips`: for each component, the share of pictures on which the two scores differ, of those on which either
    has a value: yes once and not applicable once is a flip too; `noise`: the standard
    deviation of one score around their mean, which is the least useful `min_std` of an advantage; `mean`, and the
    means of the `probes` blank (grey), noise and swapped (the picture of another prompt); `missing`: pictures without a
    score in each. A mean is None where nothing was scored. A reward that has `again()` gives its second score by it.
    With an `auditor`, another reward that is trusted: `agreement`, for each component that both have, the share of
    pictures on which their values are equal.
    """
    other = _swap(prompts)
    second = reward.again() if hasattr(reward, "again") else reward
    one, two = list(reward.score(images, prompts)), list(second.score(images, prompts))
    rng = torch.Generator().manual_seed(seed)
    probes = {
        "blank": reward.score(torch.full_like(images, 128), prompts),
        "noise": reward.score(torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=rng), prompts),
        "swapped": reward.score(images, other),
    }
    gaps = [a.value - b.value for a, b in zip(one, two, strict=True) if a.value is not None and b.value is not None]
    report: dict[str, Any] = {
        "pictures": len(images),
        "mean": _mean(one),
        "noise": math.sqrt(sum(g * g for g in gaps) / (2 * len(gaps))) if gaps else None,
        "flips": _flips(one, two),
        "probes": {name: _mean(scores) for name, scores in probes.items()},
        "missing": {name: _missing(s) for name, s in {"first": one, "second": two, **probes}.items()},
    }
    if auditor is not None:
        report["agreement"] = _same(one, list(auditor.score(images, prompts)))
    return report


def _flips(one: Sequence[Score], two: Sequence[Score]) -> dict[str, float]:
    """For each component, the share of pictures on which its value changed, or was there in one scoring alone. What
    failed was not scored, and does not count."""
    seen: dict[str, list[bool]] = {}
    for a, b in zip(one, two, strict=True):
        if "failed" in (a.status, b.status):
            continue
        for name in a.components.keys() | b.components.keys():
            seen.setdefault(name, []).append(a.components.get(name) != b.components.get(name))
    return {name: sum(changed) / len(changed) for name, changed in sorted(seen.items())}


def _same(one: Sequence[Score], two: Sequence[Score]) -> dict[str, float]:
    """For each component that two scorings of the same pictures have, the share on which they are equal."""
    seen: dict[str, list[bool]] = {}
    for a, b in zip(one, two, strict=True):
        for name in a.components.keys() & b.components.keys():
            seen.setdefault(name, []).append(a.components[name] == b.components[name])
    return {name: sum(same) / len(same) for name, same in sorted(seen.items())}


def _swap(prompts: Sequence[Prompt]) -> list[Prompt]:
    """For each prompt the next one that asks for something else."""
    others = []
    for i, prompt in enumerate(prompts):
        rest = [*prompts[i + 1 :], *prompts[:i]]
        other = next((p for p in rest if p.text != prompt.text), None)
        if other is None:
            raise LensError("an audit needs two different prompts at least, to swap them")
        others.append(other)
    return others


def _mean(scores: Sequence[Score]) -> float | None:
    values = [s.value for s in scores if s.value is not None]
    return sum(values) / len(values) if values else None


def _missing(scores: Sequence[Score]) -> int:
    return sum(s.value is None for s in scores)
