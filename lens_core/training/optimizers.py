"""The optimizer of a trainable module, and its step.

Three caches follow from weights and are kept until a weight changes: a backbone's modulation table, encoded prompts,
and the keys and values of an encoder's head. They see a change by `Tensor._version`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lens_core.recipe import Training


def adamw(parameters: Sequence[nn.Parameter], train: Training) -> torch.optim.Optimizer:
    """AdamW over `parameters`, in one kernel; its learning rate is set before each step."""
    return torch.optim.AdamW(parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True)


@torch.no_grad()
def apply_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer`, whichever it is, after which every cache that goes by versions sees new weights."""
    optimizer.step()
    # Fused kernels write weights without raising their version; all others raise it, and once more does no harm.
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])
