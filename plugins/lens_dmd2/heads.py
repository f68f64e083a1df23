"""A discriminator's trained part: one small head on each tapped block of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = 8  # of the norm; the width must be a multiple


class Heads(nn.Module):
    """Features [B,D,h,w] of each tap -> logits [B, taps], in float32; any h, w."""

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.taps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, width, 3, padding=1),
                nn.GroupNorm(GROUPS, width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for c in channels
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        # The approximate R1 takes differences of logits, of which bfloat16 would leave little.
        with torch.autocast(features[0].device.type, enabled=False):
            dtype = next(self.parameters()).dtype
            logits = [tap(f.to(dtype)).mean((1, 2, 3)) for tap, f in zip(self.taps, features, strict=True)]
        return torch.stack(logits, dim=1)
