"""Keep weights off the accelerator while they are not needed: whole parts, blocks that stream through, or none.

Such weights lie packed on the host, pinned where there is CUDA. They are copied to the accelerator, and dropped there
afterwards: the host's copy never changes. Pictures are bit for bit those of plan `none`, except that under
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
"""Part -> the phase of generation in which it works, in their order."""
PLANS: dict[str, dict[str, str]] = {
    "none": {"text_encoder": "stays", "backbone": "stays", "vae": "stays"},
    "modulation": {"text_encoder": "stays", "backbone": "stays", "vae": "stays"},
    "model": {"text_encoder": "visits", "backbone": "visits", "vae": "visits"},
    "encoder-cpu": {"text_encoder": "host", "backbone": "stays", "vae": "stays"},
    "block": {"text_encoder": "streams", "backbone": "streams", "vae": "visits"},
}
"""Plan -> where each part is, the fastest first. A part stays on the accelerator, visits it while it works, streams
through it block by block, or works on the host. In all but `none`, a part's `unused_modules` stay on the host."""
ALIGNMENT = 512  # bytes, at which CUDA's allocator puts tensors too: kernels choose their path by it
SLOTS = 2  # blocks on the accelerator at a time: the one that works, and the next
CHUNK = 64 << 20  # bytes of a host buffer: pinned memory is rounded up to a power of two, and few large copies are fast


class Accelerator:
    """The device that weights are copied to: asynchronously on a stream of its own with CUDA, at once elsewhere.

    A mark is a point in the work queued on the device so far (a CUDA event; None where nothing is queued).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.side: Any = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]  # torch's

    def host(self, size: int) -> Tensor:
        """Allocate `size` bytes on the host. Only pinned memory can be copied while the device computes."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        except RuntimeError:  # the system pins no more: copies from here are slower, and right all the same
            return torch.empty(size, dtype=torch.uint8)

    def empty(self, size: int) -> Tensor:
        """`size` bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, to stay."""
        return tensor.to(self.device)

    def mark(self) -> Any:
        """Mark all that has been queued until now."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def copy(self, to: Tensor, host: Tensor, after: Any) -> Any:
        """Begin to copy once `after` is done; returns the mark of the end, for `wait`."""
        if not self.cuda:
            to.copy_(host)
            return None
        with torch.cuda.stream(self.side):
            # The buffer may still be read by kernels of the main stream; overwriting it before is a silent race.
            self.side.wait_event(after)
            to.copy_(host, non_blocking=True)
            return self.side.record_event()

    def wait(self, mark: Any) -> None:
        """Let what is queued from now on begin after `mark`. The host does not wait."""
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def free(self) -> int | None:
        """Bytes that can be allocated now; None where weights are on the host anyway."""
        if not self.cuda:
            return None
        # torch's allocator keeps what was freed: the driver counts it as taken, and it can be used all the same.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused


def _new_tensors(module: nn.Module, seen: set[int]) -> list[Tensor]:
    """Parameters and buffers of `module` that are not in `seen` yet; adds them. Tied weights are counted once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
    seen |= {id(t) for t in tensors}
    return tensors


def aligned_offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Bytes of each tensor -> its offset in one buffer, and the buffer's size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def split_tensors(
    module: Any, streams: bool, skips: bool
) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
    """A part's tensors: (what works all the time, its blocks, its unused modules).

    Only parts that say so have the latter two: by `blocks()`, modules that run one after the other in this order, and
    `unused_modules()`. Unused modules come first: a tensor that is in one is in no block.
    """
    seen: set[int] = set()
    unused = (
        [_new_tensors(m, seen) for m in module.unused_modules()] if skips and hasattr(module, "unused_modules") else []
    )
    blocks = [_new_tensors(m, seen) for m in module.blocks()] if streams and hasattr(module, "blocks") else []
    return _new_tensors(module, seen), blocks, unused


