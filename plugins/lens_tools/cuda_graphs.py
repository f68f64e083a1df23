"""Record CUDA graphs such that a recording that fails costs nothing but the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Output = TypeVar("Output")


def record(run: Callable[[], Output], pool: Any = None) -> tuple[Any, Output]:
    """A CUDA graph of `run` on the current device, and its output, which every replay overwrites.

    Let `run` run before, so that its kernels are chosen and what it caches exists. Raises RuntimeError where it cannot
    be recorded; then the current stream, the default generator and the allocator go on as if nobody had tried.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    device = torch.cuda.current_device()
    stream, generator = torch.cuda.current_stream(), torch.cuda.default_generators[device]
    before = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            output = run()
    except Exception as error:
        # Where torch cannot end a recording, it leaves its stream the current one, the generator as one that is being
        # recorded, which refuses to draw, and the allocator without its way to free what it keeps.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # the recording did end
                end(device, pool)
        # What ended it comes first: the error of the end itself only says that there was one.
        why = "; ".join(f"{type(e).__name__}: {e}" for e in (error.__context__, error) if e is not None)
        raise RuntimeError(f"no CUDA graph was recorded: {why}") from error
    return graph, output
