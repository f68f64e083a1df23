"""LoRA: low-rank adapters of a network's linear layers (Hu et al., 2021), to train, to fold in and to save.

A layer W x becomes W x + (alpha / rank) B A x; only A and B learn, and B starts at 0, so a new adapter changes nothing.
PEFT puts adapters beside layers for training; for sampling they are folded into the weights, at no cost a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from lens_core.checkpoints.lora_keys import FILE, Pair, write
from lens_core.checkpoints.lora_keys import read as read_pairs
from lens_core.recipe import LoraSpec
from lens_core.types import CheckpointError, ConfigError

__all__ = ["FILE", "LoRALayer", "LoRAStack", "attach", "fold", "merge", "owned", "read", "save", "tensors", "unfold"]
NAME = "default"  # PEFT's, which file formats leave out


def attach(net: nn.Module, adapter: LoraSpec) -> None:
    """Put `adapter` beside its target layers, in place; draws A from torch's default generator.

    Raises ConfigError if it names no linear layer of `net`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    chosen = [n for n in linear if not adapter.targets or any(_ends(n, target) for target in adapter.targets)]
    for target in adapter.targets:
        if not any(_ends(name, target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:12])
            raise ConfigError(f"adapter: no linear layer ends in {target!r}; layers end in {known}")
    if not chosen:
        raise ConfigError("adapter: the network has no linear layer to adapt; train it in full")
    # Names in full: PEFT would match a bare suffix in other places of the network too.
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=chosen)
    inject_adapter_in_model(config, net, adapter_name=NAME)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def owned(name: str) -> bool:
    """Whether a parameter or a tensor of a state belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def save(net: nn.Module, adapter: LoraSpec, path: Path, prefix: str, key_format: str = "diffusers") -> None:
    """Write the adapter in one of `lora_keys.KEY_FORMATS`: as diffusers reads it, `prefix.layer.lora_A.weight`, or as
    Comfy or sd-scripts does, for which a backbone has no other name."""
    values = {name.replace(f".{NAME}.", "."): value for name, value in tensors(net).items()}
    pairs = {}
    for name in sorted({name.partition(".lora_")[0] for name in values}):
        down, up = (values[f"{name}.lora_{side}.weight"] for side in "AB")
        pairs[name] = Pair(down, up, adapter.scale * adapter.rank)
    write(path, pairs, key_format, prefix)


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Fold the adapter into the weights it stood beside, in place: the network has its own names again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, nn.Module]] = [(n, m) for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        # safe_merge: weights that would not be finite raise, instead of being exported.
        layer.merge(safe_merge=True)  # type: ignore[operator]  # torch cannot know that it is PEFT's
        base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
        torch.autograd.graph.increment_version(list(base.parameters()))  # PEFT writes `.data`, which does not raise it
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, base)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """The adapter's part of the network's state."""
    return {name: value for name, value in net.state_dict().items() if owned(name)}


@frozen
class LoRALayer:
    """One layer's change: scale * up [out,rank] @ down [rank,in]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The change [out,in], in float32 at least."""
        # A product in bfloat16 would lose what a small rank learned.
        precise = torch.float64 if torch.float64 in (self.up.dtype, self.down.dtype) else torch.float32
        return self.scale * (self.up.to(precise) @ self.down.to(precise))


