"""Pipelines that share parts, as `LensPipeline.from_pipe` makes them: what is done to shared weights holds for each.

LoRAs, a device and an offload plan are states of the weights, not of one pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from lens_core.inference.parts import move_whole


class SharingPipelines:
    """The pipelines that were made of one another, as long as they are in use."""

    def __init__(self, first: Any) -> None:
        self.pipelines: WeakSet[Any] = WeakSet([first])

    def another(self, cls: type[Any], pipeline: Any) -> Any:
        """A new pipeline with the parts and the state of `pipeline`, and with descriptions of its own."""
        # A subclass that `pipeline` is not of sets up what it has beside that; else all comes from `pipeline`.
        new: Any = object.__new__(cls) if isinstance(pipeline, cls) else cls()
        vars(new).update(vars(pipeline))
        for name in ("presets", "specs", "plugins", "provenance", "progress_bar_config"):
            setattr(new, name, dict(getattr(pipeline, name)))
        new._estimate = None
        self.pipelines.add(new)
        return new

    def moved(self, pipeline: Any) -> None:
        """Let the others, where they share weights, be where `pipeline` is now: on its device, under its offload plan.
        Parts that they do not share follow. Raises LensError where those do not fit."""
        reached = [pipeline]
        for one in reached:
            weights = one.present()
            for other in [other for other in self.pipelines if other not in reached]:
                alone = {kind: part for kind, part in other.present().items() if weights.get(kind) is not part}
                if len(alone) < len(other.present()):
                    self._follow(other, alone, reached)
                    reached.append(other)

    def _follow(self, other: Any, alone: Mapping[str, Any], reached: Sequence[Any]) -> None:
        """Bring `other` to where those are that are `reached`; `alone` are the parts that have not come with them."""
        plan, before = reached[0].offload_manager, other.offload_manager
        if before is not None:
            before.remove(alone)
        other.offload_manager, other._dtype = None, reached[0]._dtype
        if plan is None:
            move_whole(alone.values(), reached[0].device, None)
        else:
            placed = [part for one in reached for part in one.offload_manager.parts.values()]
            other.offload_manager = plan.extended(other.present(), placed) if alone else plan
        other.device = reached[0].device

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
