"""RMSNorm, modulated by the time or followed by the rotation of positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lens_mmdit.rope import channel_pairs


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in the dtype of x."""
    kind = x.device.type
    if kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind):
        # There rms_norm would answer in float32, and pull up all that it meets. Its kernel takes the mean in float32
        # whatever x is.
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=eps)
    if kind != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On the CPU that is a dozen passes over memory, forward and backward; these are four.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    out: Tensor = x * (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
    return out


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """With shift and scale [B,1,D] or [B,N,D], for x [B,N,D], the result is modulated: * (1 + scale) + shift."""
        # Everything is cast to x's dtype: under autocast a float32 weight would pull the whole stream up to float32.
        if shift is None or scale is None:
            return unit(x, self.eps) * self.weight.to(x.dtype)
        return torch.addcmul(shift.to(x.dtype), unit(x, self.eps), (self.weight * (1 + scale)).to(x.dtype))


class _NormTurn(torch.autograd.Function):
    """RMSNorm and rotation in float32 at least. By hand, because autograd's passes over memory take about twice as
    long; only x and one number a head are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by: Tensor, eps: float) -> Tensor:
        precise = x.to(by.real.dtype)
        norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        inverse = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, by, inverse)
        out = (precise * inverse).mul_(weight)
        channel_pairs(out).mul_(by)
        turned: Tensor = out.to(x.dtype)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, by, inverse = ctx.saved_tensors
        grad = grad.to(by.real.dtype, copy=True, memory_format=torch.contiguous_format)
        channel_pairs(grad).mul_(by.conj())
        normed = x.to(grad.dtype) * inverse
        along = grad * normed
        for_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        mean = along.mul_(weight).mean(dim=-1, keepdim=True)
        return grad.mul_(weight).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), for_weight, None, None


class TurningNorm(RMSNorm):
    """RMSNorm of x [B,S,H,E] over E, then rotation of its channel pairs by the unit complex `by` [S,1,E/2]."""

    def forward(self, x: Tensor, by: Tensor) -> Tensor:  # type: ignore[override]  # it needs positions
        out: Tensor = _NormTurn.apply(x, self.weight, by, self.eps)  # type: ignore[no-untyped-call]  # torch's own
        return out
