"""The end of a run: weights made whole, averaged or the best, merged, and written as a checkpoint in `model/`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from lens_core.inference import lora
from lens_core.recipe import unstructure
from lens_core.training.checkpointing import atomic_directory
from lens_core.training.nonfinite import advice, all_finite
from lens_core.training.state import TrainingState
from lens_core.types import NumericalError

PREFIXES = {"backbone": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
"""What diffusers calls the parts of a pipeline, in the names of a LoRA's tensors."""


def gather_weights(state: TrainingState) -> None:
    """Make sharded weights and averages whole again, on the CPU of the first process. All processes call it."""
    if not state.ranks.sharded:
        return
    for module_name, net in state.modules.items():
        full = state.ranks.gather(net.state_dict())
        average = state.ranks.gather(state.ema.get(module_name, {}))
        if state.ranks.rank == 0:
            copy = state.meta_copies[module_name]
            copy.load_state_dict(full, assign=True)
            for part in PREFIXES:
                if state.pipeline.present().get(part) is net:
                    state.pipeline.put(part, copy, state.pipeline.specs.get(part))
            state.modules[module_name] = copy
            if module_name in state.ema:
                state.ema[module_name] = average


def export(state: TrainingState) -> Path:
    """Write the pipeline, with averaged weights where there are any, as a checkpoint in `model/`.

    A LoRA goes to `adapters/MODULE/`, in diffusers' format, and is merged into the network that `model/` holds.
    Raises NumericalError where weights are not finite.
    """
    _choose_weights(state)
    if state.frozen_cast is not None:
        for part, net in state.pipeline.present().items():
            state.frozen_cast.restore(part, net)
    for module_name, spec in state.train_config.lora.items():
        prefix = next(
            (f for p, f in PREFIXES.items() if state.pipeline.present().get(p) is state.modules[module_name]), None
        )
        lora.save(
            state.modules[module_name], spec, state.out / "adapters" / module_name / lora.FILE, prefix or module_name
        )
        if prefix:  # other networks are not exported, and may stand on the same weights
            lora.merge(state.modules[module_name])
    if state.train_config.export_dtype == "bf16":
        state.pipeline.to(dtype=torch.bfloat16)
    for module_name in state.exported_modules:
        if not all_finite(state.modules[module_name].parameters()):
            raise NumericalError(f"the weights of {module_name} are not finite; they are not exported; {advice(state)}")
    recipe = json.dumps(unstructure(state.recipe)).encode()
    made = {"method": state.recipe.method.use, "steps": state.train_config.steps, "seed": state.recipe.seed}
    state.pipeline.provenance |= {"recipe": made | {"sha256": hashlib.sha256(recipe).hexdigest()[:16]}}
    state.pipeline.device = torch.device("cpu")  # where parts that the run never touched are read now
    final = state.out / "model"
    with atomic_directory(final) as partial:
        state.pipeline.save_pretrained(partial)
    return final


def _choose_weights(state: TrainingState) -> None:
    """Load the best weights that evaluation kept; else the averages; else leave the last ones."""
    best = state.evaluator.weights(state.step) if state.evaluator is not None else None
    for module_name in state.exported_modules:
        if best is not None:
            prefix = f"{module_name}/"
            state.load_trainable_state(
                module_name, {k.removeprefix(prefix): v for k, v in best.items() if k.startswith(prefix)}
            )
        elif module_name in state.ema:
            state.load_trainable_state(module_name, state.ema[module_name])
