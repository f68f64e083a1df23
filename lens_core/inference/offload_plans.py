"""What offloading costs: the plans, what each of them takes for given parts, and the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


@frozen
class Workload:
    """What is drawn at once, from which the memory beside the weights is estimated."""

    size: tuple[int, int] = (1024, 1024)  # px, height x width
    cell: int = 16  # px that a latent cell is wide
    batch: int = 1  # pictures at once
    tokens: int = 415  # of the longest prompt: the published limit
    steps: int = 20
    guided: bool = True  # without a negative prompt: both branches of a small batch are one call

    @property
    def cells(self) -> int:
        """Latent cells of a picture."""
        return (self.size[0] // self.cell) * (self.size[1] // self.cell)


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