class TensorGroup:
    """Tensors that are moved together: views of host buffers, or of one buffer on the accelerator meanwhile."""

    def __init__(self, tensors: Sequence[Tensor], accelerator: Accelerator) -> None:
        self.tensors, self.accelerator = list(tensors), accelerator
        self.starts, self.size = aligned_offsets([t.numel() * t.element_size() for t in self.tensors])
        self.chunks: list[tuple[int, Tensor]] = []  # where each begins in the whole, and its bytes on the host
        self.host_views: list[Tensor] = []
        bounds, first = [*self.starts, self.size], 0
        for end in range(1, len(bounds)):
            if end == len(self.tensors) or bounds[end + 1] - bounds[first] > CHUNK:
                self._gather(first, end, bounds[end])
                first = end

    def _gather(self, first: int, end: int, stop: int) -> None:
        """Pack tensors first ... end - 1 into one host buffer."""
        base = self.starts[first]
        host = self.accelerator.host(stop - base)
        self.chunks.append((base, host))
        for tensor, start in zip(self.tensors[first:end], self.starts[first:end], strict=True):
            view = _view(host, start - base, tensor)
            view.copy_(tensor.detach())
            # At once, tensor by tensor: so no second copy of all weights is ever held.
            tensor.data = view
            self.host_views.append(view)

    def copy_into(self, buffer: Tensor, after: Any) -> Any:
        """Begin to copy into `buffer` once `after` is done; return the mark of the end."""
        for start, host in self.chunks:
            after = self.accelerator.copy(buffer[start : start + len(host)], host, after)
        return after

    def point(self, buffer: Tensor) -> None:
        """Let the tensors be views of `buffer`."""
        # Setting `.data` keeps a tensor's identity, its hooks and its version counter: the prompt cache and the table
        # of modulation both ask by these whether weights have changed, and moving is no change.
        for tensor, start in zip(self.tensors, self.starts, strict=True):
            tensor.data = _view(buffer, start, tensor)

    def enter(self) -> None:
        """Move to the accelerator, into a buffer that lives as long as the tensors point there."""
        buffer = self.accelerator.empty(self.size)
        self.accelerator.wait(self.copy_into(buffer, self.accelerator.mark()))
        self.point(buffer)

    def leave(self) -> None:
        """Move back to the host. Nothing is copied: drawing never changes weights."""
        for tensor, view in zip(self.tensors, self.host_views, strict=True):
            tensor.data = view


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


class BlockStreamer:
    """Copy each block to the accelerator for its forward pass, while the one before it computes.

    There are `SLOTS` buffers, each as large as the largest block. Forward hooks do the work, so that models need not
    know of it.
    """

    def __init__(self, blocks: Sequence[nn.Module], groups: Sequence[TensorGroup], accelerator: Accelerator) -> None:
        self.groups, self.accelerator = list(groups), accelerator
        self.slots: list[Tensor] = []
        self.ready: dict[int, tuple[int, Any]] = {}  # block -> its slot, and the mark of its copy's end
        self.done: list[Any] = []  # slot -> the mark after which nothing reads it
        self.hooks = [
            hook
            for n, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(partial(self._before, n)),
                # Called after an exception too, or a block would keep pointing into a buffer that is dropped.
                block.register_forward_hook(partial(self._after, n), always_call=True),
            )
        ]
        self.active = False

    def _before(self, n: int, *_: Any) -> None:
        if not self.active:
            return
        if not self.slots:
            size = max(group.size for group in self.groups)
            self.slots = [self.accelerator.empty(size) for _ in range(SLOTS)]
            self.done = [self.accelerator.mark()] * SLOTS
        if n not in self.ready:
            # Blocks came in another order than predicted, as when only some are run: begin anew.
            self.ready.clear()
            self._prefetch(n, 0)
        slot, copied = self.ready[n]
        self.accelerator.wait(copied)
        self.groups[n].point(self.slots[slot])
        # Modulo: the last block is followed by the first, of the next pass.
        following = (n + 1) % len(self.groups)
        if following not in self.ready:
            self._prefetch(following, 1 - slot)

    def _prefetch(self, n: int, slot: int) -> None:
        group = self.groups[n]
        self.ready = {k: v for k, v in self.ready.items() if v[0] != slot}
        self.ready[n] = slot, group.copy_into(self.slots[slot], self.done[slot])

    def _after(self, n: int, *_: Any) -> None:
        if self.active and n in self.ready:
            self.groups[n].leave()
            self.done[self.ready[n][0]] = self.accelerator.mark()

    def leave(self) -> None:
        """Drop the slots; a copy under way is waited for, or it would write into what others get next."""
        for _, copied in self.ready.values():
            self.accelerator.wait(copied)
        self.active = False
        self.slots, self.done = [], []
        self.ready.clear()


