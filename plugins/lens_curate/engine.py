"""Runs the tasks of a curation in parallel, as a Daft dataflow: on this machine, or on a Ray cluster.

This module alone knows Daft. Tasks and answers are those of `worker`, so another engine would be another function here;
`serial` is one, without Daft: everything in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lens_core.config import structure, unstructure
from lens_core.io.readers import one_line
from lens_core.types import ConfigError, LensError
from lens_curate.isolated import Isolated
from lens_curate.recipe import CurationSpec
from lens_curate.worker import Answer, Worker, load_task

RUNNERS = ("native", "ray", "serial")
WAVE, WAVE_BYTES = 4096, 8 << 20  # tasks of one dataflow, and their text: what is planned at once is held several times
_DONE, _SUSPECT = "done", "suspect"  # the last answer of a task, or the only one: it has killed a process before
_IN_VAIN = 3  # dataflows that may end one after the other without a finished task, and without a picture to blame

Run = Callable[[Iterable[str]], Iterator[Answer]]


def engine(runner: str, spec: CurationSpec, store: str, workers: int | None = None) -> Run:
    """The function that runs tasks. Raises ConfigError for a runner that is not known, LensError for one that is not
    installed."""
    if runner not in RUNNERS:
        raise ConfigError(f"no runner is called {runner[:80]!r}; use {', '.join(RUNNERS[:-1])} or {RUNNERS[-1]}")
    if runner == "serial":
        worker = Worker(spec, store)
        return lambda tasks: (answer for task in tasks for answer in worker.run(load_task(task)))
    return _Dataflow(spec, store, workers, runner)


def default_runner() -> str:
    """What Daft's own variable asks for, else this machine."""
    return "ray" if os.environ.get("DAFT_RUNNER", "").lower() == "ray" else "native"


def _daft(runner: str) -> Any:
    """Daft, with its runner chosen, and without its and Ray's telemetry, which are on unless this is set before."""
    os.environ["DO_NOT_TRACK"], os.environ["RAY_USAGE_STATS_ENABLED"] = "1", "0"
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    try:
        import daft

        if runner == "ray":
            import ray  # noqa: F401  # so that its absence is told in one line
    except ImportError as error:
        extra = "curate,ray" if runner == "ray" else "curate"
        raise LensError(
            f"the runner {runner} needs {error.name}, which is missing; pip install 'lens-t2i[{extra}]', or use "
            "--runner serial"
        ) from error
    from daft import runners

    try:
        (daft.set_runner_ray if runner == "ray" else daft.set_runner_native)()
    except Exception as error:
        # Daft keeps the runner that a process has used first, and refuses even the same one again.
        if "more than once" not in str(error):
            raise LensError(f"the runner {runner} cannot start ({one_line(error, 200)}); run again") from error
        if runners.get_or_create_runner().name != runner:
            raise LensError(f"this process has run Daft on another runner than {runner}; start a new one") from error
    return daft


def _processors(runner: str) -> int:
    """Cores of this machine, or of the Ray cluster."""
    if runner == "ray":
        import ray

        if ray.is_initialized():
            return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return os.cpu_count() or 1


class _Runner:
    """A worker in a process of Daft's, built when its first task arrives.

    `marks`: a folder of this machine with a file for each task at work, "": none. Where a task's file is there already,
    the task has killed a process: Daft on Ray would try it for ever, and here it is handed back instead.
    """

    def __init__(self, spec: str, store: str, marks: str) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are the parallelism
        self.worker = Worker(structure(CurationSpec, json.loads(spec)), store)
        self.marks = Path(tempfile.gettempdir(), marks) if marks else None

    def __call__(self, task: str) -> Iterator[dict[str, Any]]:
        number, _, text = task.partition("\n")
        with contextlib.ExitStack() as after:
            if self.marks is not None:
                mark = self.marks / hashlib.sha256(text.encode()).hexdigest()[:32]
                if mark.exists():
                    yield {"kind": _SUSPECT, "body": number.encode()}
                    return
                self.marks.mkdir(mode=0o700, parents=True, exist_ok=True)
                mark.touch()
                after.callback(mark.unlink, missing_ok=True)  # which a process that dies does not come to
            for answer in self.worker.run(load_task(text)):
                yield {"kind": answer.kind, "body": answer.body}
        yield {"kind": _DONE, "body": number.encode()}


