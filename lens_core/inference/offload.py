"""Drawing with less memory on the accelerator than the weights take: who is there when, and how many bytes that is.

Weights that are not always on the accelerator lie packed on the host, pinned where there is CUDA. They are copied, and
what leaves the accelerator is dropped. The pictures are bit for bit those of plan `none`, except that under
`encoder-cpu` the features are rounded as a CPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core.types import ConfigError, did_you_mean

PHASES = {"text_encoder": "encode", "backbone": "denoise", "vae": "decode"}
"""Part -> the phase of a drawing in which it works, in their order."""
PLANS: dict[str, dict[str, str]] = {
    "none": {"text_encoder": "stays", "backbone": "stays", "vae": "stays"},
    "modulation": {"text_encoder": "stays", "backbone": "stays", "vae": "stays"},
    "model": {"text_encoder": "visits", "backbone": "visits", "vae": "visits"},
    "encoder-cpu": {"text_encoder": "host", "backbone": "stays", "vae": "stays"},
    "block": {"text_encoder": "streams", "backbone": "streams", "vae": "visits"},
}
"""Plan -> where each part is, the fastest first. A part stays on the accelerator, visits it while it works, streams
through it block by block, or works on the host. In all but `none`, modules that a part calls idle stay on the host."""
ALIGNMENT = 512  # bytes, at which CUDA's allocator puts tensors too: kernels choose their path by it
SLOTS = 2  # blocks on the accelerator at a time: the one that works, and the next
CHUNK = 64 << 20  # bytes of a host buffer: pinned memory is rounded up to a power of two, and few large copies are fast


class Accelerator:
    """Where weights go. Copies run ahead on a stream of their own where there is CUDA, and at once elsewhere.

    A mark is a point in the work given to the device so far (an event; None where work is done when it is given).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.side: Any = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]  # torch's

    def host(self, size: int) -> Tensor:
        """`size` bytes on the host, which `copy` reads fastest."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        except RuntimeError:  # the system pins no more: copies from here are slower, and right all the same
            return torch.empty(size, dtype=torch.uint8)

    def empty(self, size: int) -> Tensor:
        """`size` bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for good."""
        return tensor.to(self.device)

    def mark(self) -> Any:
        """All that has been given to the device until now."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def copy(self, to: Tensor, host: Tensor, after: Any) -> Any:
        """Begin to copy once `after` is done; returns the mark of the end, for `wait`."""
        if not self.cuda:
            to.copy_(host)
            return None
        with torch.cuda.stream(self.side):
            self.side.wait_event(after)
            to.copy_(host, non_blocking=True)
            return self.side.record_event()

    def wait(self, mark: Any) -> None:
        """What is given to the device from now on begins after `mark`."""
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def free(self) -> int | None:
        """Bytes that could be had now; None where that cannot be asked, or where weights are on the host anyway."""
        if not self.cuda:
            return None
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused


def _own(module: nn.Module, seen: set[int]) -> list[Tensor]:
    """Parameters and buffers of `module` that are not `seen` yet; now they are."""
    found = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
    seen |= {id(t) for t in found}
    return found


def aligned_offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Bytes of each tensor -> where it begins in one buffer, and the buffer's size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def split(module: Any, streams: bool, idles: bool) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
    """A part's tensors: (what works all the time, its blocks, its idle modules). Only parts that say so have the latter
    two: by `blocks()`, modules that run one after the other in this order, and `unused_modules()`."""
    seen: set[int] = set()
    idle = [_own(m, seen) for m in module.unused_modules()] if idles and hasattr(module, "unused_modules") else []
    blocks = [_own(m, seen) for m in module.blocks()] if streams and hasattr(module, "blocks") else []
    return _own(module, seen), blocks, idle


