"""The one training loop. It owns optimizers, isolation of roles, clipping, schedules, EMA and checkpoints.

It never sees an architecture; methods never see a device or an optimizer. A run is a folder:
`recipe.json`, `log.jsonl`, `checkpoints/step-N/` and, at the end, `model/`, which `from_pretrained` reads; of a run
that is watched, `evaluations.jsonl`, `samples/` and `best/` too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lens_core.attribution import (
    batches_of,
    building,
    calling,
    checked_loss,
    checked_step,
    items,
    trainable_modules_of,
    update_order_of,
)
from lens_core.catalog import Catalog
from lens_core.checkpoints import manifest, tensor_files
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.io import atomic_files
from lens_core.io.locks import locked
from lens_core.recipe import Recipe, Training, build, structure, unstructure
from lens_core.training import frozen_weights, optimizers
from lens_core.training.distributed import SHARDS, STATE, Ranks, seed_of, whole
from lens_core.training.evaluator import Evaluator, Interrupted
from lens_core.training.spikes import SpikeDetector
from lens_core.training.throughput import Tally, Throughput, TimedLoader, memory, peak
from lens_core.training.trackers import Trackers, check_trackers
from lens_core.types import CheckpointError, ConfigError, LensError, Loss, NumericalError, Shard

PREFIXES = {"backbone": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
"""What diffusers calls the parts of a pipeline, in the names of an adapter's tensors."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for the one that looks at the run or exports it, which may draw for hours."""
SCHEMA = 2
"""The version of a training checkpoint."""


