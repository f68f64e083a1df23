"""`lens bench train`: what a training step of a recipe's backbone costs, by part, with random weights and random data.

The step is that of flow matching: the mean over samples of the mean squared error of a velocity, backward, clipping and
AdamW. Every way of batching works through the same samples of several sizes, and none is timed before its gradient
agrees with that of the bucketed one.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, Recipe, build
from lens_core.training.memory_estimate import on_meta
from lens_core.training.throughput import peak
from lens_core.types import ConfigError, TextFeatures
from lens_core.validators import integer

MAX_GRADIENT_DISTANCE = {"fp32": 1e-5, "bf16": 5e-2}
"""How far a way's gradient may be from the bucketed one in float32, relative."""
PARTS = ("data", "forward", "backward", "optimizer")
WARM_UP = 2  # rounds that are not counted


@frozen
class SpeedRequest:
    """What to time: a backbone of `depth` blocks, and a step of `samples` images with about `tokens` text tokens."""

    depth: int = field(default=2, validator=integer(at_least=1))
    samples: int = field(default=12, validator=integer(at_least=1))
    tokens: int = field(default=164, validator=integer(at_least=1))
    shrink: int = field(default=1, validator=integer(at_least=1))  # divides the sides of every size
    repeats: int = field(default=5, validator=integer(at_least=5))
    compiled: bool = True
    device: str = "auto"


@frozen
class Samples:
    """Clean latents [C,h,w], noise and a time for each, and their texts."""

    latents: list[Tensor]
    noises: list[Tensor]
    t: Tensor
    text: TextFeatures


@frozen
class Variant:
    """One way to go through the samples: `packs` are the indices of each call of the backbone."""

    net: nn.Module
    packs: list[list[int]]
    packed: bool
    optimizer: Any


@frozen
class SpeedReport:
    """What was measured. Seconds are medians; ratios are of whole steps, above 1 where the second is faster."""

    settings: dict[str, Any]
    agreement: dict[str, float] = field(factory=dict)  # relative distance of the gradient
    void: dict[str, str] = field(factory=dict)  # variants whose figures do not count, and why
    variants: dict[str, dict[str, float | None]] = field(factory=dict)
    ratios: dict[str, dict[str, float]] = field(factory=dict)


@frozen
class _Workload:
    """The samples of one step by shape: latent grids, text lengths, FLOPs of a forward, and how to make them."""

    grids: list[tuple[int, int]]
    lengths: list[int]
    work: np.ndarray[Any, Any] | None  # FLOPs of a forward, by sample; None where the backbone cannot tell
    channels: int
    layers: int
    width: int  # of text features
    device: torch.device

    def draw(self, seed: int) -> Samples:
        """Random samples of these shapes."""
        rng = torch.Generator().manual_seed(seed)
        count, longest = len(self.grids), max(self.lengths)
        text = torch.randn(count, self.layers, longest, self.width, generator=rng)
        mask = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        latents, noises = (
            [torch.randn(self.channels, *grid, generator=rng).to(self.device) for grid in self.grids] for _ in range(2)
        )
        t = torch.rand(count, generator=rng)
        return Samples(latents, noises, t.to(self.device), TextFeatures(text, mask).to(self.device))


def measure(recipe: Recipe, catalog: Catalog, request: SpeedRequest) -> SpeedReport:
    """Time a training step of a recipe's backbone: packed against bucketed, compiled, checkpointed.

    Raises ConfigError where the recipe does not say the sizes of its parts or of its images.
    """
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if request.device == "auto" else request.device
    )
    pipeline, _ = on_meta(recipe, catalog)
    for kind in ("vae", "text_encoder", "backbone"):
        if getattr(pipeline, kind) is None:
            raise ConfigError(f"$.pipeline.{kind}: missing, so its sizes are not known; name one, or a start")
    spec: ComponentSpec = pipeline.specs["backbone"]
    spec = ComponentSpec(spec.use, {**spec.options, "num_layers": request.depth})
    _, cls, config = build(catalog, "backbone", spec, "$.backbone")
    with device:
        net = cls(config)
    net = randomised(net, recipe.seed)  # outside, or random numbers of the host would be asked of the device
    sizes = _sizes(recipe, catalog, pipeline.vae.downscale * request.shrink)
    workload = _workload(recipe, request, pipeline, net, sizes, device)
    variants = _variants(net, workload, request.compiled)
    settings = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": recipe.train.precision,
        "depth": request.depth, "width": getattr(config, "width", None), "latent sizes": sizes,
        "samples": request.samples, "text tokens": sorted(workload.lengths), "repeats": request.repeats,
    }  # fmt: skip
    report = SpeedReport(settings)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")

    samples = workload.draw(recipe.seed)
    _check_gradients(variants, samples, autocast, MAX_GRADIENT_DISTANCE[recipe.train.precision], report)
    sound = {name: variant for name, variant in variants.items() if name not in report.void}
    rounds = _time_rounds(sound, request.repeats, lambda n: workload.draw(recipe.seed + 3 + n), autocast, device)
    for name, parts in rounds.items():
        report.variants[name] = _figures(parts, workload, peak(device))
    _add_ratios(report, rounds, "packed" if "packed" in variants else "bucketed")
    return report


