"""`lens bench train`: what a training step of a recipe's backbone costs, by part, with random weights and random data.

The step is that of flow matching: the mean over samples of the mean squared error of a velocity, backward, clipping and
AdamW. Every arm works through the same samples of several sizes, and none is timed before its gradient agrees.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from attrs import asdict, evolve, field, frozen
from cyclopts import Parameter
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, Recipe, build, read_recipe
from lens_core.training.memory_estimate import on_meta
from lens_core.training.throughput import peak
from lens_core.types import ConfigError, TextFeatures
from lens_data.packing import flops, share

NEAR = {"fp32": 1e-5, "bf16": 5e-2}
"""How far an arm's gradient may be from the bucketed one in float32, relative."""
PARTS = ("data", "forward", "backward", "optimizer")


@frozen
class Samples:
    """Clean latents [C,h,w], noise and a time for each, and their texts."""

    zs: list[Tensor]
    noises: list[Tensor]
    t: Tensor
    text: TextFeatures


@frozen
class Arm:
    """One way to go through the samples: `packs` are the indices of each call."""

    net: nn.Module
    packs: list[list[int]]
    packed: bool
    optimizer: Any


@frozen
class Report:
    """What was measured. Seconds are medians; ratios are of whole steps, above 1 where the second is faster."""

    settings: dict[str, Any]
    agreement: dict[str, float] = field(factory=dict)  # relative distance of the gradient
    void: dict[str, str] = field(factory=dict)  # arms whose figures do not count, and why
    arms: dict[str, dict[str, float | None]] = field(factory=dict)
    ratios: dict[str, dict[str, float]] = field(factory=dict)


