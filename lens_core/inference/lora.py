"""LoRA: low-rank adapters of a network's linear layers (Hu et al., 2021), to train, to fold in and to save.

A layer W x becomes W x + (alpha / rank) B A x; only A and B learn, and B starts at 0, so a new adapter changes nothing.
PEFT puts adapters beside layers for training; for sampling they are folded into the weights, at no cost a step.
Files of DoRA, LoHa and LoKr are folded as well (`checkpoints.adapters`); LoRA alone is trained here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from lens_core.arguments import number
from lens_core.checkpoints import adapters, packed_linear
from lens_core.checkpoints.lora_keys import FILE, write
from lens_core.checkpoints.lora_keys import read as read_adapters
from lens_core.checkpoints.packed_linear import PackedLinear, PackedWeight
from lens_core.io.readers import shown
from lens_core.recipe import LoraSpec
from lens_core.types import CheckpointError, ConfigError

__all__ = ["FILE", "LoRAStack", "Original", "attach", "fold", "merge", "owned", "read", "save", "tensors", "unfold"]
NAME = "default"  # PEFT's, which file formats leave out
ATTRIBUTE = "lens_loras"  # of a backbone: its LoRAStack


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
        pairs[name] = adapters.LoRA(down, up, adapter.scale * adapter.rank)
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
class Original:
    """A layer's weight and bias before any adapter, on the host."""

    weight: Tensor | PackedWeight
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> Original:
        """Those of `layer`. One that is quantised gets a plain weight, which an adapter can be added to."""
        bias: Tensor | None = layer.bias  # type: ignore[assignment]  # a linear layer's
        kept = None if bias is None else bias.detach().to("cpu", copy=True)
        if isinstance(layer, PackedLinear):
            before = packed_linear.unpack(layer)
            return cls(PackedWeight(before.form, before.packed.to("cpu")), kept)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return cls(weight.detach().to("cpu", copy=True), kept)

    def plain(self, like: Tensor) -> Tensor:
        """The weight in the dtype and on the device of `like`."""
        weight = self.weight.plain() if isinstance(self.weight, PackedWeight) else self.weight
        return weight.to(like)

    def restore(self, layer: nn.Linear) -> None:
        """Put back both, bit for bit. Subtracting would leave rounding errors."""
        if isinstance(self.weight, PackedWeight):
            packed_linear.repack(layer, self.weight)
        else:
            layer.weight.copy_(self.weight)
        if self.bias is not None:
            layer.bias.copy_(self.bias)


