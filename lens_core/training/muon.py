"""The optimizer Muon: orthogonalised momentum for weight matrices, AdamW for all other weights.

Muon (Jordan et al., 2024): https://kellerjordan.github.io/posts/muon/; the scale of its step that lets it share AdamW's
learning rate: https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lens_core.training.throughput import has_fast_bfloat16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration that orthogonalises
ITERATIONS = 5
EPS = 1e-7
MOMENTUM = 0.95
RMS = 0.2  # root mean square of a step at lr 1, as AdamW's


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (`match_rms_adamw`) for `matrices` [M,N], `torch.optim.AdamW` for `others`, in one optimizer;
    on CPUs without bfloat16 in float32, where torch's is always in bfloat16.

    Matrices of one shape are orthogonalised together: as few kernels as for one, where torch launches 25 for each of
    them. A learning rate that is a tensor, and a step, can be recorded in a CUDA graph.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        # `fused` tells torch to leave AdamW's step counts in float32, on the device, when a state is loaded.
        groups = [
            {"params": list(matrices), "muon": True, "fused": True},
            {"params": list(others), "muon": False, "fused": True},
        ]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # without a closure
        """Move every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["muon"]:
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)

    def _muon(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            by_shape.setdefault(parameter.shape, []).append(parameter)
        lr, decay = group["lr"], group["weight_decay"]
        for shape, alike in by_shape.items():
            weights: list[Any] = list(alike)
            buffers = [self.state[p]["momentum_buffer"] for p in alike]
            grads: list[Any] = [p.grad for p in alike]
            torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
            # Nesterov's: the gradient, moved towards the momentum.
            steps = orthogonalise(torch.stack(torch._foreach_lerp(grads, buffers, MOMENTUM)))
            if decay:
                torch._foreach_mul_(weights, 1 - lr * decay)
            moves = steps.to(alike[0].dtype) * (-lr * RMS * math.sqrt(max(shape)))
            torch._foreach_add_(weights, list(moves.unbind()))

    def _adamw(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        grads: list[Any] = [p.grad for p in parameters]
        first, second, counts = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            list(parameters), grads, first, second, [], counts, fused=True, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=1e-8,
        )  # fmt: skip


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [K,M,N] -> [K,M,N] with the same singular vectors and singular values of about 1 (0.7 to 1.2), by Newton
    and Schulz' iteration. In bfloat16, or in float32 where the device would be slower in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if has_fast_bfloat16(matrices.device) else matrices.float()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def block_matrices(net: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `parameters` that are weight matrices of the network's repeated blocks, which `blocks()` lists."""
    blocks = net.blocks() if callable(getattr(net, "blocks", None)) else []  # type: ignore[operator]  # a method
    inner = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2}
    return [p for p in parameters if id(p) in inner]
