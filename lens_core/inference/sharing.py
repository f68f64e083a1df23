"""Pipelines that share parts, as `LensPipeline.from_pipe` makes them: what is done to shared weights holds for each.

LoRAs, a device and an offload plan are states of the weights, not of one pipeline.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from lens_core.types import ConfigError


class SharingPipelines:
    """The pipelines that were made of one another, as long as they are in use."""

    def __init__(self, first: Any) -> None:
        self.pipelines: WeakSet[Any] = WeakSet([first])

    def another(self, cls: type[Any], pipeline: Any) -> Any:
        """A new pipeline with the parts and the state of `pipeline`, and with descriptions of its own."""
        new: Any = object.__new__(cls)
        vars(new).update(vars(pipeline))
        for name in ("presets", "specs", "plugins", "provenance", "progress_bar_config"):
            setattr(new, name, dict(getattr(pipeline, name)))
        new._estimate = None
        self.pipelines.add(new)
        return new

    def moved(self, pipeline: Any) -> None:
        """Tell the others, where all their weights are those of `pipeline`, where these are now and in which dtype."""
        weights = pipeline.present()
        for other in self.pipelines:
            if other.present() == weights:
                other.device, other.offload_manager = pipeline.device, pipeline.offload_manager
                other._dtype = pipeline._dtype

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

    def check_alone(self, pipeline: Any, kind: str) -> None:
        """Raise ConfigError where a part is to be replaced under an offload plan that others draw with, too."""
        manager = pipeline.offload_manager
        if any(other is not pipeline and other.offload_manager is manager for other in self.pipelines):
            raise ConfigError(
                f"{kind}: another pipeline of from_pipe is under the same offload plan; call to('cpu'), replace the "
                f"{kind}, and call offload again"
            )
