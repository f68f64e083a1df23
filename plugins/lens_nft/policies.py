"""Copies of the policy: the old policy that draws, and the reference policy of the KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lens_core.inference import lora
from lens_core.training.frozen_weights import frozen_copy


def policy_copy(net: nn.Module) -> nn.Module:
    """A frozen copy of `net`. Of a net with LoRA, the adapters alone are copied: the weights beside them never change,
    and are held once."""
    named = [*net.named_parameters(), *net.named_buffers()]
    fixed = {id(tensor): tensor for name, tensor in named if not lora.owned(name)}
    has_lora = len(fixed) < len({id(tensor) for _, tensor in named})
    return frozen_copy(net, fixed.values() if has_lora else ())


def trained_state(net: nn.Module) -> dict[str, Tensor]:
    """The state of the net's adapters if it has any, else all of it."""
    state: dict[str, Tensor] = net.state_dict()
    return {k: v for k, v in state.items() if lora.owned(k)} or state


@torch.no_grad()
def ema_update(old: nn.Module, new: nn.Module, decay: float) -> None:
    """old = decay old + (1 - decay) new, in place, in every weight and buffer (DiffusionNFT's soft
    update of the sampling policy).

    Integer buffers are copied. `decay`: 0 copies the new policy, 1 keeps the old one.
    """
    fresh = new.state_dict()
    for name, value in old.state_dict().items():
        # Beside adapters both policies stand on one tensor. Averaging it with itself would round it.
        if value.data_ptr() == fresh[name].data_ptr():
            continue
        if value.dtype.is_floating_point:
            value.lerp_(fresh[name].to(value.dtype), 1 - decay)
        else:
            value.copy_(fresh[name])