def train(
    recipe: Path,
    *,
    depth: int = 2,
    samples: int = 12,
    tokens: int = 164,
    shrink: int = 1,
    repeats: int = 5,
    compile: bool = True,
    device: str = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Time a training step of a recipe's backbone, by part: packed against bucketed, compiled, checkpointed.

    Parameters
    ----------
    recipe
        The YAML file; its pipeline, its dataset's sizes and its precision count.
    depth
        How many blocks the backbone has; its other sizes are those of the recipe.
    samples
        Pictures a step, spread over three sizes of the dataset.
    tokens
        Text tokens a picture in the mean; they are spread from half to one and a half of it.
    shrink
        Divide the sides of every size by this.
    repeats
        Rounds that are timed, in each of which every way has its turn; at least 5.
    compile
        Time a compiled backbone too.
    device
        auto, cpu, cuda, cuda:1 …
    json_
        Print one JSON object instead of tables.
    """
    if min(depth, samples, tokens, shrink) < 1 or repeats < 5:
        raise ConfigError(
            f"depth, samples, tokens and shrink must be at least 1 and repeats at least 5, "
            f"not {depth}, {samples}, {tokens}, {shrink} and {repeats}"
        )
    catalog = Catalog.installed()
    report = measure(
        read_recipe(recipe, catalog), catalog, depth=depth, samples=samples, tokens=tokens, shrink=shrink,
        repeats=repeats, compiled=compile, device=device,
    )  # fmt: skip
    print(json.dumps(asdict(report)) if json_ else table(report))
    return 1 if report.void else 0


def measure(
    recipe: Recipe, catalog: Catalog, *, depth: int, samples: int, tokens: int, shrink: int, repeats: int,
    compiled: bool, device: str = "auto",
) -> Report:  # fmt: skip
    """See `train`."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    pipeline, _ = on_meta(recipe, catalog)
    for kind in ("vae", "text_encoder", "backbone"):
        if getattr(pipeline, kind) is None:
            raise ConfigError(f"$.pipeline.{kind}: missing, so its sizes are not known; name one, or a start")
    use: ComponentSpec = pipeline.specs["backbone"]
    _, cls, config = build(
        catalog, "backbone", ComponentSpec(use.use, {**use.options, "num_layers": depth}), "$.backbone"
    )
    with place:
        net = randomised(cls(config), recipe.seed)
    sizes = _sizes(recipe, catalog, pipeline.vae.downscale * shrink)
    grids = [sizes[i % len(sizes)] for i in range(samples)]
    words = np.linspace(0.5, 1.5, samples)[np.random.default_rng(recipe.seed).permutation(samples)]
    lengths = [max(1, round(tokens * float(w))) for w in words]
    width = getattr(config, "width", None)
    counts = np.array([h * w + n for (h, w), n in zip(grids, lengths, strict=True)], float)
    work = flops(counts, width, depth) if width else counts
    arms = _arms(net, recipe, grids, work, compiled)
    settings = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": recipe.train.precision,
        "depth": depth, "width": width, "latent sizes": sizes, "samples": samples, "text tokens": sorted(lengths),
        "repeats": repeats,
    }  # fmt: skip
    report = Report(settings)

    def draw(seed: int) -> Samples:
        rng = torch.Generator().manual_seed(seed)
        encoder, channels = pipeline.text_encoder, pipeline.vae.channels
        text = torch.randn(samples, encoder.layers, max(lengths), encoder.width, generator=rng)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        pictures = [[torch.randn(channels, *grid, generator=rng).to(place) for grid in grids] for _ in range(2)]
        t = torch.rand(samples, generator=rng)
        return Samples(pictures[0], pictures[1], t.to(place), TextFeatures(text, mask).to(place))

    def half() -> AbstractContextManager[Any]:
        return torch.autocast(place.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")

    first = draw(recipe.seed)
    want = _gradient(arms["bucketed"], first)
    for name, arm in arms.items():
        try:
            with half():
                report.agreement[name] = apart = _distance(_gradient(arm, first), want)
            if not apart <= NEAR[recipe.train.precision]:
                report.void[name] = f"its gradient is {apart:.2g} from that of the reference"
        except Exception as error:  # no compiler, no memory: the other ways can still be timed
            report.void[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    sound = {name: arm for name, arm in arms.items() if name not in report.void}
    took: dict[str, list[dict[str, float]]] = {name: [] for name in sound}
    for turn in range(-2, repeats):  # two to warm up
        order = list(sound) if turn % 2 else list(reversed(sound))  # ABBA
        for name in order:
            parts = _step(sound[name], lambda turn=turn: draw(recipe.seed + 3 + turn), half, place)
            if turn >= 0:
                took[name].append(parts)
    most = peak(place)
    for name, rounds in took.items():
        whole = [sum(parts.values()) for parts in rounds]
        seconds = statistics.median(whole)
        speed = 3 * float(work.sum()) / seconds if width else None
        report.arms[name] = {
            "images_per_second": samples / seconds, "step": seconds, "least": min(whole), "most": max(whole),
            **{part: statistics.median([r[part] for r in rounds]) for part in PARTS},
            "flops_per_second": speed, "mfu": speed / most if speed and most else None,
        }  # fmt: skip
    base = "packed" if "packed" in arms else "bucketed"
    for slow, fast in (("bucketed", "packed"), (base, "compiled"), (base, "checkpointed")):
        if slow in took and fast in took:
            pairs = [sum(a.values()) / sum(b.values()) for a, b in zip(took[slow], took[fast], strict=True)]
            report.ratios[f"{slow} / {fast}"] = {
                "median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)
            }  # fmt: skip
    return report


@torch.no_grad()
def randomised(net: nn.Module, seed: int) -> nn.Module:
    """Every weight random, none 0: a new backbone answers 0, and zeros are multiplied faster than numbers."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        noise = torch.randn(p.shape, generator=rng).to(p.device)
        p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else 1 + 0.1 * noise)
    return net.train()


def _sizes(recipe: Recipe, catalog: Catalog, cell: int) -> list[tuple[int, int]]:
    """Latent grids of the smallest, the middle and the largest size of the recipe's dataset."""
    config = build(catalog, "dataset", recipe.dataset, "$.dataset")[2] if recipe.dataset else None
    buckets = getattr(config, "buckets", None) or [getattr(config, "sizes", ())]
    found = sorted({(max(1, h // cell), max(1, w // cell)) for group in buckets for h, w in group}, key=math.prod)
    if not found:
        raise ConfigError("$.dataset: tells no sizes of pictures; name one with buckets or with sizes")
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})]


def _arms(
    net: Any, recipe: Recipe, grids: Sequence[tuple[int, int]], work: Any, compiled: bool
) -> dict[str, Arm]:  # fmt: skip
    """Bucketed: a call a size. Packed: as many calls, of equal work. The others are as the packed, if there is one."""
    buckets = [[i for i, grid in enumerate(grids) if grid == size] for size in dict.fromkeys(grids)]

    def optimizer(net: nn.Module) -> Any:
        # A rate of 0 costs as much as another and leaves the weights alone, so all rounds and ways are alike.
        return torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    arms = {"bucketed": Arm(net, buckets, False, optimizer(net))}
    if hasattr(net, "packed"):
        arms["packed"] = Arm(net, share(work, len(buckets)), True, arms["bucketed"].optimizer)
    base = list(arms.values())[-1]
    if hasattr(net, "enable_gradient_checkpointing"):
        other = copy.deepcopy(net)
        other.enable_gradient_checkpointing()
        arms["checkpointed"] = evolve(base, net=other, optimizer=optimizer(other))
    if compiled:
        other = copy.deepcopy(net)
        getattr(other, "compile_repeated_blocks", other.compile)()
        arms["compiled"] = evolve(base, net=other, optimizer=optimizer(other))
    return arms


def _loss(arm: Arm, given: Samples, pack: list[int]) -> Tensor:
    """This call's part of the mean over all samples."""
    net: Any = arm.net
    t, text = given.t[pack], TextFeatures(given.text.features[pack], given.text.mask[pack])
    xs = [(1 - given.t[i]) * given.zs[i] + given.t[i] * given.noises[i] for i in pack]
    vs = net.packed(xs, t, text) if arm.packed else net(torch.stack(xs), t, text)
    errors = [(v.float() - given.noises[i] + given.zs[i]).square().mean() for v, i in zip(vs, pack, strict=True)]
    return torch.stack(errors).sum() / len(given.zs)


def _gradient(arm: Arm, given: Samples) -> list[Tensor]:
    arm.net.zero_grad()
    for pack in arm.packs:
        _loss(arm, given, pack).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in arm.net.parameters()]
    arm.net.zero_grad()
    return found


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True))
    return math.sqrt(apart / sum(float(b.double().square().sum()) for b in want))


