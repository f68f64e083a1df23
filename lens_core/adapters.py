"""LoRA: low-rank adapters beside a network's linear layers, through PEFT (Hu et al., 2021).

A layer W x becomes W x + (alpha / rank) B A x; only A and B learn, and B starts at 0, so a new adapter changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from lens_core.checkpoint import save_tensors
from lens_core.config import Adapter
from lens_core.types import ConfigError

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
    tensors = {
        f"{prefix}.{name.replace(f'.{NAME}.', '.')}": value for name, value in net.state_dict().items() if owned(name)
    }
    targets = sorted({name.removeprefix(f"{prefix}.").partition(".lora_")[0] for name in tensors})
    about = {"r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "target_modules": targets}
    header = json.dumps({f"{prefix}.{key}": value for key, value in about.items()})
    save_tensors(path, tensors, {"lora_adapter_metadata": header})


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
