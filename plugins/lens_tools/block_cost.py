"""`lens bench block`: what one guided step costs in one block, counted: launches, bytes of elementwise work, copies.

Counted on the meta device, which runs what a GPU would, without numbers: operators that compute are launches, views are
free. `port` is the published arithmetic, padded and masked, `lens` ours, and `compiled` ours after Inductor's fusion.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import asdict, field, frozen
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lens_core import flow
from lens_core.catalog import Catalog
from lens_core.types import ConfigError, LensError, TextFeatures
from lens_core.validators import integer
from lens_tools import gpu_latency
from lens_tools.plain_port import PlainPort, guided_batch

MATRIX = ("mm", "bmm", "addmm", "linear", "_scaled_dot_product", "scaled_dot_product", "convolution", "matmul", "mkl")
FUSED = ("linear", "rms_norm", "layer_norm", "scaled_dot_product_attention")
COPIES = ("clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "masked_fill", "_reshape_copy")
"""The parts of an operator's name by which it is a matrix product (or attention), or a copy."""


@frozen
class BlockRequest:
    """One block of the published width, at a picture of `size` px with `tokens` of text."""

    size: tuple[int, int] = (512, 512)
    tokens: int = field(default=200, validator=integer(at_least=1))
    compiled: bool = True
    small: bool = False


@frozen
class Cost:
    """What a guided step of one block costs."""

    launches: int
    matrix: int  # of them, matrix products and attention
    copies: int  # of them, copies: cat, pad, clone, casts
    elementwise_bytes: int  # read and written by what is neither


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts operators that compute, by name, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func.is_view or (outputs and all(_aliases(o, inputs) for o in outputs) and not name.endswith("_")):
            return out
        self.count(name, inputs, outputs)
        return out

    def count(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Count one launch."""
        if outputs:
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))


class OneKernel(TorchFunctionMode):
    """Counts functions that are one kernel on a GPU as one, though on the meta device they are several operators."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in FUSED or self.counting.paused:
            return func(*args, **(kwargs or {}))
        self.counting.paused = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.counting.paused = False
        self.counting.count(name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], [out])
        return out


def _aliases(out: Tensor, inputs: Iterable[Tensor]) -> bool:
    # Not by address, which is 0 on the meta device.
    return any(out.untyped_storage()._cdata == t.untyped_storage()._cdata for t in inputs)


def cost(calls: Counter[str], moved: Counter[str]) -> Cost:
    """The cost of counted operators."""
    kinds = {name: _kind(name) for name in calls}
    total = {kind: sum(n for name, n in calls.items() if kinds[name] == kind) for kind in ("matrix", "copy", "other")}
    return Cost(
        sum(calls.values()), total["matrix"], total["copy"],
        sum(size for name, size in moved.items() if kinds[name] != "matrix"),
    )  # fmt: skip


def _kind(name: str) -> str:
    if name in COPIES:
        return "copy"
    return "matrix" if any(part in name for part in MATRIX) else "other"


def measure(request: BlockRequest, catalog: Catalog) -> dict[str, Any]:
    """Costs by way, and the operators of each. A step of two blocks less one of one block is what a block costs."""
    for length in request.size:
        if length < 16 or length % 16:
            raise ConfigError(f"size: {length} px is no multiple of 16")
    figures: dict[str, Any] = {"settings": asdict(request) | {"device": "meta", "torch": torch.__version__}}
    figures["ways"], figures["operators"] = {}, {}
    for way in ("port", "lens"):
        one, two = (_counted(request, catalog, depth, way) for depth in (2, 3))
        calls, moved = two.calls - one.calls, two.bytes - one.bytes
        figures["ways"][way] = asdict(cost(calls, moved))
        figures["operators"][way] = dict(calls.most_common())
    if request.compiled:
        figures["ways"]["compiled"] = asdict(_fused(request, catalog))
    return figures