def read(path: Path, net: nn.Module) -> dict[str, adapters.Adapter]:
    """A LoRA file or its folder, in any of the key formats of `lora_keys` -> the adapter of each layer of
    `net`. Raises CheckpointError for what fits no layer, and for halves and shapes."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    changes = read_adapters(path, layers)
    for layer, change in changes.items():
        shape = (layers[layer].out_features, layers[layer].in_features)
        if change.shape != shape:
            factors = " x ".join(str(list(f.shape)) for f in reversed(change.factors.values()))
            raise CheckpointError(
                f"{path}: {layer} is {list(shape)} here, but {factors} in the file; it was made for another model"
            )
        if change.bias is not None and layers[layer].bias is None:
            raise CheckpointError(
                f"{path}: {layer} has no bias here, and one in the file; it was made for another model"
            )
    return changes


@torch.no_grad()
def fold(
    net: nn.Module, changes: Mapping[str, adapters.Adapter], weight: float, originals: dict[str, Original]
) -> None:
    """Add `weight` times the changes to the layers of `net`, in place. `originals` gets what they were before.

    Each change is that of the layer's own weight, so that changes add up in any order; of DoRA's, half is half way."""
    for name, change in changes.items():
        layer: nn.Linear = net.get_submodule(name)  # type: ignore[assignment]
        if name not in originals:
            # Once for each layer: a second adapter changes what the first one has changed already.
            originals[name] = Original.of(layer)
        base = originals[name].plain(layer.weight) if change.magnitude is not None else None
        _add(layer.weight, weight * change.delta(base).to(layer.weight.device))
        if (shift := change.shift()) is not None:
            _add(layer.bias, weight * shift.to(layer.bias.device))


def _add(target: Tensor, delta: Tensor) -> None:
    target.copy_(target.to(torch.promote_types(target.dtype, delta.dtype)) + delta)


@torch.no_grad()
def unfold(net: nn.Module, originals: dict[str, Original]) -> None:
    """Put back, exactly, what `fold` changed, and empty `originals`."""
    for name in list(originals):
        originals[name].restore(net.get_submodule(name))  # type: ignore[arg-type]  # a linear layer
        del originals[name]  # one by one: after Ctrl-C the rest is put back by the next call


@frozen
class Adapter:
    """One LoRA of a stack: the name that the user calls it by, its file's name, its changes with their hash, and its
    weight."""

    name: str
    file: str
    changes: Mapping[str, adapters.Adapter]
    digest: str
    weight: float


class LoRAStack:
    """The LoRAs that are folded into a backbone, and its weights from before, so that they can be taken out again.

    An error while they change, Ctrl-C included, leaves those in that were in.
    """

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []  # in the order in which they were added
        self._originals: dict[str, Original] = {}  # layer -> what it is without any LoRA

    def __deepcopy__(self, memo: dict[int, Any]) -> LoRAStack:
        """For a copy of the backbone. Nothing writes into the tensors, so they are shared."""
        other = LoRAStack()
        other.adapters, other._originals = self.adapters, dict(self._originals)
        return other

    @classmethod
    def of(cls, backbone: Any) -> LoRAStack:
        """That of a backbone, which has one from its first LoRA on: all pipelines that draw with it share the LoRAs."""
        stack = getattr(backbone, ATTRIBUTE, None)
        return stack if isinstance(stack, cls) else cls()

    @property
    def names(self) -> list[str]:
        """FILE:WEIGHT of each LoRA."""
        return [f"{adapter.file}:{adapter.weight:g}" for adapter in self.adapters]

    @property
    def hashes(self) -> list[str]:
        """A short hash of the content of each LoRA, whose file may have the name of another."""
        return [adapter.digest for adapter in self.adapters]

    def facts(self) -> dict[str, list[str]]:
        """What a picture records."""
        return {"loras": self.names, "lora_hashes": self.hashes} if self.adapters else {}

    def add(self, backbone: nn.Module, path: str | Path, weight: float, name: str | None = None) -> None:
        """Fold a LoRA, a file or its folder, into `backbone`. Raises ConfigError and CheckpointError.

        `name`, for `reweight`, is the first of default_0, default_1 … that is free if None.
        """
        if not isinstance(path, str | os.PathLike):  # diffusers takes a dict of tensors too
            raise ConfigError(f"a LoRA must be a file or a folder, not {type(path).__name__}")
        weight = number("the weight of a LoRA", weight)
        taken = [adapter.name for adapter in self.adapters]
        name = next(n for i in itertools.count() if (n := f"default_{i}") not in taken) if name is None else name
        if not isinstance(name, str):
            raise ConfigError(f"adapter_name must be a text, not {shown(name)}")
        if name in taken:
            raise ConfigError(f"an adapter called {name!r} is loaded already; give another name")
        changes = read(Path(path).expanduser(), backbone)
        new = Adapter(name, Path(path).name, changes, adapters.digest(changes), weight)
        setattr(backbone, ATTRIBUTE, self)
        with self._restored_after_an_error(backbone):
            fold(backbone, changes, weight, self._originals)
            self.adapters = [*self.adapters, new]

    def replaces_weights(self, backbone: nn.Module) -> bool:
        """Whether folding or unfolding gives layers other tensors, instead of other values in those that they have."""
        kept = any(isinstance(original.weight, PackedWeight) for original in self._originals.values())
        return kept or bool(packed_linear.packed_layers(backbone))

    def reweight(self, backbone: nn.Module, weights: Mapping[str, float]) -> None:
        """Give each LoRA the weight of its name, 0 where it is not named. Raises ConfigError for an unknown name and
        a weight that is not finite."""
        known = [adapter.name for adapter in self.adapters]
        for name in weights:
            if name not in known:
                raise ConfigError(f"no adapter called {name!r} is loaded; loaded are {', '.join(known) or 'none'}")
        chosen = {name: number(f"the weight of the adapter {name!r}", weight) for name, weight in weights.items()}
        with self._restored_after_an_error(backbone):
            self.adapters = [evolve(adapter, weight=chosen.get(adapter.name, 0.0)) for adapter in self.adapters]
            self._fold_anew(backbone)

    def remove(self, backbone: nn.Module) -> None:
        """Put the weights of `backbone` back, bit for bit. Subtracting would leave rounding errors."""
        with self._restored_after_an_error(backbone):
            unfold(backbone, self._originals)
            self.adapters = []

    def forget(self) -> None:
        """Keep what is folded in for good."""
        self.adapters = []
        self._originals.clear()

    def _fold_anew(self, backbone: nn.Module) -> None:
        """Let the weights be those before any LoRA, changed by `adapters`."""
        unfold(backbone, self._originals)
        for adapter in self.adapters:
            if adapter.weight:
                fold(backbone, adapter.changes, adapter.weight, self._originals)

    @contextmanager
    def _restored_after_an_error(self, backbone: nn.Module) -> Iterator[None]:
        """The time in which LoRAs change. Half a LoRA would draw, and no picture would record it."""
        before = self.adapters
        try:
            yield
        except BaseException:
            self.adapters = before
            self._fold_anew(backbone)
            raise

    def provenance(self, earlier: Mapping[str, Any]) -> dict[str, list[str]]:
        """What a checkpoint records: the LoRAs that were fused before, by `earlier`, and those that are in now."""
        names = [*earlier.get("loras", ()), *self.names]
        return {"loras": names} if names else {}