class OffloadedModule:
    """One part of a pipeline under a plan. `how`: stays, visits, streams or host, as in `PLANS`."""

    def __init__(self, module: Any, how: str, skips: bool, accelerator: Accelerator) -> None:
        self.depth = 0  # of nested `at_work`s: the outermost one moves the weights
        self.groups: list[TensorGroup] = []
        self.unused_groups: dict[int, TensorGroup] = {}  # by the id of an unused module
        self.stream: BlockStreamer | None = None
        if how == "host":
            module.to("cpu")
            return
        rest, blocks, unused = split_tensors(module, how == "streams", skips)
        if unused:
            groups = [TensorGroup(tensors, accelerator) for tensors in unused]
            self.unused_groups = {id(m): group for m, group in zip(module.unused_modules(), groups, strict=True)}
        if blocks:
            self.stream = BlockStreamer(
                module.blocks(), [TensorGroup(tensors, accelerator) for tensors in blocks], accelerator
            )
        if how != "stays":
            self.groups = [TensorGroup(rest, accelerator)]
            return
        for tensor in rest:
            tensor.data = accelerator.put(tensor.data)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The time in which the part works, on the accelerator unless it is the host's."""
        self.depth += 1
        try:
            if self.depth == 1:
                for group in self.groups:
                    group.enter()
                if self.stream is not None:
                    self.stream.active = True
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                if self.stream is not None:
                    self.stream.leave()
                for group in self.groups:
                    group.leave()

    @contextmanager
    def temporarily_on_device(self, module: nn.Module) -> Iterator[None]:
        """The time in which an unused module's weights are on the accelerator."""
        group = self.unused_groups.get(id(module))
        if group is not None:
            group.enter()
        try:
            yield
        finally:
            if group is not None:
                group.leave()

    def remove(self) -> None:
        for hook in self.stream.hooks if self.stream is not None else ():
            hook.remove()


@frozen
class Workload:
    """What is drawn at once, from which the memory beside the weights is estimated."""

    size: tuple[int, int] = (1024, 1024)  # px, height x width
    cell: int = 16  # px that a latent cell is wide
    batch: int = 1  # pictures at once
    tokens: int = 415  # of the longest prompt: the published limit
    steps: int = 20


@frozen
class MemoryEstimate:
    """What a plan takes, in bytes. Weights are exact, and `work` (activations and the like) is estimated."""

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
    plan: str, modules: Mapping[str, Any], workload: Workload, weigh: Callable[[Tensor], int] | None = None
) -> MemoryEstimate:
    """Estimate what `plan` takes for these parts, which may be on the meta device. `weigh`: tensor -> its bytes.

    Estimates come from the parts: `activation_bytes(workload)`; a part without it is counted by its weights alone.
    """
    size = weigh or (lambda tensor: tensor.numel() * tensor.element_size())

    def total(tensors: Iterable[Tensor]) -> int:
        return aligned_offsets(size(t) for t in tensors)[1]

    chosen, skips = find_plan(plan), plan != "none"
    how = {part: chosen[part] for part in PHASES if part in modules}
    always: int = 0
    there, host, comes, work = {}, {}, {}, {}
    for part, module in modules.items():
        mode = how[part]
        rest, blocks, unused = split_tensors(module, mode == "streams", skips and mode != "host")
        sizes = [total(tensors) for tensors in (rest, *blocks)]
        away = sum(total(tensors) for tensors in unused)
        # With a table of modulation, unused modules are brought in one at a time to make it.
        turn = max((total(t) for t in unused), default=0) if hasattr(module, "precomputed") else 0
        slots = SLOTS * max(sizes[1:], default=0)
        there[part] = 0 if mode == "host" else sizes[0] + max(slots, turn)
        host[part] = away + (0 if mode == "stays" else sum(sizes))
        always += sizes[0] if mode == "stays" else 0
        comes[part] = there[part] - (sizes[0] if mode == "stays" else 0)
        work[part] = (
            0 if mode == "host" or not hasattr(module, "activation_bytes") else int(module.activation_bytes(workload))
        )
    return MemoryEstimate(
        plan, how, there, host,
        {PHASES[part]: always + comes[part] for part in how}, {PHASES[part]: work[part] for part in how},
    )  # fmt: skip