def _step(
    request: BlockRequest, catalog: Catalog, depth: int, device: torch.device
) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """A backbone of `depth` blocks in bfloat16, and guided steps of the port and of ours with it."""
    with device:
        less = (gpu_latency.SMALL["backbone"] if request.small else {}) | {"num_layers": depth}
        net: Any = gpu_latency.component(catalog, "backbone", True, less)[0]
    net = net.to(torch.bfloat16).eval().requires_grad_(False)
    channels, layers, width = net.takes()
    host = torch.ones(1, 20 if request.small else request.tokens, dtype=torch.bool)
    features = torch.zeros(1, layers, host.shape[1], width, dtype=torch.bfloat16, device=device)
    text = TextFeatures(features, host.to(device), host)
    both = TextFeatures.cat([TextFeatures.empty(1, layers, width, features), text])
    size = request.size[0] // 16, request.size[1] // 16
    x = torch.zeros(1, channels, *size, dtype=torch.bfloat16, device=device)
    t = flow.at(0.7, x)

    def port(model: Any) -> Any:
        return PlainPort(model)(*guided_batch(x, t, text))

    def lens(model: Any) -> Any:
        with model.precomputed(torch.tensor([0.7])):
            return model(torch.cat([x, x]), flow.twice(t), both)  # as guided_velocity calls it on a GPU

    return net, port, lens


@torch.no_grad()
def _counted(request: BlockRequest, catalog: Catalog, depth: int, way: str) -> Counting:
    # On the meta device what a GPU would run is run, and no number is computed.
    net, port, lens = _step(request, catalog, depth, torch.device("meta"))
    run = port if way == "port" else lens
    run(net)  # tables of positions and of modulation are made once
    counting = Counting()
    with OneKernel(counting), counting:
        run(net)
    return counting


def _fused(request: BlockRequest, catalog: Catalog) -> Cost:
    """What Inductor makes of a block in the middle: its scheduler's kernels, and the bytes that they read and write."""
    net, _, lens = _step(request, catalog, 2, torch.device("cpu"))
    block: Any = net.transformer_blocks[0]
    calls: list[tuple[Any, ...]] = []
    hook = block.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    lens(net)
    hook.remove()
    # On a GPU blocks get the real and imaginary parts of rotations; a CPU's complex product says nothing of them.
    real = [
        tuple(torch.view_as_real(a) if isinstance(a, Tensor) and a.is_complex() else a for a in arguments)
        for arguments in calls
    ]
    nodes = [node for arguments in real for node in _schedule(block, arguments)]
    return Cost(
        len(nodes), sum(extern for extern, _ in nodes), 0, sum(size for extern, size in nodes if not extern)
    )  # fmt: skip


@torch.no_grad()
def _schedule(block: Any, arguments: tuple[Any, ...]) -> list[tuple[bool, int]]:
    """Compile a block -> for each of its kernels, whether it is a library's, and its bytes."""
    import torch._dynamo
    from torch._inductor import config, metrics

    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")  # at this level bytes are counted
    level, propagates = log.level, log.propagate
    torch._dynamo.reset()
    metrics.reset()
    try:
        log.setLevel(logging.INFO)
        log.propagate = False
        with config.patch(force_disable_caches=True):
            compiled: Any = torch.compile(block, dynamic=False)
            compiled(*arguments)
    finally:
        log.setLevel(level)
        log.propagate = propagates
    if not metrics.nodes_num_elem:
        raise LensError("this version of torch does not count the bytes of compiled kernels; use --no-compile")
    # Of an operator with several outputs, each output is a node of its own, which launches nothing.
    kernels = [(n, count) for n, count in metrics.nodes_num_elem if type(n.node).__name__ != "MultiOutput"]
    return [(bool(node.is_extern()), 4 * count) for node, count in kernels]


def table(figures: dict[str, Any]) -> str:
    """The costs as Markdown."""
    lines = ["| way | launches | matrix products and attention | copies | elementwise, MB |", "|---|---|---|---|---|"]
    for way, a in figures["ways"].items():
        size = f"{a['elementwise_bytes'] / 1e6:.1f}"
        lines.append(f"| {way} | {a['launches']} | {a['matrix']} | {a['copies']} | {size} |")
    for way, operators in figures["operators"].items():
        lines.append(f"\n{way}: " + ", ".join(f"{name} {count}" for name, count in operators.items()))
    return "\n".join(lines)
