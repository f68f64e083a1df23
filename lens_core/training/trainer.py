"""The one training loop: steps, evaluations, checkpoints, log lines, export.

It never sees an architecture; methods never see a device or an optimizer. A run is a folder:
`recipe.json`, `log.jsonl`, `checkpoints/step-N/` and, at the end, `model/`, which `from_pretrained` reads; with a
section `evaluation`, `evaluations.jsonl`, `samples/` and `best/` too.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.attribution import batches_of, calling, headline_of, items, update_order_of
from lens_core.catalog import Catalog
from lens_core.io import atomic_files
from lens_core.io.locks import locked
from lens_core.io.progress import progress_bar
from lens_core.recipe import Recipe, unstructure
from lens_core.training import banner, checkpointing, export
from lens_core.training.ema import ema_weights
from lens_core.training.evaluator import Interrupted
from lens_core.training.nonfinite import refuse_non_finite, refuse_unproven
from lens_core.training.state import TrainingState
from lens_core.training.step import flops, next_micro_batches, optimizer_step
from lens_core.training.throughput import MetricBuffer, Throughput, TimedLoader, memory, peak
from lens_core.training.trackers import Trackers
from lens_core.types import CheckpointError, Shard

TIMED_STEPS = 2  # by which the time of a run is estimated, after a first one, which compiles and fills caches


@frozen
class TrainingResult:
    """What a run ends with: steps made, seconds, the last logged means, and the folder of the model, if it finished."""

    steps: int
    seconds: float
    losses: Mapping[str, float]
    model: Path | None


class Trainer(TrainingState):
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
        super().__init__(recipe, catalog, out, log)
        self.allow_changed = allow_changed
        self.loader = TimedLoader()
        self.headline = headline_of(self.method, self.modules)
        self.step_seconds: list[float] = []  # of the first steps of this process
        self._stop = False  # set by a signal; all processes agree on it once a step

    def train(self) -> TrainingResult:
        """Run to the end. Ctrl-C and SIGTERM save first, then stop. Raises NumericalError after too many bad steps and
        where weights are not finite, CheckpointError where something cannot be written; the checkpoints before it are
        whole. LockedError where another process trains in the same folder."""
        with locked(self.out, "run") if self.ranks.rank == 0 else contextlib.nullcontext():
            if self.ranks.rank == 0:
                checkpointing.check_recipe(self, self.allow_changed)
            self.ranks.barrier()
            checkpointing.resume(self, self.allow_changed)
            # After resuming: rates and time left count from the step that was resumed.
            self.throughput = Throughput(self.step, peak(self.accelerator.device))
            self.trackers = Trackers(self.accelerator, unstructure(self.recipe), self.out, self.log)
            try:
                return self._train()
            except atomic_files.WriteError as error:
                whole = [folder.name for folder in checkpointing.folders(self.out)]
                more = (
                    f"{whole[-1]} is whole, and the same command goes on from it" if whole else "nothing was saved yet"
                )
                raise CheckpointError(f"{error}; {more}") from error
            finally:
                self.trackers.finish()

    def _train(self) -> TrainingResult:
        config = self.train_config
        streams = self._micro_batch_streams()
        start = time.monotonic()
        metrics = MetricBuffer()
        means: dict[str, float] = {}
        self._log_banner()
        with self._signals(), progress_bar(config.steps, "step", initial=self.step, desc=self.out.name) as bar:
            while not (finished := self._evaluate()) and not self._stop:
                begun = time.monotonic()
                self._step(streams, metrics)
                bar.update()
                if len(self.step_seconds) <= TIMED_STEPS:
                    self._log_time(time.monotonic() - begun)
                # A signal reaches one process; all must leave the loop at the same step, or the others wait forever.
                self._stop = self.ranks.any(self._stop)
                if self._logs_at(self.step):
                    means = metrics.means(self.ranks.all_gather)
                    if self.ranks.rank == 0:
                        self._write_log(means, time.monotonic() - start)
                if self.step % config.save_every == 0 or self.step == config.steps or self._stop:
                    self._save()
            self._save()
        if not finished:
            self.log(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
            return TrainingResult(self.step, time.monotonic() - start, {}, None)
        refuse_unproven(self)
        export.gather_weights(self)
        model = export.export(self) if self.ranks.rank == 0 else self.out / "model"
        self.last_good_step = self.step
        checkpointing.rotate(self)
        self.ranks.barrier()
        return TrainingResult(self.step, time.monotonic() - start, means, model)

    def _step(self, streams: Sequence[Iterator[Sequence[Any]]], metrics: MetricBuffer) -> None:
        """One training step: an optimizer step of each module whose turn it is, on the same micro-batches."""
        if hasattr(self.method, "logs"):
            self.method.logs = self._logs_at(self.step + 1)
        parts = [next_micro_batches(self, steps) for steps in streams]
        for turn, module_name in enumerate(update_order_of(self.method, self.step, self.modules)):
            self.throughput.flops += flops(self, module_name, parts)
            reported = optimizer_step(self, module_name, turn, parts)
            metrics.add({f"{module_name}/{name}": value for name, value in reported.items()})
        with calling(self.method, "after_step"):
            self.method.after_step(self.step, self.modules)
        # Only checkpoints before a step that is known to be sound may be removed.
        if not any(self.spike_detector.row.values()):
            self.last_good_step = self.step
            checkpointing.rotate(self)
        self.step += 1

    def _micro_batch_streams(self) -> list[Iterator[Sequence[Any]]]:
        """The method's steps, for each micro-batch of this process. Their generators start in one state, so that what
        all micro-batches must share is drawn alike in all."""
        streams = []
        for number, index in enumerate(self.ranks.local_micro_batches):
            batches: Iterator[Any] = iter(())
            if getattr(self.method, "shards_itself", False):
                batches = repeat(Shard(index, self.ranks.micro_batches))
            elif self.datasets:
                source = batches_of(self.datasets[number], index, self.ranks.micro_batches)
                batches = (batch.to(self.accelerator.device) for batch in self.loader.through(source))
            rng = self.rng if number == 0 else torch.Generator().manual_seed(self.recipe.seed)
            # The streams diverge from here on, each with its own batches.
            rng.set_state(self.rng.get_state())
            with calling(self.method, "steps"):
                steps = self.method.steps(batches, self.modules, rng)
            streams.append(items(self.method, "steps", steps))
        return streams

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluate, if it is time to. Whether the run is finished: all steps made and evaluated, or stopped early."""
        last = self.train_config.steps
        over = self.step >= last
        if self.evaluator is None:
            return over
        if over or self.step % self.evaluator.config.every == 0:
            refuse_non_finite(self)
        pending = False
        if self.ranks.rank == 0 or self.ranks.sharded:  # one process alone cannot draw with sharded weights
            if self.evaluator.due(self.step, last):
                self._run_evaluation()
            pending = self.evaluator.due(self.step, last)  # still, where a signal interrupted it
            if not over and self.evaluator.should_stop(self.step):
                over = True
                self.log(f"{self.evaluator.stop_reason()}; the run ends at step {self.step} of {last}")
        self._stop = self.ranks.any(self._stop)
        return self.ranks.any(over) and not self.ranks.any(pending)

    def _run_evaluation(self) -> None:
        assert self.evaluator is not None  # `_evaluate` has seen it
        started = time.monotonic()
        together = self.ranks.sharded
        stopping = (lambda: self.ranks.any(self._stop)) if together else (lambda: self._stop)
        agreed = self.ranks.broadcast if together else (lambda value: value)
        with contextlib.suppress(Interrupted), self.isolated_rng(), ema_weights(self):
            line = self.evaluator.evaluate(self.step, self.modules, self.export_weights, stopping, agreed)
            self.trackers.log({f"evaluation/{k}": v for k, v in line.items() if k != "step"}, self.step)
        # Otherwise steps per second would fall whenever an evaluation is due.
        self.throughput.excluded += time.monotonic() - started

    def export_weights(self) -> dict[str, Tensor]:
        """What `export` would write of the trainable modules, as MODULE/NAME, while averages stand in their places."""
        state = {f"{r}/{k}": v.detach() for r in self.exported_modules for k, v in self.trainable_state(r).items()}
        return self.ranks.gather(state) if self.ranks.sharded else state

    # ---- log and checkpoints ------------------------------------------------------------------------------------

    def _logs_at(self, step: int) -> bool:
        """Whether there is a line about the steps up to `step`."""
        return step % self.train_config.log_every == 0 or step == self.train_config.steps

    def _write_log(self, means: Mapping[str, float], seconds: float) -> None:
        """A line of `log.jsonl`, of the trackers and of the terminal."""
        values = {name: round(mean, 6) for name, mean in means.items()}
        speed = self.throughput.line(self.step, self.loader, self.ranks.world)
        peak_memory = memory(self.accelerator.device)
        line = {"step": self.step, "seconds": round(seconds, 1), **speed, **values}
        line |= {"memory_gb": round(peak_memory, 3)} if peak_memory is not None else {}
        line |= {f"{module_name}/skipped": count for module_name, count in self.spike_detector.skipped.items() if count}
        atomic_files.append(self.out / "log.jsonl", line)
        self.trackers.log({k: v for k, v in line.items() if k != "step"}, self.step)
        words = [f"{name} {values[name]:.4g}" for name in self.headline if name in values]
        words += [f"{speed['steps_per_second']:.3g} steps/s"]
        words += [f"{k} {line[k]}" for k in line if k.endswith("/skipped")]
        last = self.train_config.steps
        self.log("  ".join([f"step {self.step}/{last}", *words, self.throughput.left(self.step, last)]))

    def _log_banner(self) -> None:
        if self.step < self.train_config.steps:
            for line in banner.lines(self, self.step):
                self.log(line)

    def _log_time(self, seconds: float) -> None:
        """After the first few steps of this process, the time for all that are left. `seconds` are those of a step."""
        self.step_seconds.append(seconds)
        left = self.train_config.steps - self.step
        if len(self.step_seconds) == 1 + TIMED_STEPS and left:
            self.log(banner.time_line(left, sum(self.step_seconds[1:]) / TIMED_STEPS))

    def _save(self) -> None:
        """A checkpoint of this step, once."""
        if self.saved_step != self.step:
            refuse_non_finite(self)
            if self.ranks.rank == 0 or self.ranks.sharded:
                checkpointing.save(self)
            self.ranks.barrier()
            self.saved_step = self.step

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While open, SIGTERM and Ctrl-C ask the run to save and stop after the current step."""

        def ask(*_: Any) -> None:
            self._stop = True

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            before = {}  # not the main thread: signals are somebody else's
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
