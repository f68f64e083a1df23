"""Numbers that are not finite: when weights are checked, and what the error advises."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lens_core.training import checkpointing
from lens_core.training.state import TrainingState
from lens_core.types import NumericalError


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. Of sharded tensors, those that this process holds."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t.is_floating_point()]
    # One norm over all tensors reads each once and waits for the device once.
    return bool(torch.nn.utils.get_total_norm([t.detach() for t in local if t.numel()], math.inf).isfinite())


def refuse_non_finite(state: TrainingState) -> None:
    """Raise NumericalError where weights, averages or moments are not finite. All processes call it.

    It reads all of them once and waits for the device, so it comes before a checkpoint, an evaluation and an
    export, and where a loss says that something is wrong, and not after each step.
    """
    for module_name in state.modules:
        moments = [v for slots in state.optimizers[module_name].state.values() for v in slots.values()]
        kinds = {
            "weights": state.trainable_parameters[module_name],
            "averages": state.ema.get(module_name, {}).values(),
            "moments": moments,
        }
        for kind, tensors in kinds.items():
            if state.ranks.any(not all_finite(tensors)):
                raise NumericalError(
                    f"the {kind} of {module_name} are not finite after step {state.step}; "
                    f"they are not saved; {advice(state)}"
                )


def refuse_unproven(state: TrainingState) -> None:
    """Raise NumericalError where a module that is exported as it is has had no finite loss since its last step."""
    if state.evaluator is not None and state.evaluator.best(state.step) is not None:
        return  # the best weights are exported instead
    for module_name in state.exported_modules:
        if not state.spike_detector.finite[module_name]:
            raise NumericalError(
                f"the last {state.spike_detector.row[module_name]} steps of {module_name} had no finite loss, "
                f"so it is not exported; {advice(state)}"
            )


def advice(state: TrainingState) -> str:
    """What to change, and which checkpoint to go on from."""
    half = state.train_config.precision == "bf16"
    folders = checkpointing.folders(state.out)
    good = [folder.name for folder in folders if checkpointing.step_of(folder) <= state.last_good_step]
    if good and good[-1] != folders[-1].name:
        last = f"{good[-1]} is the last checkpoint that gave finite losses: move the newer ones away to go on from it"
    elif folders:
        last = f"{folders[-1].name} is the last finite checkpoint, and the same command goes on from it"
    else:
        last = "nothing was saved yet"
    return f"lower train.lr{', or use precision: fp32' if half else ''}; {last}"
