"""Keep weights off the accelerator while they are not needed: whole parts, blocks that stream through, or none.

Such weights lie packed on the host, pinned where there is CUDA. They are copied to the accelerator, and dropped there
afterwards: the host's copy never changes. Pictures are bit for bit those of plan `none`, except that under
`encoder-cpu` the features are rounded as a CPU rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.inference.offload_plans import (
    PHASES,
    PLANS,
    SLOTS,
    Workload,
    aligned_offsets,
    choose_plan,
    estimate_memory,
    split_tensors,
)
from lens_core.types import ConfigError

CHUNK = 64 << 20  # bytes of a host buffer: pinned memory is rounded up to a power of two, and few large copies are fast


class Accelerator:
    """The device that weights are copied to: asynchronously on a stream of its own with CUDA, at once elsewhere.

    A mark is a point in the work queued on the device so far (a CUDA event; None where nothing is queued).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # "cuda" would mean another GPU as soon as a caller makes another one the current one.
        index = torch.cuda.current_device() if self.cuda and device.index is None else device.index
        self.device = torch.device(device.type, index)
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

    def join(self) -> None:
        """Let what is queued from now on begin after every copy that was begun."""
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_stream(self.side)

    def settle(self) -> None:
        """Wait, on the host, for every copy that was begun: the host's memory may be written afterwards."""
        if self.cuda:
            self.side.synchronize()

    def free(self) -> int | None:
        """Bytes that can be allocated now; None where weights are on the host anyway."""
        if not self.cuda:
            return None
        # torch's allocator keeps what was freed: the driver counts it as taken, and it can be used all the same.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused


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
        try:
            self.copy_into(buffer, self.accelerator.mark())
        finally:
            # After Ctrl-C, too: the buffer is dropped then, and a copy would write into what gets its memory next.
            self.accelerator.join()
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
        # A compiled block calls its hooks, which move weights between streams: they are not to be compiled with it.
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)  # type: ignore[no-untyped-call]  # torch's
        self.hooks = [
            hook
            for n, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(partial(before, n)),
                # Called after an exception too, or a block would keep pointing into a buffer that is dropped.
                block.register_forward_hook(partial(after, n), always_call=True),
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
        self.accelerator.join()
        self.active = False
        for n in self.ready:
            # torch calls no hook after a KeyboardInterrupt: the block that it ended still points into its slot.
            self.groups[n].leave()
        self.slots, self.done = [], []
        self.ready.clear()


class OffloadedModule:
    """One part of a pipeline under a plan. `how`: stays, visits, streams or host, as in `PLANS`."""

    def __init__(self, module: Any, how: str, skips: bool, accelerator: Accelerator) -> None:
        self.module = module
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

    @property
    def temporarily_moved(self) -> bool:
        """Whether its weights are on the accelerator for a time, and the host's copy comes back afterwards."""
        return self.depth > 0 and bool(self.groups)

    def remove(self) -> None:
        """Let go of the weights, where they are just now."""
        if self.stream is not None:
            self.stream.leave()
            for hook in self.stream.hooks:
                hook.remove()
        # An `at_work` may still be open, in a generator that an exception left behind: it must move nothing later.
        self.stream, self.groups = None, []


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
            self.free += sum(t.numel() * t.element_size() for t in tensors if t.device == accelerator.device)
        self.estimate = (
            choose_plan(modules, workload, self.free)
            if requested == "auto"
            else estimate_memory(requested, modules, workload)
        )
        self.parts: dict[str, OffloadedModule] = {}
        self._place(modules)

    def _place(self, modules: Mapping[str, Any]) -> None:
        """Put those of `modules` under the plan that are not yet."""
        plan, new = self.estimate.plan, [part for part in PHASES if part in modules and part not in self.parts]
        try:
            for part in new:
                self.parts[part] = OffloadedModule(modules[part], PLANS[plan][part], plan != "none", self.accelerator)
        except BaseException:  # out of memory, say: no hook may stay behind
            self.remove(new)
            raise

    def extended(self, modules: Mapping[str, Any], placed: Iterable[OffloadedModule]) -> OffloadManager:
        """The same plan for a pipeline with other parts, of which some are `placed` under it already."""
        known = {id(part.module): part for part in placed}
        other = copy.copy(self)
        other.parts = {part: known[id(module)] for part, module in modules.items() if id(module) in known}
        other._place(modules)
        return other

    def without(self, part: str) -> OffloadManager:
        """The same plan for a pipeline that no longer has `part`, which stays under the plan of others."""
        other = copy.copy(self)
        other.parts = {name: held for name, held in self.parts.items() if name != part}
        return other

    def on_host(self, part: str) -> bool:
        """Whether the plan lets a part compute on the host."""
        return PLANS[self.estimate.plan][part] == "host"

    def check_editable(self, part: str) -> None:
        """Raise ConfigError while a part's weights are on the accelerator for a time: a change there is lost when the
        host's copy comes back. Waits for copies under way, or they would read half of a change."""
        if part in self.parts and self.parts[part].temporarily_moved:
            raise ConfigError(
                f"weights of the {part} cannot change while it works under the offload plan {self.estimate.plan}; "
                "change LoRAs between two calls, or use the plan none"
            )
        self.accelerator.settle()

    def remove(self, parts: Iterable[str] | None = None) -> None:
        """Let go of the named parts, or of all: weights stay where they are just now."""
        for part in self.parts if parts is None else parts:
            if part in self.parts:
                self.parts[part].remove()
