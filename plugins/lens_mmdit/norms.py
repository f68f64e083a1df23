"""RMSNorm, modulated by the time or followed by the rotation of positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lens_mmdit.rope import channel_pairs


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in the dtype of x."""
    kind = x.device.type
    if kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind):
        # Under autocast torch's rms_norm returns float32, and everything added to it becomes float32 too. Without
        # autocast its kernel still takes the mean in float32.
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=eps)
    if kind != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On the CPU torch's is a dozen passes over memory, forward and backward; these are four.
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
        """Normalise x [B,N,D]. With shift and scale [B,1,D] or [B,N,D] the result is modulated:
        * (1 + scale) + shift."""
        # Everything is cast to x's dtype: under autocast a float32 weight would make the whole stream float32.
        if shift is None or scale is None:
            return rms_norm(x, self.eps) * self.weight.to(x.dtype)
        # Weight and scale are multiplied first, because they have D or B*D values where x has B*N*D.
        return torch.addcmul(shift.to(x.dtype), rms_norm(x, self.eps), (self.weight * (1 + scale)).to(x.dtype))


class _NormAndRotate(torch.autograd.Function):
    """RMSNorm and rotation in float32 at least, with a backward pass written by hand.

    Autograd's takes about twice as long, all of it passes over memory. Only x and one number a head are saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> Tensor:
        precise = x.to(rotation.real.dtype)
        norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        inverse = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, rotation, inverse)
        out = (precise * inverse).mul_(weight)
        channel_pairs(out).mul_(rotation)
        rotated: Tensor = out.to(x.dtype)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rotation, inverse = ctx.saved_tensors
        # A copy, because it is changed in place, and `grad` may belong to other functions too.
        grad = grad.to(rotation.real.dtype, copy=True, memory_format=torch.contiguous_format)
        channel_pairs(grad).mul_(rotation.conj())  # a rotation's transpose is the rotation back
        normed = x.to(grad.dtype) * inverse
        along = grad * normed
        weight_grad = along.flatten(0, -2).sum(0).to(weight.dtype)
        # The norm fixes the length of x, so the part of the gradient along x goes.
        mean = along.mul_(weight).mean(dim=-1, keepdim=True)
        return grad.mul_(weight).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), weight_grad, None, None


class RotaryRMSNorm(RMSNorm):
    """RMSNorm of x [B,S,H,E] over E, then rotation of its channel pairs by unit complex numbers [S,1,E/2], or by their
    real and imaginary parts [S,1,E/2,2]."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:  # type: ignore[override]  # it needs positions
        if torch.compiler.is_compiling() and x.dtype != torch.float64:
            return norm_and_rotate(x, self.weight, rotation, self.eps)
        if not rotation.is_complex():
            rotation = torch.view_as_complex(rotation)
        if x.device.type != "cpu" and not torch.is_grad_enabled():
            return norm_then_rotate(x, self.weight, rotation, self.eps)
        out: Tensor = _NormAndRotate.apply(x, self.weight, rotation, self.eps)  # type: ignore[no-untyped-call]  # torch's
        return out


def norm_then_rotate(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """What `_NormAndRotate` computes, without a gradient, with torch's fused norm: half the launches on a GPU, where an
    eager pass is bound by them (docs/gpu.md)."""
    precise = x.to(rotation.real.dtype)
    out = F.rms_norm(precise, x.shape[-1:], weight.to(precise.dtype), eps)
    channel_pairs(out).mul_(rotation)
    return out.to(x.dtype)


def norm_and_rotate(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """What `_NormAndRotate` computes, in real numbers and without a backward pass of its own: a compiler makes one
    kernel of it each way, but none of complex numbers."""
    precise = x.float()
    normed = precise * (precise.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight
    even, odd = torch.unflatten(normed, -1, (-1, 2)).unbind(-1)
    turn = torch.view_as_real(rotation) if rotation.is_complex() else rotation
    cosine, sine = turn[..., 0], turn[..., 1]
    out = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return out.flatten(-2).to(x.dtype)
