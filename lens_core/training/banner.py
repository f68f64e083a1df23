"""What `lens train` prints first: device, precision, what learns, data, steps, memory, folder, and soon the time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lens_core.io.readers import shown
from lens_core.recipe import ComponentSpec
from lens_core.training.muon import block_matrices
from lens_core.training.state import TrainingState
from lens_core.training.throughput import has_fast_bfloat16


def lines(state: TrainingState, step: int) -> list[str]:
    """The banner of a run that starts, or goes on, after `step` steps; `Trainer` adds the time when it knows it."""
    config, recipe = state.train_config, state.recipe
    batch = f", {config.micro_batches} micro-batches a step" if config.micro_batches > 1 else ""
    resumed = f", {step} of them made" if step else ""
    rows = {
        "method": recipe.method.use,
        "device": _device(state),
        "precision": f"{config.precision}{', compiled' if config.compile else ''}{'' if step else _slow(state)}",
        "learns": ", ".join(_parameters(state, name) for name in state.modules),
        "optimizer": _optimizer(state),
        "data": _data(recipe.dataset),
        "steps": f"{config.steps:,} in all{resumed}{batch}",
        "memory": f"about {_bytes(state) / 1e9:.2f} GB for weights, gradients and optimizer; activations come on top",
        "folder": str(state.out),
    }
    return [f"{name:10}{text}" for name, text in rows.items()]


def time_line(steps: int, seconds: float) -> str:
    """The estimate of the time for `steps` steps of `seconds` each."""
    total = steps * seconds
    words = f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} min" if total < 7200 else f"{total / 3600:.1f} h"
    return f"{'time':10}about {words} for {steps:,} steps, {seconds:.3g} s each; evaluations come on top"


def _device(state: TrainingState) -> str:
    device = state.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    several = f", {state.ranks.world} processes" if state.ranks.world > 1 else ""
    return f"{device} ({name}){several}"


def _slow(state: TrainingState) -> str:
    """A hint for a run that begins: one that goes on must keep its precision."""
    if state.train_config.precision != "bf16" or has_fast_bfloat16(state.accelerator.device):
        return ""
    return "; this CPU has no bfloat16 of its own, and is usually faster with --set train.precision=fp32"


def _parameters(state: TrainingState, name: str) -> str:
    """What of a module learns, of how much."""
    whole = sum(p.numel() for p in state.modules[name].parameters())
    learned = sum(p.numel() for p in state.trainable_parameters[name])
    if learned == whole:
        return f"{name} {_count(whole)}"
    return f"{name} {_count(learned)} of {_count(whole)} (LoRA of rank {state.train_config.lora[name].rank})"


def _optimizer(state: TrainingState) -> str:
    """What the optimizer trains. Muon leaves a network without `blocks()` to AdamW, which nothing else would say."""
    config = state.train_config
    if config.optimizer != "muon":
        return f"{config.optimizer}, lr {config.lr:g}"
    counts = {name: sum(p.numel() for p in _matrices(state, name)) for name in state.modules}
    parts = [f"{_count(n)} of {name}" if n else f"nothing of {name} (no repeated blocks)" for name, n in counts.items()]
    return f"muon for {', '.join(parts)}; adamw for all else; lr {config.lr:g}"


def _matrices(state: TrainingState, name: str) -> list[Tensor]:
    """What of a module Muon trains."""
    if state.train_config.optimizer != "muon":
        return []
    return [*block_matrices(state.modules[name], state.trainable_parameters[name])]


def _count(parameters: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return str(parameters)


def _data(spec: ComponentSpec | None) -> str:
    if spec is None:
        return "the method brings its own"
    options = ", ".join(f"{name}: {shown(value, 60)}" for name, value in spec.options.items())
    return f"{spec.use}{f' ({options})' if options else ''}"


def _bytes(state: TrainingState) -> int:
    """Bytes that this process holds between two steps, and in gradients; each tensor once."""
    parts = [*state.pipeline.present().values(), *state.modules.values(), *state.frozen_modules.values()]
    held = {id(t): t for net in parts for t in (*net.parameters(), *net.buffers())}
    total = _size(held.values()) + sum(_size(averages.values()) for averages in state.ema.values())
    for name, learned in state.trainable_parameters.items():
        total += 3 * _size(learned) - _size(_matrices(state, name))  # a gradient and two moments; Muon's matrices: one
    return total


def _size(tensors: Iterable[Tensor]) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)