class TensorGroup:
    """Tensors that travel together: views of host buffers, and of one on the accelerator while they are there."""

    def __init__(self, tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
        self.tensors, self.accelerator = list(tensors), accelerator
        self.starts, self.size = aligned_offsets([t.numel() * t.element_size() for t in self.tensors])
        self.chunks: list[tuple[int, Tensor]] = []  # where each begins in the whole, and its bytes on the host
        self.home: list[Tensor] = []
        bounds, first = [*self.starts, self.size], 0
        for end in range(1, len(bounds)):
            if end == len(self.tensors) or bounds[end + 1] - bounds[first] > CHUNK:
                self._gather(first, end, bounds[end])
                first = end

    def _gather(self, first: int, end: int, stop: int) -> None:
        """Bring tensors first ... end - 1 into one host buffer; what they were in can go at once."""
        base = self.starts[first]
        host = self.accelerator.host(stop - base)
        self.chunks.append((base, host))
        for tensor, start in zip(self.tensors[first:end], self.starts[first:end], strict=True):
            view = _view(host, start - base, tensor)
            view.copy_(tensor.detach())
            tensor.data = view
            self.home.append(view)

    def fetch(self, buffer: Tensor, after: Any) -> Any:
        """Begin to copy into `buffer` once `after` is done; the mark of the end."""
        for start, host in self.chunks:
            after = self.accelerator.copy(buffer[start : start + len(host)], host, after)
        return after

    def point(self, buffer: Tensor) -> None:
        """Let the tensors be what lies in `buffer`. Their identities and version counters stay."""
        for tensor, start in zip(self.tensors, self.starts, strict=True):
            tensor.data = _view(buffer, start, tensor)

    def enter(self) -> None:
        """Be on the accelerator, in a buffer that lives as long as the tensors point there."""
        buffer = self.accelerator.empty(self.size)
        self.accelerator.wait(self.fetch(buffer, self.accelerator.mark()))
        self.point(buffer)

    def leave(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = home


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class BlockStreamer:
    """Blocks that pass through `SLOTS` buffers, each in its own forward pass, while the next one is on its way."""

    def __init__(self, blocks: Sequence[nn.Module], packs: Sequence[TensorGroup], accelerator: Accelerator) -> None:
        self.packs, self.accelerator = list(packs), accelerator
        self.slots: list[Tensor] = []
        self.ready: dict[int, tuple[int, Any]] = {}  # block -> its slot, and when it is there
        self.done: list[Any] = []  # slot -> when its last reader is through
        self.hooks = [
            hook
            for n, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(partial(self._before, n)),
                block.register_forward_hook(partial(self._after, n), always_call=True),
            )
        ]
        self.working = False

    def _before(self, n: int, *_: Any) -> None:
        if not self.working:
            return
        if not self.slots:
            size = max(pack.size for pack in self.packs)
            self.slots = [self.accelerator.empty(size) for _ in range(SLOTS)]
            self.done = [self.accelerator.mark()] * SLOTS
        if n not in self.ready:
            self.ready.clear()
            self._fetch(n, 0)
        slot, there = self.ready[n]
        self.accelerator.wait(there)
        self.packs[n].point(self.slots[slot])
        following = (n + 1) % len(self.packs)
        if following not in self.ready:
            self._fetch(following, 1 - slot)

    def _fetch(self, n: int, slot: int) -> None:
        pack = self.packs[n]
        self.ready = {k: v for k, v in self.ready.items() if v[0] != slot}
        self.ready[n] = slot, pack.fetch(self.slots[slot], self.done[slot])

    def _after(self, n: int, *_: Any) -> None:
        if self.working and n in self.ready:
            self.packs[n].leave()
            self.done[self.ready[n][0]] = self.accelerator.mark()

    def leave(self) -> None:
        """Drop the slots; a copy under way is waited for, or it would write into what others get next."""
        for _, there in self.ready.values():
            self.accelerator.wait(there)
        self.working = False
        self.slots, self.done = [], []
        self.ready.clear()


class OffloadedModule:
    """One part of a pipeline under a plan."""

    def __init__(self, module: Any, how: str, idles: bool, accelerator: Accelerator) -> None:
        self.depth = 0
        self.packs: list[TensorGroup] = []
        self.visitors: dict[int, TensorGroup] = {}  # by the id of an idle module
        self.stream: BlockStreamer | None = None
        if how == "host":
            module.to("cpu")
            return
        rest, blocks, idle = split(module, how == "streams", idles)
        if idle:
            packs = [TensorGroup(tensors, accelerator) for tensors in idle]
            self.visitors = {id(m): pack for m, pack in zip(module.unused_modules(), packs, strict=True)}
        if blocks:
            self.stream = BlockStreamer(
                module.blocks(), [TensorGroup(tensors, accelerator) for tensors in blocks], accelerator
            )
        if how != "stays":
            self.packs = [TensorGroup(rest, accelerator)]
            return
        for tensor in rest:
            tensor.data = accelerator.put(tensor.data)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The time in which the part works, on the accelerator unless it is the host's."""
        self.depth += 1
        try:
            if self.depth == 1:
                for pack in self.packs:
                    pack.enter()
                if self.stream is not None:
                    self.stream.working = True
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                if self.stream is not None:
                    self.stream.leave()
                for pack in self.packs:
                    pack.leave()

    @contextmanager
    def temporarily_on_device(self, module: nn.Module) -> Iterator[None]:
        """The time in which an idle module's weights are on the accelerator."""
        pack = self.visitors.get(id(module))
        if pack is not None:
            pack.enter()
        try:
            yield
        finally:
            if pack is not None:
                pack.leave()

    def remove(self) -> None:
        for hook in self.stream.hooks if self.stream is not None else ():
            hook.remove()


@frozen
class Workload:
    """What a drawing asks of the accelerator beside the weights."""

    size: tuple[int, int] = (1024, 1024)  # px, height x width
    cell: int = 16  # px that a latent cell is wide
    batch: int = 1  # pictures at once
    tokens: int = 415  # of the longest prompt: the published limit
    steps: int = 20


@frozen
class MemoryEstimate:
    """What a plan comes to, in bytes. Weights are exact, and `work` (activations and the like) is estimated."""

    plan: str
    how: Mapping[str, str]  # part -> stays, visits, streams or host
    there: Mapping[str, int]  # part -> on the accelerator while it works
    host: Mapping[str, int]  # part -> on the host
    weights: Mapping[str, int]  # phase -> all weights on the accelerator in it, at most
    work: Mapping[str, int]  # phase -> beside them

    @property
    def peaks(self) -> dict[str, int]:
        """Phase -> the most that the accelerator holds in it."""
        return {phase: self.weights[phase] + self.work[phase] for phase in self.weights}

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)


