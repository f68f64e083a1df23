"""The third stage of the GPU check: training steps of the published backbone, random weights, latents and texts.

Weights, gradients and the optimizer's moments are float32, as the trainer holds them, and the work is autocast to
bfloat16. MFU counts three forwards a step, whatever is computed again, of the device's dense bfloat16 peak.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import asdict, evolve, frozen
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, Training
from lens_core.training import memory_estimate, optimizers
from lens_core.training.throughput import peak
from lens_core.types import LensError, TextFeatures
from lens_tools import gpu_latency, timing, training_speed
from lens_tools.records import Records, free_memory, peak_gb, reset_peak

TOKENS = 165  # of a dense caption, in the mean; they are spread from half to one and a half of it
AREAS = (((512, 512),), ((512, 512), (768, 768), (1024, 1024), (384, 672), (672, 384), (736, 1472)))
WAYS: dict[str, tuple[bool, bool, bool, float]] = {
    "bucketed, compiled": (True, False, False, 15), "packed, compiled": (True, True, False, 15),
    "packed, mixed sizes, compiled": (True, True, True, 15), "bucketed": (False, False, False, 8),
    "packed": (False, True, False, 8), "bucketed, compiled, Muon": (True, False, False, 8),
}  # fmt: skip
"""Way -> (compiled, packed, mixed sizes, seconds needed on a GPU), what matters most first: time may run out."""


@frozen
class Setup:
    """A backbone of `depth` blocks that learns from `images` pictures a step."""

    depth: int
    checkpointing: bool
    images: int

    @property
    def name(self) -> str:
        return f"{self.depth} blocks, {self.images} images{', activations computed again' * self.checkpointing}"

    def bytes(self, parameters: int, tokens: int, width: int) -> int:
        """A forecast: float32 weights, gradients and AdamW's two moments, and activations in bfloat16.

        Muon needs no more: it has one moment of each matrix, and its copies of matrices of one shape are smaller than
        the other one.
        """
        # A block keeps about 31 streams of activations for its backward pass; computed again, only what it began with.
        streams = 2 * self.depth + 34 if self.checkpointing else 31 * self.depth
        return 16 * parameters + 2 * streams * tokens * width * self.images


@frozen
class Samples:
    """Latents [C,h,w], noises, times [B] and texts of one step, and the FLOPs of a forward."""

    latents: list[Tensor]
    noises: list[Tensor]
    t: Tensor
    text: TextFeatures
    flops: float


def measure(records: Records, device: torch.device, small: bool) -> None:
    """Run the stage; every item is in `records` as soon as it is known."""
    catalog = Catalog.installed()
    records.facts |= {"tokens": 6 if small else TOKENS, "peak_flops_per_s": peak(device), "small": small}
    done: list[Setup] = []

    def attempt(setup: Setup, record: dict[str, Any]) -> None:
        Bench(catalog, device, small, setup, records.left).run(record, records.write)
        done.append(setup)

    for setup in setups(device, small):
        # One setup of all blocks, and one without computing activations again, which shows what the blocks cost.
        if any(s.depth == setup.depth for s in done) or any(not s.checkpointing for s in done):
            continue
        records.run(setup.name, partial(attempt, setup), need=25 if device.type == "cuda" else 0)
    records.run("by part, 4 blocks", partial(by_part, catalog, device, small), need=15)


def setups(device: torch.device, small: bool) -> list[Setup]:
    """What to try, the best first, of those whose forecast fits into the device."""
    if small:
        return [Setup(2, False, 3)]
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    every = [
        Setup(48, False, 16), Setup(48, False, 12), Setup(48, True, 16), Setup(48, True, 8), Setup(24, False, 16),
        Setup(12, False, 16),
    ]  # fmt: skip
    return [s for s in every if s.bytes(int(4.104e9 * s.depth / 48), 1024 + TOKENS, 1536) < 0.93 * room]


def recipe(small: bool) -> Recipe:
    """The published parts, trained with flow matching on packed batches of three sizes."""
    components = memory_estimate.published(Catalog.installed())["components"]
    parts: dict[str, Any] = {}
    for kind in ("vae", "text_encoder", "backbone"):
        use = components[kind]
        parts[kind] = ComponentSpec(use["use"], {**use.get("config", {}), **(gpu_latency.SMALL[kind] if small else {})})
    sizes = [[64, 64], [64, 128], [128, 128]] if small else [[512, 512], [384, 672], [768, 768]]
    dataset = ComponentSpec("packed", {"store": "nowhere", "buckets": [sizes]})
    return Recipe(ComponentSpec("flow_matching"), Training(1, precision="bf16"), dataset, PipelineSpec(**parts))


def by_part(catalog: Catalog, device: torch.device, small: bool, record: dict[str, Any]) -> None:
    """`lens bench train` with few blocks: every way's gradient against float32, then its time by part."""
    request = training_speed.SpeedRequest(
        depth=1 if small else 4, samples=3 if small else 12, tokens=6 if small else TOKENS, compiled=False,
        device=str(device),
    )  # fmt: skip
    record |= asdict(training_speed.measure(recipe(small), catalog, request))


