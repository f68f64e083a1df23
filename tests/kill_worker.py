"""Trains in processes that die by SIGKILL, goes on in others, and prints what came of it: see core/test_kill.py.

    python kill_worker.py FOLDER

It imports once and forks a process an attempt. A *moment* is just before one change of a file, or between the two
halves of a file of tensors; the same run has the same moments, so a process can be told to die at the n-th.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer would import, in every process anew
import toy
from accelerate import Accelerator  # noqa: F401  # likewise
from attrs import evolve

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, Evaluation, Recipe, Training
from lens_core.training.trainer import Trainer

CATALOG = Catalog.of(toy)
RECIPE = Recipe(
    method=ComponentSpec("fit"),
    dataset=ComponentSpec("squares"),
    train=Training(steps=6, lr=1e-2, warmup=2, lr_decay_fraction=0.5, ema_decay=0.9, save_every=2, log_every=2),
    pipeline=toy.PARTS,
    seed=3,
)
WATCHED = evolve(
    RECIPE,
    evaluation=Evaluation(
        every=2, size=(16, 16), prompts=("red",), benchmarks=(ComponentSpec("reds"),), keep_best="reds"
    ),
)
COUNT = 8  # moments to die at, chosen by chance; those in the middle of a file come on top
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Here:
    """What the process at hand has done, and when it has to die."""

    watched = False
    moments: list[str] = []  # noqa: RUF012  # one process, one list
    last: int | None = None  # the moment to die at
    pause = 0.0  # seconds that a loss takes, and each half of a file


def moment(name: str) -> None:
    if Here.watched:
        Here.moments.append(name)
        if len(Here.moments) - 1 == Here.last:
            os.kill(os.getpid(), signal.SIGKILL)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in CHANGES or written:
        moment(event)


def by_halves(path: Path, write: Any, atomic: Any = atomic_files.write_atomic) -> None:
    """`write_atomic` for a file of tensors, which writes the first half, is seen doing so, and writes the rest."""

    def halved(temporary: Path) -> None:
        write(temporary)
        content = temporary.read_bytes()
        with temporary.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            moment("half")
            time.sleep(Here.pause)
            file.write(content[len(content) // 2 :])

    atomic(path, halved)


def slow_loss(*arguments: Any, quick: Any = toy.Fit.loss) -> Any:
    time.sleep(Here.pause)
    return quick(*arguments)


def seen_score(*arguments: Any, plain: Any = toy.Reds.score) -> Any:
    moment("score")
    return plain(*arguments)


def attempt(
    folder: Path, last: int | None = None, pause: float = 0.0, killed_after: float | None = None, plan: Recipe = RECIPE
) -> int:
    """Train in a process of its own: its exit code, -9 if it was killed. A whole one leaves its moments behind."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Here.last, Here.pause, Here.watched = last, pause, True
            run = Trainer(plan, CATALOG, folder / "run", log=lambda line: None)
            run.train()
            Here.watched = False
            (folder / "moments.json").write_text(json.dumps(Here.moments))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> str:
    """A hash of the last checkpoint and of the model, names and bytes."""
    total, run = hashlib.sha256(), folder / "run"
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.parent != run):
        if path.relative_to(run).parts[0] == "model" or path.parent.name == "step-0000006":
            total.update(str(path.relative_to(run)).encode() + path.read_bytes())
    return total.hexdigest()


def checkpoint(folder: Path) -> str:
    """A hash of the tensors of the last checkpoint."""
    path = folder / "run" / "checkpoints" / "step-0000006" / "state.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps that were looked at."""
    return [json.loads(line)["step"] for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]


def newest(folder: Path) -> str:
    """The checkpoint that the next process will find."""
    names = sorted(p.name for p in (folder / "run" / "checkpoints").glob("step-*"))
    return names[-1] if names else ""


def main(root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    sys.addaudithook(audit)
    tensor_files.write_atomic = by_halves
    toy.Fit.loss = slow_loss  # type: ignore[method-assign]  # slower, and otherwise itself
    toy.Reds.score = seen_score  # type: ignore[method-assign]  # likewise
    whole = root / "whole"
    assert attempt(whole) == 0
    moments = json.loads((whole / "moments.json").read_text())
    chance = random.Random(0)
    halves = [n for n, name in enumerate(moments) if name == "half"]
    chosen = {*chance.sample(range(len(moments)), COUNT), *halves}
    sweep = []
    for last in sorted(chosen):
        folder = root / f"moment-{last}"
        code, newest_before = attempt(folder, last), newest(folder)
        sweep.append(
            {
                "moment": last,
                "change": moments[last],
                "code": code,
                "newest": newest_before,
                "again": attempt(folder),
                "is": outcome(folder),
            }
        )
    evaluations = root / "evaluations"
    assert attempt(evaluations, plan=WATCHED) == 0
    moments = json.loads((evaluations / "moments.json").read_text())
    watched = []
    scores = [n for n, name in enumerate(moments) if name == "score"]
    for last in (*scores, scores[0] + 1, scores[0] + 3, scores[2] + 1):  # while judging, and just after
        folder = root / f"evaluation-{last}"
        code, newest_before = attempt(folder, last, plan=WATCHED), newest(folder)
        again = attempt(folder, plan=WATCHED)
        watched.append(
            {"code": code, "newest": newest_before, "again": again, "is": outcome(folder), "evaluations": steps(folder)}
        )
    # Here the blows come from outside, at any instruction; where they hit depends on the machine.
    folder = root / "random"
    codes = [attempt(folder, pause=0.004, killed_after=chance.uniform(0.02, 0.1)) for _ in range(6)]
    last_code = attempt(folder)
    return {
        "whole": outcome(whole),
        "sweep": sweep,
        "evaluations": {
            "is": outcome(evaluations),
            "checkpoint": checkpoint(evaluations),
            "plain": checkpoint(whole),
            "runs": watched,
        },
        "random": {"codes": codes, "again": last_code, "is": outcome(folder)},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
