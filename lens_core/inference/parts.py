"""The parts of a pipeline: their names, and which of them are loaded, deferred or readable again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, did_you_mean

MODEL_PARTS = ("vae", "text_encoder", "backbone")
"""The parts that carry weights."""
PIPELINE_PARTS = (*MODEL_PARTS, "sampler")
DEFAULT_PRESETS: dict[str, Any] = {"steps": 20, "guidance_scale": 5.0}
"""What a checkpoint draws with where it does not say."""

PartReader = Callable[[], tuple[nn.Module, ComponentSpec]]
"""Reads a part of a checkpoint: the module, and the spec that builds it again."""


class PartStore:
    """Hold the parts of a pipeline. A deferred part is read when it is first used."""

    def __init__(
        self,
        loaded: Mapping[str, Any],
        deferred: Mapping[str, PartReader] | None = None,
        readers: Mapping[str, PartReader] | None = None,
    ) -> None:
        self.loaded: dict[str, Any] = {kind: loaded.get(kind) for kind in PIPELINE_PARTS}
        self.deferred = dict(deferred or {})
        self.readers = dict(readers or {})  # of every part with weights of the checkpoint, to read it again

    def replaced(self, kind: str, component: Any) -> PartStore:
        """Copy the store with another part. A shallow copy of a pipeline shares its store, and keeps the old part."""
        others = [{k: v for k, v in held.items() if k != kind} for held in (self.deferred, self.readers)]
        return PartStore({**self.loaded, kind: component}, *others)

    def read(self, kind: str) -> ComponentSpec:
        """Load a deferred part; return its spec."""
        reader = self.deferred.pop(kind)
        # Random numbers are forked: what is drawn next must not depend on when a part was read.
        with torch.random.fork_rng(devices=[]):
            self.loaded[kind], spec = reader()
        return spec

    def deferring(self, kinds: Iterable[str]) -> PartStore:
        """Copy the store without the named parts that can be read again; they are deferred."""
        again = {kind: self.readers[kind] for kind in kinds if kind in self.readers}
        return PartStore({**self.loaded, **dict.fromkeys(again)}, {**self.deferred, **again}, self.readers)

    def modules(self) -> dict[str, nn.Module]:
        """The loaded parts with weights, in the order in which they work."""
        return {
            kind: net for kind in ("text_encoder", "backbone", "vae") if isinstance(net := self.loaded[kind], nn.Module)
        }

    def require_all(self) -> None:
        """Raise LensError if a part that drawing needs is neither loaded nor deferred."""
        absent = [kind for kind in PIPELINE_PARTS if self.loaded[kind] is None and kind not in self.deferred]
        if absent:
            names = " and ".join(f"no {kind.replace('_', ' ')}" for kind in absent)
            raise LensError(f"there is {names} in this pipeline; add what it takes to draw")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; None and "auto": CUDA where there is some. Raises ConfigError."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"no device is called {str(device)!r}; use cpu, cuda or cuda:1") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{device}: this machine has no CUDA device that torch can use; use cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"{device}: CUDA devices are numbered from 0, and there are {count}; use cuda:{count - 1}")
    if resolved.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=resolved)
        except (RuntimeError, AssertionError, ImportError) as error:  # the last: its package is missing
            raise ConfigError(f"{device}: torch can use no such device on this machine; use cpu") from error
    return resolved


def resolve_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; None and "auto": float32 on CPUs, bfloat16 elsewhere. Raises ConfigError."""
    if name is None or name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = known.get(name) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"no dtype is called {name!r}.{did_you_mean(name, known)}")
    if not dtype.is_floating_point:
        raise ConfigError(f"weights cannot be {dtype}; use float32 or bfloat16")
    return dtype


def check_dtype(component: Any, dtype: torch.dtype) -> None:
    """Raise ConfigError if the component (a class or an instance) refuses to compute in `dtype`."""
    reason = component.refuses(dtype) if hasattr(component, "refuses") else None
    if reason:
        raise ConfigError(reason)


def move_whole(
    modules: Iterable[nn.Module],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    uncast: Iterable[nn.Module] = (),
) -> None:
    """Move all of `modules` to a device, a dtype, or both, and those that are `uncast` to the device. After an error
    every weight is where it was, in its dtype; those that were cast to a smaller one in place are rounded. Raises
    LensError where they do not fit."""
    moves = [*((net, dtype) for net in modules), *((net, None) for net in uncast)]
    target = None if device is None else torch.device(device)
    inner = [module for net, _ in moves for module in net.modules()]
    children = [(module._modules, dict(module._modules)) for module in inner]  # which a move may replace
    # What leaves its device is kept until all is there: that takes no more than was taken before. What is cast where it
    # is would be there twice, so it is cast back instead.
    before: list[tuple[Any, str, Any, torch.dtype, Tensor | None]] = [
        (owner, name, tensor, tensor.dtype, None if is_on(tensor, target) else tensor.data)
        for module in inner
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]
    try:
        for net, to in moves:
            net.to(device=device, dtype=to)
    except BaseException as error:
        for now, then in children:
            now.update(then)
        for owner, name, tensor, old, data in before:
            owner[name] = tensor
            if data is not None:
                tensor.data = data
            elif tensor.dtype != old:
                tensor.data = tensor.data.to(old)
        if isinstance(error, torch.OutOfMemoryError):
            where = target or "its device"
            raise LensError(
                f"the pipeline does not fit on {where}, and stays as it was: {str(error).splitlines()[0]}; use "
                'offload("auto"), or a smaller dtype'
            ) from error
        raise


def is_on(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether a tensor is on `device` already; None is wherever it is."""
    return device is None or tensor.device == device or (device.index is None and tensor.device.type == device.type)
