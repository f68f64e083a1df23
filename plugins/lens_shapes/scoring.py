"""Pictures of shapes against the facts of their prompts: read from pixels, in this process or in several."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lens_core.types import LensError, Prompt, Score
from lens_shapes.reader import read
from lens_shapes.reading import check_facts

if TYPE_CHECKING:
    from torch import Tensor


def check_one_each(images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError unless there is a picture for each prompt."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures cannot answer {len(prompts)} prompts; pass one picture a prompt")


def score_images(
    images: Tensor, prompts: Sequence[Prompt], partial: bool = False, extras: bool = False, processes: int = 1
) -> list[Score]:
    """Images uint8 [B,3,H,W] -> 1.0 where every fact of the prompt is there, else 0.0; abstains without facts.

    `partial`: the share of the facts that are there. `extras`: things that were not asked for do no harm, unless the
    prompt counts, as by GenEval's rules. `processes` above 1: that many read at once, with the same scores; they are
    started by the first call, and a script that calls this needs `if __name__ == "__main__":`.
    """
    check_one_each(images, prompts)
    # A copy in the memory order of pixels: the reader's results do not depend on it, but its speed does.
    pictures = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    score = functools.partial(_score, partial=partial, extras=extras)
    if processes == 1 or len(prompts) == 1:
        return [score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    size = max(1, len(prompts) // (4 * processes))
    try:
        return list(_pool(processes).map(score, pictures, prompts, chunksize=size))
    except BrokenProcessPool:  # one of them was killed, as for want of memory: once more, with new ones
        _pool.cache_clear()
    try:
        return list(_pool(processes).map(score, pictures, prompts, chunksize=size))
    except BrokenProcessPool as error:
        _pool.cache_clear()
        raise LensError(
            f"the {processes} processes that read pictures of shapes died twice; use fewer (`processes`), and in a "
            'script of yours call this under `if __name__ == "__main__":`'
        ) from error


@functools.cache
def _pool(processes: int) -> ProcessPoolExecutor:
    """Readers for as long as this process runs. Spawned, not forked: a fork would copy a GPU's context and threads."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """Ctrl-C is the parent's: it saves, and ends its readers. A parent that is killed takes them along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _score(picture: NDArray[np.uint8], question: Prompt, *, partial: bool, extras: bool) -> Score:
    if "groups" not in question.data:
        return Score("abstain", evidence="the prompt carries no facts about shapes")
    reading = read(picture)
    facts: dict[str, Any] = check_facts(reading, question.data, extras, exact=not extras or question.task == "counting")
    value = sum(facts.values()) / len(facts) if partial else float(all(facts.values()))
    return Score("ok", value, facts, str(reading))
