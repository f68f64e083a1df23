"""Training checkpoints: `checkpoints/step-N/` appears whole or not at all, is verified on resume, and rotates.

A checkpoint holds `state.safetensors` (or a folder of shards), `state.json` and `sums.json`, the SHA-256 of both.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_core.attribution import calling
from lens_core.checkpoints import manifest, tensor_files
from lens_core.io import atomic_files
from lens_core.recipe import Recipe, structure, unstructure
from lens_core.training.distributed import SHARDS, STATE
from lens_core.training.state import TrainingState
from lens_core.types import CheckpointError, ConfigError, PluginError

SCHEMA = 2
"""The version of a training checkpoint."""
_NAME = re.compile(r"step-[0-9]{7,}")


def folders(out: Path) -> list[Path]:
    """The checkpoints of the run in `out`, oldest first; copies under other names are none of them."""
    there = (out / "checkpoints").glob("step-*")
    return sorted((p for p in there if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, `step-0000500`."""
    return int(folder.name.removeprefix("step-"))


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A folder to fill, which then replaces `final` as a whole. Where filling fails, it is removed again."""
    partial = _partial(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with atomic_files.writing(final):
            yield partial
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except atomic_files.WriteError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


# ---- writing ----------------------------------------------------------------------------------------------------


def save(state: TrainingState) -> Path:
    """Write all that resuming needs; the checkpoint appears whole, under its final name, or not at all. Where weights
    are sharded, all processes call it."""
    tensors: dict[str, Tensor] = {"rng": state.rng.get_state(), "torch_rng": torch.get_rng_state()}
    for module_name in state.modules:
        tensors |= {f"net/{module_name}/{k}": v for k, v in state.trainable_state(module_name).items()}
        tensors |= {f"ema/{module_name}/{k}": v for k, v in state.ema.get(module_name, {}).items()}
        for index, slots in state.optimizers[module_name].state_dict()["state"].items():
            tensors |= {f"optimizer/{module_name}/{index}/{k}": torch.as_tensor(v) for k, v in slots.items()}
    with calling(state.method, "state_dict"):
        method = state.method.state_dict()
    tensors |= {f"method/{k}": v for k, v in method.items() if isinstance(v, Tensor)}
    plain = {
        "schema": SCHEMA,
        "step": state.step,
        "dataset": state.datasets[0].state_dict() if state.datasets else {},
        "method": {k: v for k, v in method.items() if not isinstance(v, Tensor)},
        "spikes": state.spike_detector.state_dict(),
        "optimizer": state.train_config.optimizer,
        "start": state.start_version,
    }
    first = state.ranks.rank == 0
    final = state.out / "checkpoints" / f"step-{state.step:07d}"
    with atomic_directory(final) if first else contextlib.nullcontext(_partial(final)) as partial:
        # Hashes are taken while files are written: nobody reads them again while the others wait.
        if state.ranks.sharded:
            sums = state.ranks.write(partial, tensors)
        else:
            sums = {STATE: tensor_files.save_tensors(partial / STATE, tensors)}
        if first:
            atomic_files.write_json(partial / "state.json", plain)
            sums["state.json"] = manifest.hash_of(partial / "state.json")
            atomic_files.write_json(partial / "sums.json", sums)
    return final


def rotate(state: TrainingState) -> None:
    """Remove all but the newest `keep_checkpoints`. Called after a good step and after an export, when the newest is
    known to be good: finite weights may still give no finite loss, and then the older ones are all that is left."""
    if state.ranks.rank == 0 and state.rotated_step != state.saved_step:
        for folder in folders(state.out)[: -state.train_config.keep_checkpoints]:
            shutil.rmtree(folder)
        state.rotated_step = state.saved_step


# ---- reading ----------------------------------------------------------------------------------------------------


def newest(out: Path, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is what was written; None where there is none at all."""
    refused: CheckpointError | None = None
    for folder in reversed(folders(out)):
        try:
            _verify(folder)
            return folder
        except CheckpointError as error:
            refused = error
            log(f"{folder.name} is damaged, so the one before it is used: {error}")
    if refused is not None:  # to start anew would rotate these away, and they may be all that is left
        raise CheckpointError(
            f"{out}: none of its checkpoints can be read; choose a new --output or move them away ({refused})"
        )
    return None