def read(path: Path, net: nn.Module) -> dict[str, LoRALayer]:
    """A LoRA file or its folder, in any of the key formats of `lora_keys` -> the change of each layer of
    `net`. Raises CheckpointError for what fits no layer, and for halves and shapes."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    changes = {}
    for layer, pair in read_pairs(path, layers).items():
        shape = tuple(layers[layer].weight.shape)
        if (len(pair.up), pair.down.shape[1]) != shape:
            raise CheckpointError(
                f"{path}: {layer} is {list(shape)} here, but {list(pair.up.shape)} x {list(pair.down.shape)} in the "
                "file; it was made for another model"
            )
        changes[layer] = LoRALayer(pair.down, pair.up, pair.alpha / pair.rank)
    return changes


@torch.no_grad()
def fold(net: nn.Module, changes: Mapping[str, LoRALayer], weight: float, plain: dict[str, Tensor]) -> None:
    """Add `weight` times the changes to the layers of `net`, in place. `plain` gets the weights as they were before."""
    for layer, change in changes.items():
        target: Tensor = net.get_submodule(layer).weight  # type: ignore[assignment]  # a linear layer's
        if layer not in plain:
            # On the host, once for each layer: a second LoRA changes what the first one has changed already.
            plain[layer] = target.detach().to("cpu", copy=True)
        delta = weight * change.delta().to(target.device)
        target.copy_(target.to(delta.dtype) + delta)


@torch.no_grad()
def unfold(net: nn.Module, plain: dict[str, Tensor]) -> None:
    """Put back, exactly, what `fold` changed, and empty `plain`."""
    for layer, before in plain.items():
        target: Tensor = net.get_submodule(layer).weight  # type: ignore[assignment]
        target.copy_(before)
    plain.clear()


@frozen
class Adapter:
    """One LoRA of a stack: the name that the user calls it by, its file's name, its changes, and its weight."""

    name: str
    file: str
    changes: Mapping[str, LoRALayer]
    weight: float


class LoRAStack:
    """The LoRAs that are folded into a backbone, and its weights from before, so that they can be taken out again."""

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []  # in the order in which they were added
        self._originals: dict[str, Tensor] = {}  # layer -> its weight without any LoRA, on the host

    @property
    def names(self) -> list[str]:
        """FILE:WEIGHT of each LoRA."""
        return [f"{adapter.file}:{adapter.weight:g}" for adapter in self.adapters]

    def add(self, backbone: nn.Module, path: str | Path, weight: float, name: str | None = None) -> None:
        """Fold a LoRA, a file or its folder, into `backbone`. Raises ConfigError and CheckpointError.

        `name`, for `reweight`, is default_0, default_1 … if None.
        """
        if not math.isfinite(weight):
            raise ConfigError(f"{path}: its weight is {weight}; give a finite number")
        name = f"default_{len(self.adapters)}" if name is None else name
        if any(adapter.name == name for adapter in self.adapters):
            raise ConfigError(f"an adapter called {name!r} is loaded already; give another name")
        changes = read(Path(path).expanduser(), backbone)
        fold(backbone, changes, weight, self._originals)
        self.adapters.append(Adapter(name, Path(path).name, changes, weight))

    def reweight(self, backbone: nn.Module, weights: Mapping[str, float]) -> None:
        """Give each LoRA the weight of its name, 0 where it is not named. Raises ConfigError for an unknown name and
        a weight that is not finite."""
        known = [adapter.name for adapter in self.adapters]
        for name, weight in weights.items():
            if name not in known:
                raise ConfigError(f"no adapter called {name!r} is loaded; loaded are {', '.join(known) or 'none'}")
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of the adapter {name!r} is {weight}; give a finite number")
        unfold(backbone, self._originals)
        self.adapters = [evolve(adapter, weight=float(weights.get(adapter.name, 0))) for adapter in self.adapters]
        for adapter in self.adapters:
            if adapter.weight:
                fold(backbone, adapter.changes, adapter.weight, self._originals)

    def remove(self, backbone: nn.Module) -> None:
        """Put the weights of `backbone` back, bit for bit. Subtracting would leave rounding errors."""
        unfold(backbone, self._originals)
        self.adapters.clear()

    def provenance(self, earlier: Mapping[str, Any]) -> dict[str, list[str]]:
        """What a checkpoint records: the LoRAs that were fused before, by `earlier`, and those that are in now."""
        names = [*earlier.get("loras", ()), *self.names]
        return {"loras": names} if names else {}
