"""Recording a CUDA graph, with a stand-in for CUDA that fails where torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lens_tools import cuda_graphs


class State:
    def __init__(self, offset: int) -> None:
        self.offset, self.recording = offset, False


class Generator:
    """As torch's: one that is being recorded refuses to draw outside."""

    def __init__(self, state: State) -> None:
        self.state = state

    def clone_state(self) -> Generator:
        return Generator(State(self.state.offset))

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> int:
        if self.state.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 1
        return self.state.offset


class Device:
    """The stream, the generator and the pool of one GPU, and how torch's recording leaves them."""

    def __init__(self, broken_end: bool) -> None:
        self.stream, self.generator, self.broken_end = "main", Generator(State(3)), broken_end
        self.open_pools: list[tuple[int, int]] = []

    def graph(self, graph: Any, pool: tuple[int, int]) -> Device:
        self.pool = pool
        return self

    def __enter__(self) -> None:
        self.stream, self.generator.state.recording = "recording", True
        self.open_pools.append(self.pool)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and self.broken_end:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.end_pool(0, self.pool)
        self.generator.state.recording = False
        self.stream = "main"

    def end_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)


def install(monkeypatch: pytest.MonkeyPatch, broken_end: bool) -> Device:
    device = Device(broken_end)
    for name, value in {
        "graph_pool_handle": lambda: (0, 7), "current_device": lambda: 0, "CUDAGraph": object, "graph": device.graph,
        "current_stream": lambda: device.stream, "set_stream": lambda s: setattr(device, "stream", s),
        "default_generators": (device.generator,),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_pool, raising=False)
    return device


@pytest.mark.parametrize("broken_end", [False, True])
def test_after_a_recording_that_fails_all_is_as_before(monkeypatch: pytest.MonkeyPatch, broken_end: bool) -> None:
    device = install(monkeypatch, broken_end)

    def run() -> None:
        raise ValueError("a copy from pageable memory")

    with pytest.raises(RuntimeError, match="ValueError: a copy from pageable memory"):
        cuda_graphs.record(run)
    assert device.stream == "main" and not device.open_pools and device.generator.draw() == 4
    graph, output = cuda_graphs.record(lambda: 5, (0, 9))
    assert output == 5 and graph is not None and device.pool == (0, 9)


def test_a_stand_in_without_the_repair_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see if nothing were repaired."""
    device = install(monkeypatch, True)
    with pytest.raises(RuntimeError, match="previous error"), device.graph(None, (0, 1)):
        raise ValueError
    with pytest.raises(RuntimeError, match="outside graph capture"):
        device.generator.draw()
    assert device.stream == "recording" and device.open_pools