def estimate_memory(
    plan: str, modules: Mapping[str, Any], load: Workload, weigh: Callable[[Tensor], int] | None = None
) -> MemoryEstimate:
    """What `plan` comes to for these parts, which may be on the meta device. `weigh`: tensor -> bytes, if not its own.

    Estimates come from the parts: `activation_bytes(workload)`; a part without it is counted by its weights alone.
    """
    size = weigh or (lambda tensor: tensor.numel() * tensor.element_size())

    def total(tensors: Iterable[Tensor]) -> int:
        return aligned_offsets(size(t) for t in tensors)[1]

    chosen, idles = find(plan), plan != "none"
    how = {part: chosen[part] for part in PHASES if part in modules}
    always: int = 0
    there, host, comes, work = {}, {}, {}, {}
    for part, module in modules.items():
        mode = how[part]
        rest, blocks, idle = split(module, mode == "streams", idles and mode != "host")
        sizes = [total(tensors) for tensors in (rest, *blocks)]
        away = sum(total(tensors) for tensors in idle)
        turn = max((total(t) for t in idle), default=0) if hasattr(module, "precomputed") else 0
        slots = SLOTS * max(sizes[1:], default=0)
        there[part] = 0 if mode == "host" else sizes[0] + max(slots, turn)
        host[part] = away + (0 if mode == "stays" else sum(sizes))
        always += sizes[0] if mode == "stays" else 0
        comes[part] = there[part] - (sizes[0] if mode == "stays" else 0)
        work[part] = (
            0 if mode == "host" or not hasattr(module, "activation_bytes") else int(module.activation_bytes(load))
        )
    return MemoryEstimate(
        plan, how, there, host,
        {PHASES[part]: always + comes[part] for part in how}, {PHASES[part]: work[part] for part in how},
    )  # fmt: skip


def find(plan: str) -> dict[str, str]:
    """Part -> how it is kept under `plan`. Raises ConfigError for a name that is none."""
    if plan not in PLANS:
        raise ConfigError(f"no offload plan is called {plan!r}.{did_you_mean(plan, [*PLANS, 'auto'])}")
    return PLANS[plan]


RESERVE = 512 << 20  # bytes that are left free: workspaces of libraries, and holes between tensors


def choose(
    modules: Mapping[str, Any], load: Workload, free: int | None, weigh: Callable[[Tensor], int] | None = None
) -> MemoryEstimate:
    """The fastest plan that fits into `free` bytes, or the smallest if none does; `none` where nobody knows."""
    if free is None:
        return estimate_memory("none", modules, load, weigh)
    each = [estimate_memory(plan, modules, load, weigh) for plan in PLANS]
    return next((f for f in each if f.peak + RESERVE <= free), min(each, key=lambda f: f.peak))


def describe(told: MemoryEstimate, device: str, free: int | None = None) -> str:
    """The plan as a table for people, in GB (10^9 bytes)."""
    room = "" if free is None else f", {free / 1e9:.2f} GB free"
    lines = [f"offload: {told.plan} ({device}{room})", f"  {'':14}{'':9}{'there, GB':>12}{'host, GB':>12}"]
    for part, mode in told.how.items():
        lines.append(f"  {part:14}{mode:9}{told.there[part] / 1e9:12.3f}{told.host[part] / 1e9:12.3f}")
    for phase, peak in told.peaks.items():
        about = f"{told.weights[phase] / 1e9:.3f} weights, about {told.work[phase] / 1e9:.3f} beside them"
        lines.append(f"  peak: {phase:8}         {peak / 1e9:12.3f}  ({about})")
    if free is not None and told.peak + RESERVE > free:
        lines.append("  this may not fit: draw smaller pictures, or fewer at once")
    return "\n".join(lines)


class OffloadManager:
    """The parts of a pipeline, kept as a plan says."""

    def __init__(
        self, told: MemoryEstimate, modules: Mapping[str, Any], accelerator: Accelerator, free: int | None, auto: bool
    ) -> None:
        self.told, self.free, self.auto = told, free, auto  # bytes that were free before; was the plan chosen here?
        self.parts = {
            part: OffloadedModule(modules[part], mode, told.plan != "none", accelerator)
            for part, mode in told.how.items()
        }

    def remove(self) -> None:
        """Let go: weights stay where they are just now."""
        for part in self.parts.values():
            part.remove()