def _workload(
    recipe: Recipe, request: SpeedRequest, pipeline: Any, net: Any, sizes: list[tuple[int, int]], device: torch.device
) -> _Workload:
    grids = [sizes[i % len(sizes)] for i in range(request.samples)]
    shares = np.linspace(0.5, 1.5, request.samples)
    shares = shares[np.random.default_rng(recipe.seed).permutation(request.samples)]
    lengths = [max(1, round(request.tokens * float(share))) for share in shares]
    work = None
    if hasattr(net, "flops"):
        work = np.array([net.flops(grid, length) for grid, length in zip(grids, lengths, strict=True)], float)
    encoder = pipeline.text_encoder
    return _Workload(grids, lengths, work, pipeline.vae.channels, encoder.layers, encoder.width, device)


def _check_gradients(
    variants: dict[str, Variant], samples: Samples, autocast: Callable[[], AbstractContextManager[Any]], limit: float,
    report: SpeedReport,
) -> None:  # fmt: skip
    """Note how far each variant's gradient is from the bucketed one in float32, and which are too far."""
    reference = _gradient(variants["bucketed"], samples)
    for name, variant in variants.items():
        try:
            with autocast():
                report.agreement[name] = distance = _distance(_gradient(variant, samples), reference)
            if not distance <= limit:
                report.void[name] = f"its gradient is {distance:.2g} from that of the reference"
        except Exception as error:  # no compiler, no memory: the other ways can still be timed
            report.void[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _time_rounds(
    variants: dict[str, Variant], repeats: int, draw: Callable[[int], Samples],
    autocast: Callable[[], AbstractContextManager[Any]], device: torch.device,
) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Variant -> seconds by part, for each round. Every round times every variant once."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(-WARM_UP, repeats):
        # Forwards and backwards in turn (ABBA), so that a machine that gets slower favours none.
        for name in list(variants) if number % 2 else list(reversed(variants)):
            seconds = _step(variants[name], partial(draw, number), autocast, device)
            if number >= 0:
                rounds[name].append(seconds)
    return rounds


def _figures(rounds: list[dict[str, float]], workload: _Workload, most: float | None) -> dict[str, float | None]:
    """The figures of one variant: medians over its rounds."""
    steps = [sum(parts.values()) for parts in rounds]
    seconds = statistics.median(steps)
    # A backward pass costs two forwards.
    speed = None if workload.work is None else 3 * float(workload.work.sum()) / seconds
    return {
        "images_per_second": len(workload.grids) / seconds, "step": seconds, "least": min(steps), "most": max(steps),
        **{part: statistics.median([parts[part] for parts in rounds]) for part in PARTS},
        "flops_per_second": speed, "mfu": speed / most if speed and most else None,
    }  # fmt: skip


def _add_ratios(report: SpeedReport, rounds: dict[str, list[dict[str, float]]], base: str) -> None:
    """Ratios of steps of the same round: what slows the machine for both cancels."""
    for slow, fast in (("bucketed", "packed"), (base, "compiled"), (base, "checkpointed")):
        if slow in rounds and fast in rounds:
            pairs = [sum(a.values()) / sum(b.values()) for a, b in zip(rounds[slow], rounds[fast], strict=True)]
            report.ratios[f"{slow} / {fast}"] = {
                "median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)
            }  # fmt: skip


@torch.no_grad()
def randomised(net: nn.Module, seed: int) -> nn.Module:
    """Set every weight to a random number: a new backbone outputs 0, and zeros are multiplied faster than numbers."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=rng).to(p.device)
        p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else 1 + 0.1 * noise)
    return net.train()


def _sizes(recipe: Recipe, catalog: Catalog, cell: int) -> list[tuple[int, int]]:
    """Latent grids of the smallest, the middle and the largest size of the recipe's dataset."""
    config = build(catalog, "dataset", recipe.dataset, "$.dataset")[2] if recipe.dataset else None
    buckets = getattr(config, "buckets", None) or [getattr(config, "sizes", ())]
    grids = sorted({(max(1, h // cell), max(1, w // cell)) for group in buckets for h, w in group}, key=math.prod)
    if not grids:
        raise ConfigError("$.dataset: has no sizes of pictures; name one with buckets or with sizes")
    return [grids[i] for i in sorted({0, len(grids) // 2, len(grids) - 1})]


def _variants(net: Any, workload: _Workload, compiled: bool) -> dict[str, Variant]:
    """Bucketed: a call a size. Packed: as many calls, of equal work. The others are as the packed, if there is one."""
    grids = workload.grids
    buckets = [[i for i, grid in enumerate(grids) if grid == size] for size in dict.fromkeys(grids)]

    def optimizer(net: nn.Module) -> Any:
        # A rate of 0 costs as much as another and leaves the weights alone, so all rounds and variants are alike.
        return torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    variants = {"bucketed": Variant(net, buckets, False, optimizer(net))}
    if hasattr(net, "packed"):
        areas = [h * w + n for (h, w), n in zip(grids, workload.lengths, strict=True)]
        costs = areas if workload.work is None else workload.work.tolist()
        variants["packed"] = Variant(net, _equal_packs(costs, len(buckets)), True, variants["bucketed"].optimizer)
    base = list(variants.values())[-1]
    if hasattr(net, "enable_gradient_checkpointing"):
        other = copy.deepcopy(net)
        other.enable_gradient_checkpointing()
        variants["checkpointed"] = evolve(base, net=other, optimizer=optimizer(other))
    if compiled:
        other = copy.deepcopy(net)
        getattr(other, "compile_repeated_blocks", other.compile)()
        variants["compiled"] = evolve(base, net=other, optimizer=optimizer(other))
    return variants


def _equal_packs(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices in `count` packs of about equal cost: the dearest first, each to the cheapest pack."""
    packs: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(packs, key=lambda pack: sum(costs[i] for i in pack)).append(index)
    return [sorted(pack) for pack in packs]


def _loss(variant: Variant, samples: Samples, pack: list[int]) -> Tensor:
    """This call's part of the mean over all samples."""
    net: Any = variant.net
    t, text = samples.t[pack], TextFeatures(samples.text.features[pack], samples.text.mask[pack])
    xs = [(1 - samples.t[i]) * samples.latents[i] + samples.t[i] * samples.noises[i] for i in pack]
    vs = net.packed(xs, t, text) if variant.packed else net(torch.stack(xs), t, text)
    errors = [
        (v.float() - samples.noises[i] + samples.latents[i]).square().mean() for v, i in zip(vs, pack, strict=True)
    ]
    return torch.stack(errors).sum() / len(samples.latents)


def _gradient(variant: Variant, samples: Samples) -> list[Tensor]:
    variant.net.zero_grad()
    for pack in variant.packs:
        _loss(variant, samples, pack).backward()  # type: ignore[no-untyped-call]  # torch's
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in variant.net.parameters()]
    variant.net.zero_grad()
    return gradient


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True))
    return math.sqrt(squares / sum(float(b.double().square().sum()) for b in want))


def _step(
    variant: Variant,
    draw: Callable[[], Samples],
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each part of one step. `data` is the making of the random samples."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        output = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[part] += time.perf_counter() - start
        return output

    def forward(pack: list[int]) -> Tensor:
        with autocast():
            return _loss(variant, samples, pack)

    def learn() -> None:
        nn.utils.clip_grad_norm_(variant.net.parameters(), 1.0)
        variant.optimizer.step()

    samples = timed("data", draw)
    for pack in variant.packs:
        loss = timed("forward", partial(forward, pack))
        timed("backward", loss.backward)
    timed("optimizer", learn)
    variant.optimizer.zero_grad()
    return seconds


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(report: SpeedReport) -> str:
    """The report as Markdown."""
    settings = [f"{k} {v}" for k, v in report.settings.items()]
    head = "| variant | images/s | step, s | data | forward | backward | optimizer | GFLOP/s | MFU |"
    lines = [", ".join(settings), "", head, "|" + "---|" * 9]
    for name, a in report.variants.items():
        speed, mfu = a["flops_per_second"], a["mfu"]
        cells = [f"{a[k]:.3g}" for k in ("images_per_second", "step", *PARTS)]
        cells += ["" if speed is None else f"{speed / 1e9:.0f}", "" if mfu is None else f"{mfu:.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| steps, s / s | median | least | most |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['median']:.2f} | {r['least']:.2f} | {r['most']:.2f} |" for n, r in report.ratios.items()]
    lines += [f"\n{name}: void, {why}" for name, why in report.void.items()]
    return "\n".join(lines)