def _verify(folder: Path) -> None:
    """Raise CheckpointError where a file of the checkpoint is missing, or is not the one whose SHA-256 was written."""
    schema = atomic_files.read_json(folder / "state.json", finite=False).get("schema")
    if schema != SCHEMA:
        raise CheckpointError(f"{folder}: is of schema {schema!r}; this Lens reads {SCHEMA}")
    sums = atomic_files.read_json(folder / "sums.json")
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "sums.json"}
    shards = {name for name in files if name.startswith(f"{SHARDS}/") and name.endswith(".safetensors")}
    for name in sorted({*sums, *(shards or {STATE}), "state.json"}):
        if name not in files:
            raise CheckpointError(f"{folder / name}: is missing")
        if manifest.hash_of(files[name]) != sums.get(name):
            raise CheckpointError(f"{folder / name}: is not what was written; some of its bits have changed")


def resume(state: TrainingState, allow_changed: bool = False) -> None:
    """Go on from the newest good checkpoint, where there is one, and write `recipe.json`. All processes call it.

    Raises CheckpointError where the start is another than the run began with, unless `allow_changed`.
    """
    if state.ranks.rank == 0:
        for partial in (state.out / "checkpoints").glob(".step-*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(partial, ignore_errors=True)
    # The first process looks for all, so that all go on from the same one.
    folder: Path | None = state.ranks.broadcast(newest(state.out, state.log) if state.ranks.rank == 0 else None)
    if folder is not None:
        plain = atomic_files.read_json(folder / "state.json", finite=False)
        state.start_version = state.ranks.broadcast(state.start_version)  # of one disk, for one decision
        _check_start(state, plain.get("start"), allow_changed)
        restore(state, plain, state.ranks.read(folder, _layout(state)))
        state.log(f"resumed at step {state.step} from {folder}")
    if state.ranks.rank == 0:
        log = state.out / "log.jsonl"
        if log.is_file():  # a run that was killed had logged steps that are made again now
            atomic_files.rewrite_log(log, atomic_files.read_log(log, state.step))
        if state.evaluator is not None:
            started = state.saved_step > 0  # else another recipe's evaluation at step 0 is not this one's
            state.evaluator.resume(state.step if started or not state.recipe_changes else -1, state.recipe_changes)
    if state.evaluator is not None:
        state.evaluator.lines = state.ranks.broadcast(state.evaluator.lines)
    if state.ranks.rank == 0:  # last: a resume that fails leaves the run to its own recipe
        atomic_files.write_json(state.out / "recipe.json", _plain(state.recipe))


def _check_start(state: TrainingState, before: Any, allow_changed: bool) -> None:
    """Checkpoints hold what learns. What does not, such as the weights beside a LoRA, is read from the start again."""
    if before is None or before == state.start_version:  # None: of an older Lens
        return
    start = state.recipe.pipeline.start
    change = f"the start {start or '(none)'}, whose hash was {before or 'none'} and is {state.start_version or 'none'}"
    if not allow_changed:
        raise CheckpointError(
            f"{state.out}: its checkpoints stand on other weights, or JSON files beside them, than there are now: "
            f"{change}; put the old one back, choose a new --output, or go on with --allow-changed"
        )
    state.log(f"changed, as allowed: {change}")


def _layout(state: TrainingState) -> dict[str, Tensor]:
    """By their names in a checkpoint, tensors that are sharded as those there are to be."""
    layout: dict[str, Tensor] = {}
    for module_name in state.modules if state.ranks.sharded else ():
        layout |= {f"net/{module_name}/{k}": v.detach() for k, v in state.trainable_state(module_name).items()}
        layout |= {f"ema/{module_name}/{k}": v for k, v in state.ema.get(module_name, {}).items()}
        for index, parameter in enumerate(state.trainable_parameters[module_name]):
            layout |= {f"optimizer/{module_name}/{index}/{k}": parameter.detach() for k in ("exp_avg", "exp_avg_sq")}
    return layout


def restore(state: TrainingState, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's `state.json` and tensors back where `save` took them from."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    with _restoring(state, "method", state.method):
        state.method.load_state_dict({**plain["method"], **under("method/")})
    for dataset in state.datasets:
        with _restoring(state, "dataset", dataset):
            dataset.load_state_dict(plain["dataset"])
    for module_name in state.modules:
        state.load_trainable_state(module_name, under(f"net/{module_name}/"))
        if module_name in state.ema:
            average = state.ema[module_name]  # whose device may be another than that of the tensors read
            # A run that had none begins them at the weights that it goes on from.
            averaged = under(f"ema/{module_name}/") or {
                k: v.detach().clone() for k, v in state.trainable_state(module_name).items()
            }
            state.ema[module_name] = {k: v.to(average[k].device) for k, v in averaged.items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in under(f"optimizer/{module_name}/").items():
            index, _, slot = name.partition("/")
            slots.setdefault(int(index), {})[slot] = value
        if plain.get("optimizer", "adamw") == state.train_config.optimizer:
            groups = state.optimizers[module_name].state_dict()["param_groups"]
            state.optimizers[module_name].load_state_dict({"state": slots, "param_groups": groups})
        else:  # what one optimizer keeps of a weight means nothing to another
            state.log(f"{module_name}: {state.train_config.optimizer} begins without the state of another optimizer")
    state.rng.set_state(tensors["rng"])
    torch.set_rng_state(tensors["torch_rng"])
    state.spike_detector.load_state_dict(plain["spikes"])
    state.step = state.saved_step = int(plain["step"])
    state.last_good_step = state.step - 1 - max(state.spike_detector.row.values())


@contextlib.contextmanager
def _restoring(state: TrainingState, part: str, component: object) -> Iterator[None]:
    """What is raised inside, while a component gets its state back, becomes an error about it: where the recipe has
    changed that component, one that says so."""
    try:
        with calling(component, "load_state_dict"):
            yield
    except PluginError as error:
        if not any(change.startswith(f"$.{part}") for change in state.recipe_changes):
            raise
        raise CheckpointError(
            f"{state.out}: the checkpoint's {part} is another than the recipe's, and its state does not fit: {error}; "
            f"undo the change of {part}, or choose a new --output"
        ) from error


def check_recipe(state: TrainingState, allow_changed: bool) -> None:
    """Compare the recipe with the one that the run was started with.

    Raises ConfigError, with each difference, where checkpoints would go on with another one unasked, or its model would
    be replaced; where a folder has a model or checkpoints, but no recipe that says whose they are; and where a new run
    would write into its start.
    """
    path = state.out / "recipe.json"
    now = _plain(state.recipe)
    there = ["checkpoints"] if folders(state.out) else []
    there += [name for name in ("model", "adapters") if (state.out / name).is_dir()]
    begun = bool(there)
    start = state.recipe.pipeline.start
    folder = Path(start or "").expanduser()  # where there is none, `start` is a name on the Hub
    if start and not begun and folder.is_dir() and state.out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{state.out}: lies in the start checkpoint {start}, whose hash would change with what the run writes, so "
            "that it could not resume; choose an --output elsewhere"
        )
    if begun and not path.is_file() and not allow_changed:
        raise ConfigError(
            f"{state.out}: holds {' and '.join(f'{name}/' for name in there)}, but the recipe.json of their run is "
            f"missing. Choose a new --output, or {'go on' if folders(state.out) else 'replace it'} with --allow-changed"
        )
    if path.is_file():
        try:  # by way of a Recipe, so that options which are newer than the run count as their defaults
            before = structure(Recipe, atomic_files.read_json(path, finite=False))
            state.recipe_changes = list(_differences(_plain(before), now, "$"))
        except (ConfigError, CheckpointError) as error:
            if begun:
                raise ConfigError(f"{path}: this Lens cannot read it; choose a new --output: {error}") from error
            state.recipe_changes = ["$"]  # nothing of that run is left to go on with
        changes = state.recipe_changes if begun else []
        for line in changes if allow_changed else ():
            state.log(f"changed, as allowed: {line}")
        if changes and not allow_changed:
            resumes = bool(folders(state.out))
            raise ConfigError(
                f"{state.out}: {'was begun with' if resumes else 'holds the model of'} another recipe: "
                f"{'; '.join(changes)}. Choose a new --output, or {'go on' if resumes else 'replace it'} with "
                "--allow-changed"
            )


def _plain(recipe: Recipe) -> Any:
    """A recipe as JSON has it."""
    return json.loads(json.dumps(unstructure(recipe)))


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    """Each place in which two recipes differ: path, what was, what is."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}")
    elif before != now:
        yield f"{path} was {json.dumps(before)} and is {json.dumps(now)}"
