"""Pipelines that share parts, as `LensPipeline.from_pipe` makes them: what is done to shared weights holds for each.

LoRAs, a device and an offload plan are states of the weights, not of one pipeline.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakSet

import torch

from lens_core.inference.parts import move_whole
from lens_core.types import ConfigError, LensError


class SharingPipelines:
    """The pipelines that were made of one another, as long as they are in use."""

    def __init__(self, first: Any) -> None:
        self.pipelines: WeakSet[Any] = WeakSet([first])

    def another(self, cls: type[Any], pipeline: Any) -> Any:
        """A new pipeline with the parts and the state of `pipeline`, and with descriptions of its own."""
        # A subclass that `pipeline` is not of sets up what it has beside that; else all comes from `pipeline`.
        if isinstance(pipeline, cls):
            new: Any = object.__new__(cls)
        else:
            try:
                inspect.signature(cls).bind()
            except TypeError as error:
                raise ConfigError(
                    f"{cls.__name__}() needs more than from_pipe gives it ({error}); give its arguments defaults, or "
                    f"call {cls.__name__}(...) with the parts"
                ) from error
            new = cls()
        vars(new).update(vars(pipeline))
        for name in ("presets", "specs", "plugins", "provenance", "progress_bar_config"):
            setattr(new, name, dict(getattr(pipeline, name)))
        new._estimate = None
        self.pipelines.add(new)
        return new

    def reached(self, pipeline: Any) -> list[Any]:
        """`pipeline`, then those that share weights with it, or with one of these."""
        reached = [pipeline]
        for one in reached:
            weights = one.present()
            reached += [
                other
                for other in self.pipelines
                if other not in reached and any(weights.get(kind) is part for kind, part in other.present().items())
            ]
        return reached

    def holds(self, pipeline: Any, kind: str) -> bool:
        """Whether another one has the part `kind` of `pipeline`, too."""
        part = pipeline.store.loaded[kind]
        return any(one is not pipeline and one.store.loaded[kind] is part for one in self.pipelines)

    def end_plans(self, pipeline: Any) -> bool:
        """Let go of the plans of all that are reached; whether there was one. Weights stay where they are."""
        planned = [one for one in self.reached(pipeline) if one.offload_manager is not None]
        for one in planned:
            one.offload_manager.remove()
            one.offload_manager = None
        return bool(planned)

    def move(self, pipeline: Any, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move `pipeline`, and to the device all that are reached; their own parts keep their dtype. Raises LensError
        where one does not fit: then all stay as they are."""
        parts, reached = list(pipeline.present().values()), self.reached(pipeline)
        others = {part for one in reached for part in one.present().values()}.difference(parts)
        move_whole(parts, device, dtype, others)
        for one in reached:
            if device is not None:
                one.device = device
            if dtype is not None and others.isdisjoint(one.present().values()):
                one._dtype = dtype

    def plan(self, pipeline: Any, manager: Any) -> None:
        """Draw under the plan of `manager`, made for `pipeline`, in all that are reached: it takes in their own parts.
        Raises LensError where those do not fit."""
        placed: list[Any] = []
        for one in self.reached(pipeline):
            one.offload_manager, one.device = manager, manager.accelerator.device
            shared = [part.module for part in manager.parts.values()]
            if alone := [kind for kind, part in one.present().items() if part not in shared]:
                try:
                    one.offload_manager = manager.extended(one.present(), placed)
                except torch.OutOfMemoryError as error:
                    raise LensError(
                        f"{' and '.join(alone)} of another pipeline, {one.source or 'one put together by hand'}, which "
                        f"shares weights with this one, does not fit on {one.device} too, so both are on the CPU: "
                        f"{str(error).splitlines()[0]}; use another plan, or drop that pipeline"
                    ) from error
            placed += one.offload_manager.parts.values()

    def rounded(self, encoder: Any) -> None:
        """Note that the weights of a text encoder are no longer those of its file."""
        for pipeline in self.pipelines:
            if pipeline.store.loaded["text_encoder"] is encoder:
                pipeline._encoder_origin = ""

    def fused(self, stack: Any) -> None:
        """Record the LoRAs of `stack`, which are kept for good, in every pipeline that draws with them; empty it."""
        for pipeline in self.pipelines:
            if pipeline._loras is stack:
                if stack.names:
                    pipeline.version = f"{pipeline.version}+{'+'.join(stack.names)}"
                pipeline.provenance = {**pipeline.provenance, **stack.provenance(pipeline.provenance)}
        stack.forget()
