"""One optimizer step of one trainable module: its learning rate, its gradients, and whether the step is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor
from torch.distributed.tensor import DTensor

from lens_core.attribution import calling, checked_loss, checked_step
from lens_core.recipe import Training
from lens_core.training import ema, optimizers
from lens_core.training.distributed import full_tensor, seed_of
from lens_core.training.nonfinite import advice, refuse_non_finite
from lens_core.training.state import TrainingState
from lens_core.types import LensError, Loss, NumericalError


def lr_factor(train: Training, step: int) -> float:
    """What multiplies lr at `step` (0-based): linear warm-up, then 1, then a decay to 0 over `lr_decay_fraction`."""
    warm = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    start = train.steps * (1 - train.lr_decay_fraction)
    if step < start:
        return warm
    left = (train.steps - step) / (train.steps - start)
    return warm * (left if train.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def next_micro_batches(state: TrainingState, steps: Iterator[Sequence[Any]]) -> Sequence[Any]:
    """The next item of a method's `steps`. Raises LensError where the method has nothing left to train on."""
    with state.autocast():
        micro = next(steps, None)
    if micro is None:
        raise LensError(f"the method had nothing to learn from at step {state.step}; check $.dataset")
    return checked_step(state.method, micro)


def flops(state: TrainingState, module_name: str, parts: Sequence[Sequence[Any]]) -> float:
    """FLOPs of a step, forward and backward; activations that are computed again do not count. 0 where the method
    cannot tell."""
    count = getattr(state.method, "flops", None)
    if count is None:
        return 0.0
    forward = sum(count(module_name, batch) for micro in parts for batch in micro)
    # Backward costs a forward for the activations' gradients, and another for those of the weights that learn.
    return float(forward * (2 + state.trainable_fraction[module_name]))


@define
class _Losses:
    """What the micro-batches of a step add up to in this process."""

    metrics: dict[str, tuple[Tensor, float]] = field(factory=dict)  # (weighted sum, weight); not all report all
    weighted: set[bool] = field(factory=set)  # whether losses bring a weight of their own
    sums: dict[str, Tensor] = field(factory=dict)  # of `Loss.sums`

    def add(self, loss: Loss, share: float) -> None:
        """Count a loss, which is `share` of the step's."""
        self.weighted.add(loss.weight is not None)
        for name, value in {"loss": loss.total, **loss.parts}.items():
            total, weight = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = total + _precise(value) * share, weight + share
        for name, tensor in loss.sums.items():
            self.sums[name] = self.sums[name] + _precise(tensor) if name in self.sums else _precise(tensor)


def optimizer_step(
    state: TrainingState, module_name: str, turn: int, parts: Sequence[Sequence[Any]]
) -> dict[str, tuple[Tensor, float]]:
    """One optimizer step of one module, on the mean gradient over the micro-batches of all processes; the others stay
    frozen. Returns each metric as a sum and its weight, for `MetricBuffer`; nothing of a step that was skipped.

    `parts` are this process's share of the batch; `turn` numbers the optimizer steps within a training step. Raises
    NumericalError after `max_skipped_steps` skipped steps in a row.
    """
    net, optimizer, config = state.modules[module_name], state.optimizers[module_name], state.train_config
    for group in optimizer.param_groups:
        group["lr"] = config.lr * config.lr_multipliers.get(module_name, 1.0) * lr_factor(config, state.step)
    for parameter in state.trainable_parameters[module_name]:
        parameter.requires_grad_(True)
    net.train()
    optimizer.zero_grad(set_to_none=True)
    losses = _accumulate(state, module_name, turn, parts)
    norm, fault = _reduce(state, module_name, losses)
    if fault is None:
        optimizers.apply_step(optimizer)
        if losses.sums:
            sums = {name: state.ranks.all_reduce(tensor) for name, tensor in losses.sums.items()}
            with calling(state.method, "after_update"):
                state.method.after_update(module_name, state.modules, sums)
        if module_name in state.ema:
            decay = ema.decay_at(config.ema_decay, state.step)
            ema.update(state.ema[module_name], state.trainable_state(module_name), decay)
    else:
        skipped = state.spike_detector.row[module_name]
        state.log(f"step {state.step}: {module_name} has {fault}; skipped ({skipped} in a row)")
        if skipped >= config.max_skipped_steps:
            raise NumericalError(
                f"{skipped} bad steps in a row of {module_name} at step {state.step}: {fault}; {advice(state)}"
            )
    net.requires_grad_(False).eval()
    return {**losses.metrics, "grad_norm": (norm, 1.0)} if fault is None else {}


def _accumulate(state: TrainingState, module_name: str, turn: int, parts: Sequence[Sequence[Any]]) -> _Losses:
    """Forward and backward over this process's micro-batches, whose gradients add up in the parameters."""
    losses = _Losses()
    for part, micro in zip(state.ranks.local_micro_batches, parts, strict=True):
        # Noise is a function of seed, step, turn and part alone: whichever process works a part draws the same.
        seed = seed_of(state.recipe.seed, state.step, turn, part)
        torch.manual_seed(seed)  # dropout draws there
        rng = torch.Generator().manual_seed(seed)
        for batch in micro:
            with state.autocast(), calling(state.method, "loss"):
                loss: Loss = state.method.loss(module_name, state.modules, batch, rng)
            loss = checked_loss(state.method, loss)
            share = 1 / (len(micro) * state.ranks.micro_batches) if loss.weight is None else loss.weight
            # Backward at once, so that the activations of only one micro-batch are held.
            torch.autograd.backward(loss.total * share * state.ranks.gradient_scale)
            losses.add(loss, share)
    return losses


def _reduce(state: TrainingState, module_name: str, losses: _Losses) -> tuple[Tensor, str | None]:
    """Sum, normalise and clip the gradients; (their norm, why the step is to be skipped or None)."""
    parameters = state.trainable_parameters[module_name]
    state.ranks.all_reduce_gradients(parameters)
    total, local_weight = losses.metrics["loss"]
    loss, weight = state.ranks.all_reduce(torch.stack([total, torch.full_like(total, local_weight)]))
    if True in losses.weighted:  # else the shares add up to 1 already
        for parameter in parameters:
            if parameter.grad is not None:
                held = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                held /= weight
    norm = _precise(
        full_tensor(torch.nn.utils.clip_grad_norm_(parameters, state.train_config.max_grad_norm or math.inf))
    )
    # The one time in this step at which the host waits for the device: whether to take it is decided there.
    mean_loss, norm_value, weight_value = torch.stack([loss / weight, norm, weight]).tolist()
    if len(losses.weighted) > 1 or not weight_value > 0:
        mixed = len(losses.weighted) > 1
        reason = "some have a weight and some have none" if mixed else f"they weigh {weight_value:g} in all"
        raise LensError(f"{state.recipe.method.use}: of the losses of {module_name}, {reason} at step {state.step}")
    fault = state.spike_detector.fault(module_name, mean_loss, norm_value)
    if not state.spike_detector.finite[module_name]:
        refuse_non_finite(state)  # the loss may be what broken weights give; then skipping steps cannot help
    return norm, fault


def _precise(value: Tensor) -> Tensor:
    """A scalar to add up, where it is; in double precision on devices that have it."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