def find_plan(plan: str) -> dict[str, str]:
    """Part -> where it is under `plan`. Raises ConfigError for an unknown name."""
    if plan not in PLANS:
        raise ConfigError(f"no offload plan is called {plan!r}.{did_you_mean(plan, [*PLANS, 'auto'])}")
    return PLANS[plan]


RESERVE = 512 << 20  # bytes that are left free: workspaces of libraries, and holes between tensors


def choose_plan(
    modules: Mapping[str, Any], workload: Workload, free: int | None, weigh: Callable[[Tensor], int] | None = None
) -> MemoryEstimate:
    """The fastest plan that fits into `free` bytes, or the smallest if none does; `none` where `free` is not known."""
    if free is None:
        return estimate_memory("none", modules, workload, weigh)
    each = [estimate_memory(plan, modules, workload, weigh) for plan in PLANS]
    return next((f for f in each if f.peak + RESERVE <= free), min(each, key=lambda f: f.peak))


def describe_plan(estimate: MemoryEstimate, device: str, free: int | None = None) -> str:
    """The plan as a table for people, in GB (10^9 bytes)."""
    room = "" if free is None else f", {free / 1e9:.2f} GB free"
    lines = [f"offload: {estimate.plan} ({device}{room})", f"  {'':14}{'':9}{'there, GB':>12}{'host, GB':>12}"]
    for part, mode in estimate.how.items():
        lines.append(f"  {part:14}{mode:9}{estimate.there[part] / 1e9:12.3f}{estimate.host[part] / 1e9:12.3f}")
    for phase, peak in estimate.peaks.items():
        about = f"{estimate.weights[phase] / 1e9:.3f} weights, about {estimate.work[phase] / 1e9:.3f} beside them"
        lines.append(f"  peak: {phase:8}         {peak / 1e9:12.3f}  ({about})")
    if free is not None and estimate.peak + RESERVE > free:
        lines.append("  this may not fit: draw smaller pictures, or fewer at once")
    return "\n".join(lines)


class OffloadManager:
    """Keeps the parts of a pipeline as a plan says, from when it is built until `remove`.

    `requested` is the plan's name, or `auto`; `free` is how many bytes there were before.
    """

    def __init__(
        self, requested: str, modules: Mapping[str, Any], workload: Workload, accelerator: Accelerator
    ) -> None:
        self.requested, self.workload, self.accelerator = requested, workload, accelerator
        self.free = accelerator.free()
        if self.free is not None and accelerator.device.type != "cpu":
            # What the parts take there now is given back: every one of them is placed anew.
            tensors = (t for net in modules.values() for t in (*net.parameters(), *net.buffers()))
            here = accelerator.device.type
            self.free += sum(t.numel() * t.element_size() for t in tensors if t.device.type == here)
        self.estimate = (
            choose_plan(modules, workload, self.free)
            if requested == "auto"
            else estimate_memory(requested, modules, workload)
        )
        skips = self.estimate.plan != "none"
        self.parts = {
            part: OffloadedModule(modules[part], mode, skips, accelerator) for part, mode in self.estimate.how.items()
        }

    def on_host(self, part: str) -> bool:
        """Whether the plan lets a part compute on the host."""
        return PLANS[self.estimate.plan][part] == "host"

    def remove(self) -> None:
        """Let go: weights stay where they are just now."""
        for part in self.parts.values():
            part.remove()