class Bench:
    """Training steps of one setup: bucketed and packed, eager and compiled, on the same samples."""

    def __init__(
        self, catalog: Catalog, device: torch.device, small: bool, setup: Setup, left: Callable[[], float]
    ) -> None:
        self.catalog, self.device, self.small, self.setup, self.left = catalog, device, small, setup, left
        self.rng = torch.Generator(device).manual_seed(0)
        reset_peak(device)
        less = {"num_layers": setup.depth}
        self.net: Any = gpu_latency.random_backbone(catalog, device, small, self.rng, **less).train()
        if setup.checkpointing:
            checkpoint: Any = self.net.enable_gradient_checkpointing
            checkpoint()
        self.compiled: Any = gpu_latency.shared_copy(self.net)
        gpu_latency.compile_blocks(self.compiled, "eager" if device.type == "cpu" else "inductor")
        self.use_optimizer("adamw")

    def use_optimizer(self, name: str) -> None:
        """Train with another optimizer, as the trainer builds it; the state of the one before is gone first."""
        self.optimizer: Any = None
        free_memory()
        train = Training(1, optimizer=name, weight_decay=0.0)
        self.optimizer = optimizers.build(self.net, list(self.net.parameters()), train)
        for group in self.optimizer.param_groups:
            # A rate of 0 costs as much as another and leaves the weights alone, so all rounds and ways are alike.
            group["lr"] = 0.0

    def run(self, record: dict[str, Any], keep: Callable[[], None]) -> None:
        """Check, then time, each way, and `keep` what is found before the next."""
        record["parameters"] = sum(p.numel() for p in self.net.parameters())
        forecast, _, _ = memory_estimate.memory(self._recipe(), self.catalog)
        record["dry_run_gb"] = sum(v for k, v in forecast.items() if k.startswith("backbone")) / 1e9
        count = self.setup.images
        same = self.samples([AREAS[0][0]] * count if not self.small else [(64, 64)] * count)
        mixed = self.samples(list(AREAS[1]) if not self.small else [(64, 64), (32, 64), (64, 32)])
        wanted = [self.reference(same), self.reference(mixed)]
        record["eager, bfloat16, from float32"] = [away for _, away in wanted]
        record["ways"] = {}
        for name, (compiled, packed, mixes, need) in WAYS.items():
            if self.device.type == "cuda" and self.left() < need:
                record["ways"][name] = {"skipped": f"{max(self.left(), 0):.0f} s left"}
                continue
            if name.endswith("Muon"):
                self.use_optimizer("muon")
            net, samples = self.compiled if compiled else self.net, mixed if mixes else same
            record["ways"][name] = {"error": "out of memory"}
            try:
                record["ways"][name] = self.time(net, samples, packed, *wanted[mixes])
                keep()
                continue
            except torch.OutOfMemoryError:
                pass
            except Exception as error:  # the other ways can still be timed
                text = " ".join(str(error).split())[:500]
                record["ways"][name] = {"error": f"{type(error).__name__}: {text}"}
            # Not where the error is caught: its traceback keeps the activations alive that did not fit.
            self.net.zero_grad()
            free_memory()
            keep()
            if name == next(iter(WAYS)) and record["ways"][name]["error"] == "out of memory":
                raise LensError("out of memory")

    @torch.no_grad()
    def reference(self, samples: Samples) -> tuple[Tensor, float]:
        """What samples' velocities are in float32, eager, and how far from it they are in bfloat16."""
        packed = len({x.shape for x in samples.latents}) > 1
        want = self.velocities(self.net, samples, packed, torch.float32)
        got = self.velocities(self.net, samples, packed, torch.bfloat16)
        return want, timing.distance(got, want)

    def _recipe(self) -> Recipe:
        plain = recipe(self.small)
        assert plain.pipeline.backbone is not None
        options = {**plain.pipeline.backbone.options, "num_layers": self.setup.depth}
        backbone = ComponentSpec(plain.pipeline.backbone.use, options)
        return evolve(plain, pipeline=evolve(plain.pipeline, backbone=backbone))

    def samples(self, sizes: list[tuple[int, int]]) -> Samples:
        """Random samples of sizes in px, with texts of half to one and a half of the mean length."""
        channels, layers, width = self.net.takes()
        mean = 6 if self.small else TOKENS
        lengths = [round(mean * (0.5 + n / max(len(sizes) - 1, 1))) for n in range(len(sizes))]
        longest = max(lengths)
        text = gpu_latency.random_text(len(sizes), layers, longest, width, self.device, self.rng)
        host = torch.arange(longest) < torch.tensor(lengths)[:, None]
        grids = [(h // 16, w // 16) for h, w in sizes]

        def draw() -> list[Tensor]:
            return [torch.randn(channels, *g, device=self.device, generator=self.rng) for g in grids]

        t = torch.rand(len(sizes), device=self.device, generator=self.rng)
        flops = sum(self.net.flops(grid, length) for grid, length in zip(grids, lengths, strict=True))
        text = TextFeatures(text.features, host.to(self.device), host)
        return Samples(draw(), draw(), t, text, float(flops))

    def time(self, net: Any, samples: Samples, packed: bool, want: Tensor, eager: float) -> dict[str, Any]:
        """Seconds of a step of one way, after its velocities agreed with float32 about as well as eager ones do."""
        reset_peak(self.device)
        away = timing.distance(self.step(net, samples, packed), want)
        if not away <= min(gpu_latency.MAX_DISTANCE, gpu_latency.MAX_EXCESS * eager):
            raise LensError(f"its velocities are {away:.2g} from float32, those of the eager way {eager:.2g}")
        run = partial(self.step, net, samples, packed)
        rounds = timing.in_turn({"": run}, self.device, 1 if self.small else 5, 1, self.left)
        figures: dict[str, Any] = timing.figures(rounds[""])
        most, seconds = peak(self.device), figures["median_s"]
        figures |= {
            "distance": away, "images_per_s": len(samples.latents) / seconds,
            "flops_per_s": 3 * samples.flops / seconds, "mfu": 3 * samples.flops / seconds / most if most else None,
            "memory_gb": peak_gb(self.device),
        }  # fmt: skip
        return figures

    def velocities(self, net: Any, samples: Samples, packed: bool, dtype: torch.dtype) -> Tensor:
        """The velocities at noised samples, flat and after each other, computed in `dtype`."""
        t, text = samples.t, samples.text
        xs = [(1 - t[i]) * x + t[i] * n for i, (x, n) in enumerate(zip(samples.latents, samples.noises, strict=True))]
        with torch.autocast(self.device.type, torch.bfloat16, dtype == torch.bfloat16, cache_enabled=False):
            vs = net.packed(xs, t, text) if packed else net(torch.stack(xs), t, text)
        return torch.cat([v.flatten().float() for v in vs])

    def step(self, net: Any, samples: Samples, packed: bool) -> Tensor:
        """One step of flow matching and of the optimizer; the velocities it began with."""
        vs = self.velocities(net, samples, packed, torch.bfloat16)
        targets = [(n - x).flatten() for x, n in zip(samples.latents, samples.noises, strict=True)]
        errors = torch.split((vs - torch.cat(targets)).square(), [len(target) for target in targets])
        loss = torch.stack([error.mean() for error in errors]).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        optimizers.apply_step(self.optimizer)
        self.optimizer.zero_grad()
        return vs.detach()
