"""A discriminator's trained part: one small head on the features of each block of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = 8  # of the norm; the width must be a multiple


def conv(channels: int, width: int) -> nn.Module:
    """Looks at each place and its neighbours before anything is averaged."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(GROUPS, width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )


def linear(channels: int, width: int) -> nn.Module:
    """A direction in the features; `width` has no meaning. The least that a discriminator can be."""
    return nn.Conv2d(channels, 1, 1)


HEADS = {"conv": conv, "linear": linear}
"""Name -> a function of (channels, width) that gives a network from [B,channels,h,w] to [B,1,h,w]."""


class Heads(nn.Module):
    """Features [B,D,h,w] of each block -> logits [B, heads], in float32; any h, w. `kind` is a name of `HEADS`."""

    def __init__(self, channels: Sequence[int], width: int = 64, kind: str = "conv") -> None:
        super().__init__()
        self.heads = nn.ModuleList(HEADS[kind](c, width) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        # float32: the approximate R1 takes differences of logits, which bfloat16 would round away.
        with torch.autocast(features[0].device.type, enabled=False):
            dtype = next(self.parameters()).dtype
            logits = [head(f.to(dtype)).mean((1, 2, 3)) for head, f in zip(self.heads, features, strict=True)]
        return torch.stack(logits, dim=1)
