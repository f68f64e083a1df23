"""The optimizer of a trainable module, and its step.

Three caches follow from weights and are kept until a weight changes: a backbone's modulation table, encoded prompts,
and the keys and values of an encoder's head. They see a change by `Tensor._version`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lens_core.training.muon import Muon, block_matrices
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from lens_core.recipe import Training


def check_module_names(train: Training, modules: Collection[str]) -> None:
    """Raise ConfigError where an option of `train` names a module that the method does not train."""
    for option in ("lora", "lr_multipliers"):
        for name in getattr(train, option):
            if name not in modules:
                raise ConfigError(
                    f"$.train.{option}: no trainable module is called {name!r}; there are {', '.join(modules)}"
                )


def build(
    net: nn.Module, parameters: Sequence[nn.Parameter], train: Training, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `train` names, over the trainable `parameters` of `net`. Raises ConfigError for Muon where
    weights are sharded."""
    if train.optimizer == "adamw":
        return adamw(parameters, train)
    if sharded:
        raise ConfigError(
            "$.train.optimizer: muon needs whole matrices, and fsdp_shards divides them; use fsdp_shards: 1 or "
            "optimizer: adamw"
        )
    matrices = block_matrices(net, parameters)
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return Muon(matrices, others, train.lr, train.betas, train.weight_decay)


def adamw(parameters: Sequence[nn.Parameter], train: Training) -> torch.optim.Optimizer:
    """AdamW over `parameters`, in one kernel; its learning rate is set before each step."""
    return torch.optim.AdamW(parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)


@torch.no_grad()
def apply_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer`, whichever it is, after which every cache that goes by versions sees new weights."""
    optimizer.step()
    # Fused kernels write weights without raising their version; all others raise it, and once more does no harm.
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])
