"""LoRA: low-rank adapters of a network's linear layers (Hu et al., 2021).

A layer W x becomes W x + (alpha / rank) B A x; only A and B learn, and B starts at 0, so a new adapter changes nothing.
PEFT puts adapters beside layers for training; for sampling they are folded into the weights, at no cost a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core.checkpoint import read_header, read_tensors, save_tensors
from lens_core.config import Adapter
from lens_core.types import CheckpointError, ConfigError

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
NAME = "default"  # PEFT's, which file formats leave out


def attach(net: nn.Module, adapter: Adapter) -> None:
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
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.scale * adapter.rank, target_modules=chosen)
    inject_adapter_in_model(config, net, adapter_name=NAME)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def owned(name: str) -> bool:
    """Whether a parameter or a tensor of a state belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def save(net: nn.Module, adapter: Adapter, path: Path, prefix: str) -> None:
    """Write the adapter as diffusers reads it: `prefix.layer.lora_A.weight`, with rank and alpha in its header."""
    plain = {name.replace(f".{NAME}.", "."): value for name, value in tensors(net).items()}
    targets = sorted({name.partition(".lora_")[0] for name in plain})
    about = {"r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "target_modules": targets}
    header = json.dumps({f"{prefix}.{key}": value for key, value in about.items()})
    save_tensors(path, {f"{prefix}.{name}": value for name, value in plain.items()}, {"lora_adapter_metadata": header})


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Fold the adapter into the weights it stood beside, in place: the network has its own names again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, nn.Module]] = [(n, m) for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)  # type: ignore[operator]  # torch cannot know that it is PEFT's
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())  # type: ignore[operator]


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """The adapter's part of the network's state."""
    return {name: value for name, value in net.state_dict().items() if owned(name)}


@frozen
class Low:
    """One layer's change: scale * up [out,rank] @ down [rank,in]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The change [out,in], in float32 at least."""
        precise = torch.promote_types(self.up.dtype, torch.float32)
        return self.scale * (self.up.to(precise) @ self.down.to(precise))


_KEY = re.compile(r"(.+)\.(?:lora_(?P<side>[AB]|down|up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))")
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "lora_unet_")
"""Of diffusers, Comfy, PEFT and sd-scripts."""


def read(path: Path, net: nn.Module) -> dict[str, Low]:
    """A LoRA file, or a folder with diffusers' `pytorch_lora_weights.safetensors` -> the change of each layer of `net`.

    Reads the names of PEFT and diffusers, of Comfy, and of sd-scripts (dots as underscores, lora_down and lora_up).
    alpha is a layer's own tensor, else the header's (`lora_alpha`, `ss_network_alpha`), else the rank. Raises
    CheckpointError for keys that fit no layer, for halves and for shapes, and lists them.
    """
    file = path / FILE if path.is_dir() else path
    found, header = read_tensors(file), read_header(file)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    names = {alias: name for name in layers for alias in (name, f"transformer_{name}".replace(".", "_"))}
    names |= {name.replace(".", "_"): name for name in layers}
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in found.items():
        match = _KEY.fullmatch(key)
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        layer = names.get(match[1].removeprefix(prefix)) if match else None
        if match is None or layer is None:
            strange.append(key)
            continue
        side = {"A": "down", "B": "up", None: "alpha"}.get(match["side"], match["side"])
        parts.setdefault(layer, {})[str(side)] = value
    if strange or not parts:
        listed = ", ".join(sorted(strange)[:5]) or "none at all"
        raise CheckpointError(f"{file}: {len(strange)} of {len(found)} tensors fit no layer of this model ({listed})")
    overall = _alpha(header)
    changes = {}
    for layer, sides in parts.items():
        if "down" not in sides or "up" not in sides:
            raise CheckpointError(f"{file}: {layer} has only its {', '.join(sorted(sides))}; fetch the file again")
        down, up = sides["down"], sides["up"]
        shape = tuple(layers[layer].weight.shape)
        if down.ndim != 2 or up.ndim != 2 or (len(up), down.shape[1]) != shape or len(down) != up.shape[1]:
            raise CheckpointError(
                f"{file}: {layer} is {list(shape)} here, but {list(up.shape)} x {list(down.shape)} in the file; "
                "it was made for another model"
            )
        alpha = float(sides["alpha"]) if "alpha" in sides else overall
        changes[layer] = Low(down, up, 1.0 if alpha is None else alpha / len(down))
    return changes


def _alpha(header: Mapping[str, str]) -> float | None:
    """The alpha that a file's header gives for all its layers, or None."""
    try:
        about = json.loads(header.get("lora_adapter_metadata", "{}"))
        given = [value for key, value in about.items() if key.rpartition(".")[2] == "lora_alpha"]
        given += [header[key] for key in ("ss_network_alpha", "alpha") if key in header]
        return float(given[0]) if given else None
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the header of the LoRA file cannot be read ({error}); fetch it again") from error


@torch.no_grad()
def fold(net: nn.Module, changes: Mapping[str, Low], weight: float, plain: dict[str, Tensor]) -> None:
    """Add `weight` times the changes to the layers of `net`, in place. `plain` gets the weights as they were before."""
    for layer, change in changes.items():
        target: Tensor = net.get_submodule(layer).weight  # type: ignore[assignment]  # a linear layer's
        if layer not in plain:
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