def lr_factor(train: Training, step: int) -> float:
    """The learning rate's factor at `step` (0-based): linear warm-up, then 1, then decay to 0 over `decay`."""
    warm = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
    start = train.steps * (1 - train.lr_decay_fraction)
    if step < start:
        return warm
    left = (train.steps - step) / (train.steps - start)
    return warm * (left if train.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


@frozen
class Report:
    """What a run ends with."""

    steps: int
    seconds: float
    losses: Mapping[str, float]
    model: Path | None


class Trainer:
    """One training run in a folder. `Trainer(recipe, catalog, out).train()` starts it, or goes on where it stopped."""

    def __init__(
        self,
        recipe: Recipe,
        catalog: Catalog,
        out: Path,
        log: Callable[[str], None] | None = None,
        *,
        allow_changed: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

        self.recipe, self.catalog, self.out, self.allow_changed = recipe, catalog, out, allow_changed
        self.train_config = recipe.train
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        check_trackers(recipe.train.trackers)
        self.accelerator = Accelerator(
            mixed_precision="no",  # its precision is one a process; ours is one a run
            log_with=list(recipe.train.trackers) or None,
            project_config=ProjectConfiguration(str(out), str(out / "trackers")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)] if several else [],
            cpu=several and not torch.cuda.is_available(),  # else it would start each process alone
        )
        self.ranks = Ranks(self.accelerator, recipe.train.micro_batches, recipe.train.fsdp_shards)
        printer = log or (lambda line: print(line, file=sys.stderr, flush=True))
        self.log: Callable[[str], None] = printer if self.ranks.rank == 0 else lambda line: None
        set_seed(recipe.seed)  # before anything is built: initial weights are part of the recipe
        unread = frozen_weights.unread(recipe, catalog)  # the dataset brings what these would make
        self.pipeline = LensPipeline.from_parts(recipe.pipeline, catalog, unread).to(self.accelerator.device)
        name, method, config = build(catalog, "method", recipe.method, "$.method")
        with building(name):
            self.method = method(config, self.pipeline)
        self.datasets: list[Any] = []  # one for each part of a batch that this process works through, all in one state
        if recipe.dataset is not None:
            name, dataset, config = build(catalog, "dataset", recipe.dataset, "$.dataset")
            with building(name):
                self.datasets = [dataset(config) for _ in self.ranks.local_micro_batches]
            if hasattr(self.datasets[0], "check_encoders"):  # while the encoders are as they were read
                self.datasets[0].check_encoders(self.pipeline, recipe.train.precision)
                self.pipeline.defer(unread)
        elif self.ranks.micro_batches > 1 and not getattr(self.method, "shards_itself", False):
            raise ConfigError(f"{recipe.method.use} reads no dataset, so it cannot be divided; run it as one process")
        if self.ranks.sharded and getattr(self.method, "shards_itself", False):
            raise ConfigError(
                f"$.train.fsdp_shards: {recipe.method.use} shards its work unevenly, so processes cannot gather each "
                "other's weights in step; use fsdp_shards: 1, and train.lora where memory is short"
            )
        self.nets = trainable_modules_of(self.method)
        for part in (*self.pipeline.present().values(), *self.nets.values()):
            part.requires_grad_(False).eval()
        for option in ("lora", "lr_multipliers"):
            for role in getattr(recipe.train, option):
                if role not in self.nets:
                    raise ConfigError(f"$.train.{option}: no role is called {role!r}; {', '.join(self.nets)} can learn")
        for role, adapter in recipe.train.lora.items():
            lora.attach(self.nets[role], adapter)
            self.nets[role].requires_grad_(False)
        # What never learns: networks of the method, such as a teacher, and what the roles leave of the pipeline.
        self.frozen = frozen_weights.of_method(self.method, self.nets)
        self.halves: frozen_weights.Halves | None = None
        if recipe.train.precision == "bf16":
            held = self.pipeline.present() | self.frozen
            still = frozen_weights.frozen_parameters(held.values(), self.nets, recipe.train.lora)
            self.halves = frozen_weights.Halves(held, still)
        if self.ranks.sharded:  # what `export` fills again, for divided modules stay what they are
            self.blanks = {role: _blank(net) for role, net in self.nets.items()}
        if recipe.train.compile:
            for net in self.nets.values():
                # A stack of equal blocks compiles once, as one block; diffusers' models say which those are.
                getattr(net, "compile_repeated_blocks", net.compile)()
        self.ranks.shard(self.nets | frozen_weights.apart(self.frozen, self.nets))
        self.learning = {
            role: [p for name, p in net.named_parameters() if role not in recipe.train.lora or lora.owned(name)]
            for role, net in self.nets.items()
        }
        self.learned = {  # the share of each role's weights
            role: sum(p.numel() for p in self.learning[role]) / sum(p.numel() for p in net.parameters())
            for role, net in self.nets.items()
        }
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.optimizers = {role: optimizers.adamw(self.learning[role], recipe.train) for role in self.nets}
        self.ema: dict[str, dict[str, Tensor]] = {
            role: {k: v.detach().clone() for k, v in self.trainable_state(role).items()}
            for role, net in self.nets.items()
            if recipe.train.ema_decay
            and any(net is part for part in self.pipeline.present().values())  # what is exported
        }
        if recipe.train.activation_checkpointing:
            for role, net in self.nets.items():
                if hasattr(net, "enable_gradient_checkpointing"):
                    net.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' and transformers' name
                else:
                    self.log(f"{role} has no blocks to compute again; its activations are all kept")
            for net in self.frozen.values():  # through which gradients pass, where a discriminator reads its features
                if hasattr(net, "enable_gradient_checkpointing"):
                    net.enable_gradient_checkpointing()  # type: ignore[operator]  # as above
        self.exported = [  # the roles that `export` writes
            role
            for role, net in self.nets.items()
            if role in recipe.train.lora or any(net is part for part in self.pipeline.present().values())
        ]
        self.evaluator: Evaluator | None = None
        if recipe.evaluation is not None:
            with self.isolated_rng():
                self.evaluator = Evaluator(
                    recipe.evaluation, catalog, self.pipeline, self.method, out, self.log, writes=self.ranks.rank == 0
                )
        self.changed: list[str] = []  # where this recipe differs from the one that the run was begun with
        self.step = 0
        self.saved = 0  # the step of the newest checkpoint
        self.rotated = 0  # the newest checkpoint that others have made room for
        self.proven = -1  # the newest step whose weights have given finite losses; checkpoints up to it are good
        self.spike_detector = SpikeDetector(recipe.train.spike, tuple(self.nets))
        self.loader = TimedLoader()
        self._stop = False

    def trainable_state(self, role: str) -> dict[str, Tensor]:
        """The part of a role's state that its training changes: what checkpoints hold and EMA averages."""
        net = self.nets[role]
        return lora.tensors(net) if role in self.train_config.lora else net.state_dict()

    # ---- the loop ---------------------------------------------------------------------------------------------

    def train(self) -> Report:
        """Run to the end. Ctrl-C and SIGTERM save first, then stop. Raises NumericalError after too many bad steps and
        where weights are not finite, CheckpointError where something cannot be written; the checkpoints before it are
        whole. LockedError where another process trains in the same folder."""
        with locked(self.out, "run") if self.ranks.rank == 0 else contextlib.nullcontext():
            return self._locked()

    def _locked(self) -> Report:
        """`train`, as the only one who writes to the folder."""
        if self.ranks.rank == 0:
            self._same_recipe()
        self.ranks.barrier()
        self._resume()
        config = self.train_config
        self.throughput = Throughput(self.step, peak(self.accelerator.device))
        self.trackers = Trackers(self.accelerator, unstructure(self.recipe), self.out, self.log)
        try:
            return self._train(config)
        except atomic_files.WriteError as error:
            whole = [folder.name for folder in self._folders()]
            more = f"{whole[-1]} is whole, and the same command goes on from it" if whole else "nothing was saved yet"
            raise CheckpointError(f"{error}; {more}") from error
        finally:
            self.trackers.finish()

    def _train(self, config: Training) -> Report:
        parts = self._parts()
        start = time.monotonic()
        tally = Tally()
        last: dict[str, float] = {}
        with self._signals():
            while not (finished := self._look()) and not self._stop:
                if hasattr(self.method, "logs"):
                    self.method.logs = self._logs(self.step + 1)
                micro = [self._next(steps) for steps in parts]
                for turn, role in enumerate(update_order_of(self.method, self.step, self.nets)):
                    self.throughput.work += self._work(role, micro)
                    tally.add(
                        {f"{role}/{name}": value for name, value in self.optimizer_step(role, turn, micro).items()}
                    )
                with calling(self.method, "after_step"):
                    self.method.after_step(self.step, self.nets)
                if not any(self.spike_detector.row.values()):
                    self.proven = self.step
                    self._rotate()
                self.step += 1
                self._stop = self.ranks.any(self._stop)
                if self._logs(self.step):
                    last = tally.means(self.ranks.all_gather)
                    if self.ranks.rank == 0:
                        self._write_log(last, time.monotonic() - start)
                if self.step % config.save_every == 0 or self.step == config.steps or self._stop:
                    self._save()
            self._save()
        if not finished:
            self.log(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
            return Report(self.step, time.monotonic() - start, {}, None)
        self._refuse_unproven()
        self._gather()
        model = self.export() if self.ranks.rank == 0 else self.out / "model"
        self.proven = self.step
        self._rotate()
        self.ranks.barrier()
        return Report(self.step, time.monotonic() - start, last, model)

    def _look(self) -> bool:
        """Take a look, if it is time to. Whether the run is finished: all steps made and looked at, or no patience."""
        over, last = self.step >= self.train_config.steps, self.train_config.steps
        if self.evaluator is not None:
            if over or self.step % self.evaluator.config.every == 0:
                self._refuse_non_finite()
            pending, together = False, self.ranks.sharded  # one process alone cannot draw with divided weights
            if self.ranks.rank == 0 or together:
                if self.evaluator.due(self.step, last):
                    begun = time.monotonic()
                    with contextlib.suppress(Interrupted), self.isolated_rng(), self.ema_weights():
                        stop = (lambda: self.ranks.any(self._stop)) if together else (lambda: self._stop)
                        agreed = self.ranks.broadcast if together else (lambda seen: seen)
                        seen = self.evaluator.evaluate(self.step, self.nets, self._weights, stop, agreed)
                        self.trackers.log({f"evaluation/{k}": v for k, v in seen.items() if k != "step"}, self.step)
                    self.throughput.away += time.monotonic() - begun
                pending = self.evaluator.due(self.step, last)
                if not over and self.evaluator.should_stop(self.step):
                    over = True
                    self.log(f"{self.evaluator.stop_reason()}; the run ends at step {self.step} of {last}")
            self._stop = self.ranks.any(self._stop)
            over = self.ranks.any(over) and not self.ranks.any(pending)
        return over

    @contextlib.contextmanager
    def isolated_rng(self) -> Iterator[None]:
        """What happens inside is no part of the training: it draws no number of it, and compiles nothing anew."""
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        eager = torch.compiler.set_stance("force_eager" if self.train_config.compile else "default")
        with torch.random.fork_rng(cuda), torch.no_grad(), self._autocast(), eager:
            yield

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The moving averages and the weights stand in each other's place; afterwards, bit for bit as before.

        Values move, not tensors: kernels may take another path where a tensor lies otherwise in memory.
        """
        pairs = [
            (v.detach(), average[k]) for r, average in self.ema.items() for k, v in self.trainable_state(r).items()
        ]
        _exchange(pairs)
        try:
            yield
        finally:
            _exchange(pairs[::-1])  # backwards, because two names may share a tensor

    def _weights(self) -> dict[str, Tensor]:
        """What `export` would write of the roles, as ROLE/NAME, while the averages stand in their places."""
        own = {f"{role}/{k}": v.detach() for role in self.exported for k, v in self.trainable_state(role).items()}
        return self.ranks.gather(own) if self.ranks.sharded else own

    def _parts(self) -> list[Iterator[Sequence[Any]]]:
        """The method's steps for each part of a batch. Their generators are in one state, for what all must share."""
        found = []
        for number, part in enumerate(self.ranks.local_micro_batches):
            batches: Iterator[Any] = iter(())
            if getattr(self.method, "shards_itself", False):
                batches = repeat(Shard(part, self.ranks.micro_batches))
            elif self.datasets:
                own = batches_of(self.datasets[number], part, self.ranks.micro_batches)
                batches = (batch.to(self.accelerator.device) for batch in self.loader.through(own))
            rng = self.rng if number == 0 else torch.Generator().manual_seed(self.recipe.seed)
            rng.set_state(self.rng.get_state())
            with calling(self.method, "steps"):
                steps = self.method.steps(batches, self.nets, rng)
            found.append(items(self.method, "steps", steps))
        return found

    def _autocast(self) -> torch.autocast:
        half = self.train_config.precision == "bf16"
        # The cache would hold a cast of every weight until the pass is over, where one block at a time is to be whole.
        cached = not self.ranks.sharded
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half, cache_enabled=cached)

    def _next(self, steps: Iterator[Sequence[Any]]) -> Sequence[Any]:
        with self._autocast():
            micro = next(steps, None)
        if micro is None:
            raise LensError(f"the method had nothing to learn from at step {self.step}; check $.dataset")
        return checked_step(self.method, micro)

    def optimizer_step(self, role: str, turn: int, parts: Sequence[Sequence[Any]]) -> dict[str, tuple[Tensor, float]]:
        """One optimizer step of one role: only it has gradients, which are means over the parts of all processes. What
        is told comes back as sums and their weights, for `Tally`; nothing of a step that was skipped.

        The noise of a part is a function of seed, step, turn and part: whoever works through it draws the same.
        """
        net, optimizer, config = self.nets[role], self.optimizers[role], self.train_config
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_multipliers.get(role, 1.0) * lr_factor(config, self.step)
        for parameter in self.learning[role]:
            parameter.requires_grad_(True)
        net.train()
        optimizer.zero_grad(set_to_none=True)
        told: dict[str, tuple[Tensor, float]] = {}  # and the weight of those that told it: not every part tells all
        weighed: set[bool] = set()  # whether losses bring their weight
        gathered: dict[str, Tensor] = {}  # the losses' sums
        for part, micro in zip(self.ranks.local_micro_batches, parts, strict=True):
            seed = seed_of(self.recipe.seed, self.step, turn, part)
            torch.manual_seed(seed)  # dropout draws there
            rng = torch.Generator().manual_seed(seed)
            for batch in micro:
                with self._autocast(), calling(self.method, "loss"):
                    loss: Loss = self.method.loss(role, self.nets, batch, rng)
                loss = checked_loss(self.method, loss)
                share = 1 / (len(micro) * self.ranks.micro_batches) if loss.weight is None else loss.weight
                weighed.add(loss.weight is not None)
                torch.autograd.backward(loss.total * share * self.ranks.gradient_scale)
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    total, weight = told.get(name, (0.0, 0.0))
                    told[name] = total + _precise(value) * share, weight + share
                for name, tensor in loss.sums.items():
                    gathered[name] = gathered[name] + _precise(tensor) if name in gathered else _precise(tensor)
        self.ranks.all_reduce_gradients(self.learning[role])
        total, weight = told["loss"]
        loss, weight = self.ranks.all_reduce(torch.stack([total, torch.full_like(total, weight)]))
        if True in weighed:
            self._divide_gradients(role, weight)
        length = _precise(whole(torch.nn.utils.clip_grad_norm_(self.learning[role], config.max_grad_norm or math.inf)))
        # The one time in this step at which the host waits for the device: whether to take it is decided there.
        value, norm, weight = torch.stack([loss / weight, length, weight]).tolist()
        if len(weighed) > 1 or not weight > 0:
            reason = "some have a weight and some have none" if len(weighed) > 1 else f"they weigh {weight:g} in all"
            raise LensError(f"{self.recipe.method.use}: of the losses of {role}, {reason} at step {self.step}")
        fault = self.spike_detector.fault(role, value, norm)
        if not self.spike_detector.finite[role]:
            self._refuse_non_finite()
        if fault is None:
            optimizers.apply_step(optimizer)
            if gathered:
                sums_of_all = {name: self.ranks.all_reduce(tensor) for name, tensor in gathered.items()}
                with calling(self.method, "after_update"):
                    self.method.after_update(role, self.nets, sums_of_all)
            self._average(role)
        else:
            row = self.spike_detector.row[role]
            self.log(f"step {self.step}: {role} has {fault}; skipped ({row} in a row)")
            if row >= config.max_skipped_steps:
                raise NumericalError(
                    f"{row} bad steps in a row of {role} at step {self.step}: {fault}; {self._advice()}"
                )
            told = {}
        net.requires_grad_(False).eval()
        return {**told, "grad_norm": (length, 1.0)} if told else {}

    def _divide_gradients(self, role: str, weight: Tensor) -> None:
        """By the weight of all micro-batches of all processes; of divided gradients, what this process holds."""
        for parameter in self.learning[role]:
            if parameter.grad is not None:
                held = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                held /= weight

    def _work(self, role: str, parts: Sequence[Sequence[Any]]) -> float:
        """FLOPs of a turn, forward and backward; what is computed again on the way back does not count."""
        count = getattr(self.method, "flops", None)
        if count is None:
            return 0.0
        return float(sum(count(role, batch) for micro in parts for batch in micro) * (2 + self.learned[role]))

    def _average(self, role: str) -> None:
        if role not in self.ema:
            return
        # A young average would remember the initial weights: its decay grows with the step.
        decay = min(self.train_config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.trainable_state(role).items():
            if value.dtype.is_floating_point:
                self.ema[role][name].lerp_(value.detach().to(self.ema[role][name].dtype), 1 - decay)
            else:
                self.ema[role][name].copy_(value)

    def _logs(self, step: int) -> bool:
        """Whether there is a line about the steps up to `step`."""
        return step % self.train_config.log_every == 0 or step == self.train_config.steps

    def _write_log(self, means: Mapping[str, float], seconds: float) -> None:
        values = {name: round(mean, 6) for name, mean in means.items()}
        pace, held = self.throughput.line(self.step, self.loader, self.ranks.world), memory(self.accelerator.device)
        line = {"step": self.step, "seconds": round(seconds, 1), **pace, **values}
        line |= {"memory_gb": round(held, 3)} if held is not None else {}
        line |= {f"{role}/skipped": count for role, count in self.spike_detector.skipped.items() if count}
        atomic_files.append(self.out / "log.jsonl", line)
        self.trackers.log({k: v for k, v in line.items() if k != "step"}, self.step)
        told = [f"{k} {v:.4f}" for k, v in values.items() if not k.endswith("grad_norm")]
        told += [f"{pace['steps_per_second']:.2f} steps/s"]
        if "data_wait" in pace:
            told += [f"{pace['samples_per_second']:.1f} samples/s", f"{pace['data_wait']:.0%} waiting for data"]
        if "tflops" in pace:
            told += [f"{pace['mfu']:.1%} MFU" if "mfu" in pace else f"{pace['tflops']:.3f} TFLOP/s"]
        told += [f"{held:.2f} GB"] if held is not None else []
        told += [f"{k} {line[k]}" for k in line if k.endswith("/skipped")]
        last = self.train_config.steps
        self.log("  ".join([f"step {self.step}/{last}", *told, self.throughput.left(self.step, last)]))

    # ---- numbers that are not finite ---------------------------------------------------------------------------

    def _refuse_non_finite(self) -> None:
        """Raise NumericalError where weights, averages or moments are not finite. All processes call it.

        It reads all of them once and waits for the device, so it comes before a checkpoint, an evaluation and an
        export, and where a loss says that something is wrong, and not after each step.
        """
        for role in self.nets:
            slots = [v for slots in self.optimizers[role].state.values() for v in slots.values()]
            kinds = {"weights": self.learning[role], "averages": self.ema.get(role, {}).values(), "moments": slots}
            for kind, tensors in kinds.items():
                if self.ranks.any(not _finite(tensors)):
                    raise NumericalError(
                        f"the {kind} of {role} are not finite after step {self.step}; they are not saved; "
                        f"{self._advice()}"
                    )

    def _refuse_unproven(self) -> None:
        """Raise NumericalError where a role that is exported as it is has had no finite loss since its last step."""
        chosen = self.evaluator is not None and self.evaluator.best(self.step) is not None  # then others are exported
        for role in () if chosen else self.exported:
            if not self.spike_detector.finite[role]:
                raise NumericalError(
                    f"the last {self.spike_detector.row[role]} steps of {role} had no finite loss, so it is not "
                    f"exported; {self._advice()}"
                )

    def _advice(self) -> str:
        half = self.train_config.precision == "bf16"
        folders = self._folders()
        good = [folder.name for folder in folders if _step_of(folder) <= self.proven]
        if good and good[-1] != folders[-1].name:
            last = (
                f"{good[-1]} is the last checkpoint that gave finite losses: move the newer ones away to go on from it"
            )
        elif folders:
            last = f"{folders[-1].name} is the last finite checkpoint, and the same command goes on from it"
        else:
            last = "nothing was saved yet"
        return f"lower train.lr{', or use precision: fp32' if half else ''}; {last}"

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _folders(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*"))

    def _save(self) -> None:
        """A checkpoint of this step, once."""
        if self.saved != self.step:
            self._refuse_non_finite()
            if self.ranks.rank == 0 or self.ranks.sharded:
                self.save()
            self.ranks.barrier()
            self.saved = self.step

    def save(self) -> Path:
        """Write all that resuming needs; a checkpoint appears whole, under its final name, or not at all. Where weights
        are divided, all processes call it."""
        tensors: dict[str, Tensor] = {"rng": self.rng.get_state(), "torch_rng": torch.get_rng_state()}
        for role in self.nets:
            tensors |= {f"net/{role}/{k}": v for k, v in self.trainable_state(role).items()}
            tensors |= {f"ema/{role}/{k}": v for k, v in self.ema.get(role, {}).items()}
            for index, slots in self.optimizers[role].state_dict()["state"].items():
                tensors |= {f"optimizer/{role}/{index}/{k}": torch.as_tensor(v) for k, v in slots.items()}
        with calling(self.method, "state_dict"):
            method = self.method.state_dict()
        tensors |= {f"method/{k}": v for k, v in method.items() if isinstance(v, Tensor)}
        state = {
            "schema": SCHEMA,
            "step": self.step,
            "dataset": self.datasets[0].state_dict() if self.datasets else {},
            "method": {k: v for k, v in method.items() if not isinstance(v, Tensor)},
            "spikes": self.spike_detector.state_dict(),
        }
        final = self.out / "checkpoints" / f"step-{self.step:07d}"
        with atomic_directory(final) if self.ranks.rank == 0 else contextlib.nullcontext(_partial(final)) as partial:
            # Hashes are taken while files are written: nobody reads them again while the others wait.
            if self.ranks.sharded:
                sums = self.ranks.write(partial, tensors)
            else:
                sums = {STATE: tensor_files.save_tensors(partial / STATE, tensors)}
            if self.ranks.rank == 0:
                atomic_files.write_json(partial / "state.json", state)
                sums["state.json"] = manifest.hash_of(partial / "state.json")
                atomic_files.write_json(partial / "sums.json", sums)
        return final

    def _rotate(self) -> None:
        """Remove all but the newest `keep` checkpoints. Called after a good step and after an export, when the newest
        is known to be good: until then nothing makes room for it."""
        if self.ranks.rank == 0 and self.rotated != self.saved:
            for old in self._folders()[: -self.train_config.keep_checkpoints]:
                shutil.rmtree(old)
            self.rotated = self.saved

    def _newest(self) -> Path | None:
        """The newest checkpoint that is what was written; None where there is none at all."""
        refused: CheckpointError | None = None
        for folder in reversed(self._folders()):
            try:
                state = atomic_files.read_json(folder / "state.json", finite=False)
                if state.get("schema") != SCHEMA:
                    raise CheckpointError(f"{folder}: is of schema {state.get('schema')!r}; this Lens reads {SCHEMA}")
                sums = atomic_files.read_json(folder / "sums.json")
                there = {str(path.relative_to(folder)): path for path in _files(folder)}
                shares = {name for name in there if name.startswith(f"{SHARDS}/") and name.endswith(".safetensors")}
                for name in sorted({*sums, *(shares or {STATE}), "state.json"}):
                    if name not in there:
                        raise CheckpointError(f"{folder / name}: is missing")
                    if manifest.hash_of(there[name]) != sums.get(name):
                        raise CheckpointError(
                            f"{folder / name}: is not what was written; some of its bits have changed"
                        )
                return folder
            except CheckpointError as error:
                refused = error
                self.log(f"{folder.name} is damaged, so the one before it is used: {error}")
        if refused is not None:  # to begin anew would rotate these away, and they may be all that is left
            raise CheckpointError(
                f"{self.out}: none of its checkpoints can be read; choose a new --output or move them away ({refused})"
            )
        return None

    def _resume(self) -> None:
        # The first process looks for all, so that all go on from the same one.
        folder: Path | None = self.ranks.broadcast(self._newest() if self.ranks.rank == 0 else None)
        if folder is not None:
            self._restore(
                atomic_files.read_json(folder / "state.json", finite=False), self.ranks.read(folder, self._like())
            )
            self.log(f"resumed at step {self.step} from {folder}")
        if self.ranks.rank == 0:
            log = self.out / "log.jsonl"
            if log.is_file():  # a run that was killed had logged steps that are made again now
                atomic_files.rewrite_log(log, atomic_files.read_log(log, self.step))
            if self.evaluator is not None:
                begun = self.saved > 0  # else another recipe's first look is not this one's
                self.evaluator.resume(self.step if begun or not self.changed else -1, self.changed)
        if self.evaluator is not None:
            self.evaluator.lines = self.ranks.broadcast(self.evaluator.lines)

    def _like(self) -> dict[str, Tensor]:
        """By their names in a checkpoint, tensors that are divided as those there are to be."""
        found: dict[str, Tensor] = {}
        for role in self.nets if self.ranks.sharded else ():
            found |= {f"net/{role}/{k}": v.detach() for k, v in self.trainable_state(role).items()}
            found |= {f"ema/{role}/{k}": v for k, v in self.ema.get(role, {}).items()}
            for index, parameter in enumerate(self.learning[role]):
                found |= {f"optimizer/{role}/{index}/{k}": parameter.detach() for k in ("exp_avg", "exp_avg_sq")}
        return found

    def _restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        with calling(self.method, "load_state_dict"):
            self.method.load_state_dict({**state["method"], **under("method/")})
        for dataset in self.datasets:
            dataset.load_state_dict(state["dataset"])
        for role in self.nets:
            self._load(role, under(f"net/{role}/"))
            if role in self.ema:
                now = self.ema[role]  # which may be elsewhere than what was read
                self.ema[role] = {k: v.to(now[k].device) for k, v in under(f"ema/{role}/").items()}
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in under(f"optimizer/{role}/").items():
                index, _, slot = name.partition("/")
                slots.setdefault(int(index), {})[slot] = value
            groups = self.optimizers[role].state_dict()["param_groups"]
            self.optimizers[role].load_state_dict({"state": slots, "param_groups": groups})
        self.rng.set_state(tensors["rng"])
        torch.set_rng_state(tensors["torch_rng"])
        self.spike_detector.load_state_dict(state["spikes"])
        self.step = self.saved = int(state["step"])
        self.proven = self.step - 1 - max(self.spike_detector.row.values())

    def _load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `_own` gave."""
        if tensors.keys() != self.trainable_state(role).keys():
            raise CheckpointError(f"{self.out}: the checkpoint's {role} is another network than the recipe's")
        self.nets[role].load_state_dict(tensors, strict=role not in self.train_config.lora)

    def _gather(self) -> None:
        """Make divided weights and averages whole again, on the CPU of the first process, for `export`."""
        if not self.ranks.sharded:
            return
        for role, net in self.nets.items():
            full = self.ranks.gather(net.state_dict())
            average = self.ranks.gather(self.ema.get(role, {}))
            if self.ranks.rank == 0:
                blank = self.blanks[role]
                blank.load_state_dict(full, assign=True)
                for part in PREFIXES:
                    if self.pipeline.present().get(part) is net:
                        self.pipeline.put(part, blank, self.pipeline.specs.get(part))
                self.nets[role] = blank
                if role in self.ema:
                    self.ema[role] = average

    def export(self) -> Path:
        """Write the pipeline, with averaged weights where there are any, as a checkpoint in `model/`.

        An adapter goes to `adapters/ROLE/`, in diffusers' format, and is merged into the network that `model/` holds.
        """
        best = self.evaluator.weights(self.step) if self.evaluator is not None else None
        for role in self.exported:
            found = {k.removeprefix(f"{role}/"): v for k, v in (best or {}).items() if k.startswith(f"{role}/")}
            if best is not None or role in self.ema:
                self._load(role, self.ema[role] if best is None else found)
        if self.halves is not None:
            for part, net in self.pipeline.present().items():
                self.halves.restore(part, net)
        for role, adapter in self.train_config.lora.items():
            prefix = next((f for p, f in PREFIXES.items() if self.pipeline.present().get(p) is self.nets[role]), None)
            lora.save(self.nets[role], adapter, self.out / "adapters" / role / lora.FILE, prefix or role)
            if prefix:  # other networks are not exported, and may stand on the same weights
                lora.merge(self.nets[role])
        if self.train_config.export_dtype == "bf16":
            self.pipeline.to(dtype=torch.bfloat16)
        for role in self.exported:
            if not _finite(self.nets[role].parameters()):
                raise NumericalError(f"the weights of {role} are not finite; they are not exported; {self._advice()}")
        recipe = json.dumps(unstructure(self.recipe)).encode()
        made = {"method": self.recipe.method.use, "steps": self.train_config.steps, "seed": self.recipe.seed}
        self.pipeline.provenance |= {"recipe": made | {"sha256": hashlib.sha256(recipe).hexdigest()[:16]}}
        self.pipeline.device = torch.device("cpu")  # where parts that the run never touched are read now
        final = self.out / "model"
        with atomic_directory(final) as partial:
            self.pipeline.save_pretrained(partial)
        return final

    def _same_recipe(self) -> None:
        path = self.out / "recipe.json"
        now = json.loads(json.dumps(unstructure(self.recipe)))
        if path.is_file():
            try:  # by way of a Recipe, so that options which are newer than the run count as their defaults
                before = json.loads(
                    json.dumps(unstructure(structure(Recipe, atomic_files.read_json(path, finite=False))))
                )
                self.changed = list(_differences(before, now, "$"))
            except (ConfigError, CheckpointError) as error:
                if self._folders():
                    raise ConfigError(f"{path}: this Lens cannot read it; choose a new --output: {error}") from error
                self.changed = ["$"]  # nothing of that run is left to go on with
            changed = self.changed if self._folders() else []
            for line in changed if self.allow_changed else ():
                self.log(f"changed, as allowed: {line}")
            if changed and not self.allow_changed:
                raise ConfigError(
                    f"{self.out}: was begun with another recipe: {'; '.join(changed)}. "
                    "Choose a new --output, or go on with --allow-changed"
                )
        atomic_files.write_json(path, now)

    def _signals(self) -> _Signals:
        return _Signals(self)


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    """Each place in which two recipes differ: path, what was, what is."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}")
    elif before != now:
        yield f"{path} was {json.dumps(before)} and is {json.dumps(now)}"


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `final`. Where it cannot be filled, it gives its room back."""
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


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint whose sums are kept: all of them, but the sums."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "sums.json")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite. Of divided tensors, those that this process holds."""
    held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t.is_floating_point()]
    return bool(torch.nn.utils.get_total_norm([t.detach() for t in held if t.numel()], math.inf).isfinite())


def _blank(net: nn.Module) -> nn.Module:
    """`net` with every shape and no weights."""
    memo: dict[int, Any] = {id(t): t.to("meta") for t in net.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo)


def _precise(value: Tensor) -> Tensor:
    """A scalar to add up, where it is; as Python's numbers are, on devices that have them."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


class _Signals:
    """While open, SIGTERM and Ctrl-C ask the run to save and stop after the step at hand."""

    def __init__(self, run: Trainer) -> None:
        self.run = run
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def ask(*_: Any) -> None:
            self.run._stop = True

        try:
            self.before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            self.before = {}  # not the main thread: signals are somebody else's

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