def _step(
    arm: Arm, draw: Callable[[], Samples], half: Callable[[], AbstractContextManager[Any]], place: torch.device
) -> dict[str, float]:
    """Seconds of each part of one step. `data` is the making of the random samples."""
    took = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, run: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        out = run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        took[part] += time.perf_counter() - begun
        return out

    def forward(pack: list[int]) -> Tensor:
        with half():
            return _loss(arm, given, pack)

    def learn() -> None:
        nn.utils.clip_grad_norm_(arm.net.parameters(), 1.0)
        arm.optimizer.step()

    given = timed("data", draw)
    for pack in arm.packs:
        loss = timed("forward", lambda pack=pack: forward(pack))
        timed("backward", loss.backward)
    timed("optimizer", learn)
    arm.optimizer.zero_grad()
    return took


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(report: Report) -> str:
    """The report as Markdown."""
    said = [f"{k} {v}" for k, v in report.settings.items()]
    head = "| way | images/s | step, s | data | forward | backward | optimizer | GFLOP/s | MFU |"
    lines = [", ".join(said), "", head, "|" + "---|" * 9]
    for name, a in report.arms.items():
        speed, mfu = a["flops_per_second"], a["mfu"]
        told = [f"{a[k]:.3g}" for k in ("images_per_second", "step", *PARTS)]
        told += ["" if speed is None else f"{speed / 1e9:.0f}", "" if mfu is None else f"{mfu:.1%}"]
        lines.append(f"| {name} | {' | '.join(told)} |")
    lines += ["", "| steps, s / s | median | least | most |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['median']:.2f} | {r['least']:.2f} | {r['most']:.2f} |" for n, r in report.ratios.items()]
    lines += [f"\n{name}: void, {why}" for name, why in report.void.items()]
    return "\n".join(lines)
