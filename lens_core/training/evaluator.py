"""Evaluation during training: a grid of samples, benchmarks, held-out losses, the best weights, early stopping.

Each evaluation is a line of `evaluations.jsonl`. Which weights are the best and when to stop early depends on the lines
up to the current step and on nothing else, so a resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.attribution import batches_of, building, calling, prompts_of
from lens_core.catalog import Catalog
from lens_core.checkpoints import manifest, tensor_files
from lens_core.evaluation import contracts, report, run
from lens_core.inference.parts import PIPELINE_PARTS
from lens_core.inference.pipeline import LensPipeline
from lens_core.io import atomic_files
from lens_core.recipe import Evaluation, build
from lens_core.types import CheckpointError, ConfigError, LensError, Prompt

COLUMNS = 8  # of a sample grid


class Interrupted(Exception):
    """The run is to stop; the unfinished evaluation leaves nothing behind."""


class Evaluator:
    """Evaluates one run in a folder. Raises ConfigError at once where pipeline or method cannot be evaluated."""

    def __init__(
        self, config: Evaluation, catalog: Catalog, pipeline: LensPipeline, method: Any, out: Path,
        log: Callable[[str], None], *, writes: bool = True,
    ) -> None:  # fmt: skip
        self.config, self.pipeline, self.method, self.out, self.log = config, pipeline, method, out, log
        self.writes = writes  # of several processes, one does
        absent = [p.replace("_", " ") for p in PIPELINE_PARTS if getattr(pipeline, p) is None]
        if absent and (config.prompts or config.benchmarks):
            raise ConfigError(
                f"$.evaluation: a pipeline without a {' and a '.join(absent)} cannot draw; add what is missing, or "
                "leave prompts and benchmarks out"
            )
        if not absent:
            pipeline.size(*(config.size or (None, None)))  # which refuses what is not on its grid
        self.benchmarks: dict[str, Any] = {}
        for i, (name, use) in enumerate(config.named_benchmarks().items()):
            full, cls, options = build(catalog, "benchmark", use, f"$.evaluation.benchmarks[{i}]")
            with building(full):
                self.benchmarks[name] = cls(options)
            if not prompts_of(self.benchmarks[name]):
                raise ConfigError(f"$.evaluation.benchmarks[{i}]: {name} has no prompts")
        self.held: Any = None
        if config.validation is not None:
            if not hasattr(method, "validate"):
                raise ConfigError(
                    f"$.evaluation.validation: {type(method).__name__} has no validate(), so it measures nothing on "
                    "pictures that it does not learn from; leave validation out"
                )
            full, cls, options = build(catalog, "dataset", config.validation, "$.evaluation.validation")
            with building(full):
                self.held = cls(options)
            self._first = self.held.state_dict()
        self.lines: dict[int, dict[str, Any]] = {}  # by step

    # ---- what follows from the lines ------------------------------------------------------------------------------

    def resume(self, step: int, changed: Sequence[str]) -> None:
        """Read earlier evaluations. Those beyond `step`, made by a run that was killed, count when the run gets there
        again: it will be the same run. Where its recipe has `changed`, in these places, they are forgotten."""
        path = self.out / "evaluations.jsonl"
        entries = atomic_files.read_log(path, step if changed else torch.inf)
        self.lines = {int(line["step"]): line for line in entries}
        for line in self.lines.values():
            if not _is_score(line.get("score")):  # a file that was changed, or not written by this version
                line.pop("score", None)
        best = self.best(step)
        harmless = ("$.evaluation.every", "$.evaluation.patience")  # they change when, not what, is measured
        rescored = [c for c in changed if c.startswith("$.evaluation") and not c.startswith(harmless)]
        if changed and best is not None and (rescored or not self._file(best).is_file()):
            why = "were scored otherwise" if rescored else "are gone"
            self.log(f"the weights of step {best}, the best so far, {why}; the best is chosen anew")
            for line in self.lines.values():
                line.pop("score", None)
        if path.is_file():
            atomic_files.rewrite_log(path, self.lines.values())

    def due(self, step: int, last: int) -> bool:
        """Whether an evaluation is due at `step` of a run of `last` steps, and has not been made."""
        return (step % self.config.every == 0 or step == last) and step not in self.lines

    def _scores(self, step: int) -> dict[int, float]:
        return {n: line["score"] for n, line in sorted(self.lines.items()) if n <= step and "score" in line}

    def best(self, step: int) -> int | None:
        """The step of the best score up to `step`; of equal ones the first."""
        scores = self._scores(step)
        return max(scores, key=lambda n: scores[n]) if scores else None

    def should_stop(self, step: int) -> bool:
        """Whether none of the last `patience` evaluations improved the score."""
        best = self.best(step)
        return bool(self.config.patience) and sum(n > (best or 0) for n in self._scores(step)) >= self.config.patience

    def stop_reason(self) -> str:
        """Why the run stops early."""
        return f"early stopping: no improvement of {self.config.keep_best} in {self.config.patience} evaluations"

    def weights(self, step: int) -> dict[str, Tensor] | None:
        """The best weights up to `step`, as MODULE/NAME; None where none are kept, or they cannot be read."""
        best = self.best(step)
        if best is None:
            return None
        score, count = self.lines[best]["score"], len(self._scores(step))
        try:
            if manifest.hash_of(self._file(best)) != self.lines[best].get("sha256"):
                raise CheckpointError(f"{self._file(best)}: is not what was written; some of its bits have changed")
            tensors = tensor_files.read_tensors(self._file(best))
        except (CheckpointError, OSError) as error:
            self.log(f"the model is that of the last step, {step}, for the best cannot be read: {error}")
            return None
        self.log(
            f"the model is that of step {best}: {self.config.keep_best} {score:.4f}, the best of {count} evaluations"
        )
        return tensors

    def _file(self, step: int) -> Path:
        return self.out / "best" / f"step-{step:07d}.safetensors"

    # ---- an evaluation --------------------------------------------------------------------------------------------

    def evaluate(
        self, step: int, modules: Mapping[str, nn.Module], weights: Callable[[], dict[str, Tensor]],
        stopping: Callable[[], bool], agreed: Callable[[Any], Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Draw, score and measure; returns the line of the log. `weights` are what would be exported now, MODULE/NAME.

        Several processes all use the results of the first one, which `agreed` returns.
        A benchmark that fails is logged and does not stop the run. Raises Interrupted soon after `stopping` is true.
        """

        def check(_: str = "") -> None:
            if stopping():
                raise Interrupted

        begun, config = time.monotonic(), self.config
        metrics: dict[str, float] = {}
        failed: dict[str, str] = {}
        check()
        if config.prompts:
            self._sheet(step, check)
        for name, benchmark in self.benchmarks.items():
            scores, fault = {}, ""
            try:
                outcome = self._measure(benchmark, check)
                scores = {name: outcome.overall.value}
                scores |= {f"{name}/{task}": of.value for task, of in outcome.tasks.items() if of.count}
            except LensError as error:
                fault = str(error)
            scores, fault = agreed((scores, fault))
            if fault:
                failed[name] = fault
                self.log(f"step {step}: the benchmark {name} failed, and the run goes on: {fault}")
            metrics |= scores
        if self.held is not None:
            metrics |= agreed(self._validate(modules, check))
        metrics = {name: round(value, 6) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - begun, 1), **metrics}
        line |= {"failed": failed} if failed else {}
        if _is_score(metrics.get(config.keep_best)):
            best, line["score"] = self.best(step), metrics[config.keep_best]
            if best is None or line["score"] > self.lines[best]["score"]:
                held = weights()
                if self.writes:
                    line["sha256"] = tensor_files.save_tensors(self._file(step), held)
        self.lines[step] = line
        if self.writes:
            atomic_files.append(self.out / "evaluations.jsonl", line)
            self._tidy()
        summary = "  ".join(f"{k} {metrics[k]:.4f}" for k in metrics if k in self.benchmarks or k == "validation/loss")
        self.log(f"step {step}: evaluation took {line['seconds']:.0f} s  {summary}".rstrip())
        return line

    def _measure(self, benchmark: Any, check: Callable[..., None]) -> run.BenchmarkResult:
        config = self.config
        try:
            return run.evaluate(
                self.pipeline,
                benchmark,
                seed=config.seed,
                batch_size=config.batch_size,
                log=check,
                **self._settings(),
            )
        finally:
            contracts.free(benchmark)  # training needs the memory

    def _settings(self) -> dict[str, Any]:
        height, width = self.config.size or (None, None)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.config.steps,
            "guidance_scale": self.config.guidance_scale,
        }

    def _sheet(self, step: int, check: Callable[[], None]) -> None:
        """samples/step-N.png; where values are not finite, a line in the log instead."""
        prompts = [Prompt(text) for text in self.config.prompts]
        parts = []
        try:
            for part in run.generate_images(
                self.pipeline, prompts, self.config.seed, self.config.batch_size, **self._settings()
            ):
                parts.append(part.cpu())
                check()
        except LensError as error:
            self.log(f"step {step}: the samples cannot be drawn, and the run goes on: {error}")
            return
        if not self.writes:
            return
        columns = min(COLUMNS, len(prompts))
        sheet = report.contact_sheet(torch.cat(parts), self.config.prompts, [None] * len(prompts), columns)
        path = self.out / "samples" / f"step-{step:07d}.png"
        atomic_files.write_atomic(path, lambda p: sheet.save(p, format="PNG"))

    def _validate(self, modules: Mapping[str, nn.Module], check: Callable[[], None]) -> dict[str, float]:
        """Means over the samples of the held-out dataset's first batches: the same ones, under the same noise."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        self.held.load_state_dict(self._first)
        for number, batch in enumerate(islice(batches_of(self.held, 0, 1), self.config.validation_batches)):
            check()
            rng = torch.Generator().manual_seed(self.config.seed + number)
            there = batch.to(self.pipeline.device)
            with calling(self.method, "validate"):
                means = {name: float(value) for name, value in self.method.validate(there, modules, rng).items()}
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value * len(batch)
                counts[name] = counts.get(name, 0) + len(batch)
        return {f"validation/{name}": total / counts[name] for name, total in sorted(sums.items())}

    def _tidy(self) -> None:
        """Keep the best weights alone."""
        best = self.best(max(self.lines))
        if best is not None:
            for path in set((self.out / "best").glob("step-*.safetensors")) - {self._file(best)}:
                path.unlink()


def _is_score(value: object) -> bool:
    """Whether weights can be chosen by it: NaN, which a benchmark without a verdict gives, is above and below none."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number, by its type