class _ProcessDied(LensError):
    """A dataflow ended before its tasks did."""


class _Dataflow:
    """Tasks -> (in every process) read, decode, hash, score -> tables, in the order in which they are done."""

    def __init__(self, spec: CurationSpec, store: str, workers: int | None, runner: str) -> None:
        daft = _daft(runner)
        self.count = workers or _processors(runner)
        fields = {"kind": daft.DataType.string(), "body": daft.DataType.binary()}
        call = daft.method(_Runner.__call__, return_dtype=daft.DataType.struct(fields), unnest=True)
        pool = type("CurationWorker", (_Runner,), {"__call__": call})
        make = daft.cls(pool, use_process=True, max_concurrency=self.count)
        marks = f"lens-curate-{uuid.uuid4().hex}" if runner == "ray" else ""  # elsewhere Daft ends at the first death
        self.daft, self.call = daft, make(json.dumps(unstructure(spec)), store, marks)
        self.marks = Path(tempfile.gettempdir(), marks) if marks else None
        self.isolated = Isolated(spec, store)

    def __call__(self, tasks: Iterable[str]) -> Iterator[Answer]:
        used = False
        try:
            for wave in _waves(tasks, 8 * self.count):
                used = True
                yield from self._survive(wave)
        finally:
            if self.marks is not None:
                shutil.rmtree(self.marks, ignore_errors=True)
        if used:
            time.sleep(0.5)  # its processes are still ending; a Python that ends meanwhile dies with them (Daft 0.7.26)

    def _survive(self, tasks: list[str]) -> Iterator[Answer]:
        """The answers of some tasks, also where a picture kills the process that decodes it: Daft then stops at once,
        and does not say at which task. Those that were next are run one by one, see `isolated`, and then the others.
        On Ray it tries again instead, and the task is handed back (`_Runner`).

        A task whose answers came in part gives them twice; of equal rows the last one counts.
        """
        in_vain = 0
        while tasks:
            done: set[int] = set()
            try:
                yield from self._wave(tasks, done)
                return
            except _ProcessDied as error:
                left = [task for number, task in enumerate(tasks) if number not in done]
                # Daft hands tasks out in order, and each process has one at work and some waiting.
                suspects, tasks = left[: 4 * self.count], left[4 * self.count :]
                warnings.warn("a process of the curation has died; the pictures that were at work are read again, "
                              "one by one, and what kills a process again is marked", stacklevel=2)  # fmt: skip
                before = self.isolated.deaths
                for task in suspects:
                    yield from self.isolated.run(task)
                in_vain = 0 if done or self.isolated.deaths > before else in_vain + 1
                if in_vain == _IN_VAIN:
                    raise LensError(f"{error}; the same command goes on") from error

    def _wave(self, tasks: list[str], done: set[int]) -> Iterator[Answer]:
        """The answers of one dataflow; `done` gets the numbers of the tasks that are finished."""
        numbered = [f"{number}\n{task}" for number, task in enumerate(tasks)]
        frame = self.daft.from_pydict({"task": numbered}).into_batches(1)
        del numbered
        answers = frame.select(self.call(self.daft.col("task"))).to_arrow_iter(results_buffer_size=2 * self.count)
        for batch in _one_line_errors(answers):
            kinds, bodies = batch.column("kind"), batch.column("body")
            for at in range(batch.num_rows):
                kind, body = kinds[at].as_py(), bodies[at].as_py()
                if kind == _DONE:
                    done.add(int(body))
                elif kind == _SUSPECT:
                    yield from self.isolated.run(tasks[int(body)])
                    done.add(int(body))
                else:
                    yield Answer(kind, body)


def _waves(tasks: Iterable[str], least: int) -> Iterator[list[str]]:
    """Tasks of one dataflow after the other; `least` of them keep the processes at work, however long their texts."""
    held: list[str] = []
    size = 0
    for task in tasks:
        held.append(task)
        size += len(task)
        if len(held) >= WAVE or (size >= WAVE_BYTES and len(held) >= least):
            yield held
            held, size = [], 0
    if held:
        yield held


def _one_line_errors(answers: Iterator[Any]) -> Iterator[Any]:
    """Answers; what Daft raises where a process died, or a recipe cannot be built there, is one line."""
    try:
        yield from answers
    except Exception as error:
        last = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise _ProcessDied(f"a process of the curation failed: {one_line(last[-1])}") from error
