"""What the contract checks have in common: assertions of one line, the same answer twice, a state through JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lens_core.catalog import _flaw
from lens_core.protocols import KINDS, HasWeights
from lens_core.types import TextFeatures

NEAR = 1e-4  # relative error that the order of sums may cost in float32


def hold(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def near(a: Tensor, b: Tensor, what: str) -> None:
    a, b = a.float(), b.float()
    hold(a.shape == b.shape and float((a - b).norm()) <= NEAR * max(1.0, float(b.norm())), what)


def shaped(x: Any, shape: Sequence[int], what: str, dtype: torch.dtype | None = None) -> None:
    hold(isinstance(x, Tensor), f"{what} is a {type(x).__name__}, not a tensor")
    hold(list(x.shape) == list(shape), f"{what} has the shape {list(x.shape)}, not {list(shape)}")
    wrong = x.dtype != dtype if dtype else not x.dtype.is_floating_point
    hold(not wrong, f"{what} is {x.dtype}, not {dtype or 'a float'}")
    hold(bool(x.isfinite().all()), f"{what} is not finite")


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twice(run: Callable[[], Any], what: str) -> Any:
    """The answer of `run`, which must be the same twice and draw nothing from torch's global generator."""
    before = torch.get_rng_state()
    first, second = run(), run()
    hold(torch.equal(before, torch.get_rng_state()), f"{what} draws from torch's global generator; take a generator")
    hold(equal(first, second), f"{what} is not the same twice")
    return first


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, TextFeatures):
        return equal([a.features, a.mask], [b.features, b.mask])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def through_json(state: Any, name: str) -> Any:
    """What is left of a state after a checkpoint."""
    try:
        return json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}.state_dict must hold tensors and what JSON can keep: {error}") from error


def component_name(component: Any, kind: str) -> str:
    """Its name for messages, once its class could be offered by a plugin."""
    name, protocol = type(component).__name__, KINDS[kind][1]
    fault = _flaw(type(component), kind)
    hold(fault is None, str(fault))
    promised = [
        *getattr(protocol, "__annotations__", ()),
        *(("save", "load") if HasWeights in protocol.__mro__ else ()),
    ]
    missing = [n for n in promised if not hasattr(component, n)]
    hold(not missing, f"{name} lacks {', '.join(missing)}, which every {kind} has")
    return name
