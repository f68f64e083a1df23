"""Runs tasks in a process of its own that may die: a decoder that crashes, a machine without memory left.

`engine` comes here with the tasks that were at work when one of its processes died. The process says which picture it
is about to decode; where it dies, that picture is marked, and the rest goes on in another process. A picture that does
not kill it here, as after a shortage of memory that is over, is read as any other.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

from attrs import evolve

from lens_core.config import structure, unstructure
from lens_core.io.readers import one_line
from lens_core.types import LensError
from lens_curate.recipe import CurationSpec
from lens_curate.worker import Answer, PartTask, Worker, dump_task, load_task

_HEAD = struct.Struct(">II")  # lengths of a message's kind and of its body
_CODE = "from lens_curate.isolated import main; main()"


class Isolated:
    """Runs tasks of one recipe; `deaths` counts the processes that they have killed."""

    def __init__(self, spec: CurationSpec, store: str) -> None:
        self.recipe = {"spec": unstructure(spec), "store": store}
        self.deaths = 0

    def run(self, text: str) -> Iterator[Answer]:
        """The answers of a task, in the text of `dump_task`. Raises LensError where the process cannot work at all."""
        left = load_task(text)
        while left:
            number, done = 0, 0  # of the picture that is decoded, 0 while the source is read; parts that are finished
            last = 0  # the picture before
            with _process() as process:
                _write(process.stdin, json.dumps({**self.recipe, "tasks": dump_task(left)}).encode())
                for kind, body in _messages(process.stdout):
                    if kind == "at":
                        number = int(body)
                        last = number or last
                    elif kind == "done":
                        number, last, done = 0, 0, done + 1
                    elif kind == "error":
                        raise LensError(body.decode("utf-8", "replace"))
                    else:
                        yield Answer(kind, body)
            if process.returncode and done < len(left):
                self.deaths += 1
                why = f"crashed the process that read it ({_cause(process.returncode)})"
                left = [_marked(left[done], number, last, why), *left[done + 1 :]]
            else:
                left = []


def _marked(task: PartTask, number: int, last: int, why: str) -> PartTask:
    """A task that leaves out what a process has died of."""
    if number:
        return evolve(task, fatal={**task.fatal, number: why})
    return evolve(task, unreadable=(last + 1, why))


def _cause(code: int) -> str:
    """Why a process has died, in a word or two."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def _process() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _write(file: IO[bytes] | None, body: bytes) -> None:
    assert file is not None
    try:
        with file:
            file.write(body)
    except OSError:  # it has died already, which its exit code says
        return


def _messages(file: IO[bytes] | None) -> Iterator[tuple[str, bytes]]:
    """What a process says, until it ends or dies."""
    assert file is not None
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        sizes = _HEAD.unpack(head)
        kind, body = (file.read(size) for size in sizes)
        if len(body) < sizes[1]:
            return
        yield kind.decode(), body


def main() -> None:
    """The process itself: tasks on standard input, messages on standard output."""
    out = sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no message

    def send(kind: str, body: bytes = b"") -> None:
        out.write(_HEAD.pack(len(kind), len(body)) + kind.encode() + body)
        out.flush()

    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    try:
        worker = Worker(
            structure(CurationSpec, order["spec"]),
            order["store"],
            batch=1,  # so that what dies has scored one picture
            note=lambda number: send("at", str(number).encode()),
        )
        for task in load_task(order["tasks"]):
            for answer in worker.run([task]):
                send(answer.kind, answer.body)
            send("done")
    except Exception as error:
        send("error", one_line(error).encode())
