"""The second stage of the GPU check: how long one picture takes at full size, with random weights made on the device.

Three ways side by side in one process: `port` (the published arithmetic, eager, padded and masked), `lens`, and
`compiled`; where there is CUDA also `graphed`, the compiled way recorded once and replayed. A way is only timed after
its guided velocity agreed with float32 about as well as the port's does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lens_core import flow
from lens_core.catalog import Catalog
from lens_core.inference.guidance import guided_velocity
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, build
from lens_core.training.memory_estimate import published
from lens_core.types import LensError, TextFeatures
from lens_tools import cuda_graphs, timing
from lens_tools.plain_port import PlainPort, guided_batch
from lens_tools.records import Records, free_memory, peak_gb, reset_peak

GUIDANCE = 5.0
TIME = torch.tensor([0.7])  # at which velocities are compared
TOKENS = 200  # of the prompt, as in the goals
MODES = {"turbo": (4, 1.0), "base": (20, GUIDANCE)}
"""Name -> (steps, guidance scale)."""
SMALL_MODES = {"turbo": (2, 1.0), "base": (3, GUIDANCE)}
MAX_DISTANCE = 0.3
"""How far a guided bfloat16 velocity may be from float32, relative, whatever the port's is. Guidance of 5 amplifies
what 48 blocks round; the port itself is at 0.1 at random weights (docs/gpu.md)."""
MAX_DISTANCE_32 = 1e-3
"""How far float32 may be from the port's; TF32 would be about 3e-4, a wrong formula far more."""
MAX_EXCESS = 1.25
"""How many times farther from float32 a way may be than the port in bfloat16."""
MAX_REPLAY_DISTANCE = 0.1
"""How far the latents of a replayed loop may be from those of the loop."""
SMALL: dict[str, dict[str, Any]] = {
    "backbone": {"num_layers": 2, "num_attention_heads": 2, "enc_hidden_dim": 32},
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        "vocab_size": 768, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
        "num_experts_per_tok": 2, "selected_layers": (0, 1, 2, 3),
    },
}  # fmt: skip
"""Kind -> what is smaller on a CPU; together they fit each other."""

Loop = Callable[[Tensor, int, float], Tensor]
"""(noise, steps, guidance scale) -> latents."""


class Subject:
    """A backbone of the published size with random weights, prompts for it, and the ways to sample with it."""

    def __init__(self, catalog: Catalog, device: torch.device, small: bool) -> None:
        self.catalog, self.device, self.small = catalog, device, small
        self.modes, self.repeats = (SMALL_MODES, 1) if small else (MODES, 5)
        self.rng = torch.Generator(device).manual_seed(0)
        self.net: Any = random_backbone(catalog, device, small, self.rng).to(torch.bfloat16).eval()
        self.net.requires_grad_(False)
        self.sampler = component(catalog, "sampler", small, {})[0]
        takes: Any = self.net.takes  # of a class that is not known here
        self.channels, layers, width = takes()
        self.text = random_text(1, layers, 20 if small else TOKENS, width, device, self.rng)
        self.compiled: Any = shared_copy(self.net)
        # A CPU's compiler takes minutes; tracing, without its code, shows what can break just as well.
        self.backend = "eager" if device.type == "cpu" else "inductor"
        compile_blocks(self.compiled, self.backend)
        self.port = PlainPort(self.net)
        self.ways: dict[str, Loop] = {
            "port": self.by_port, "lens": partial(self.by_pipeline, self.net),
            "compiled": partial(self.by_pipeline, self.compiled),
        }  # fmt: skip

    def prepare_tables(self, size: tuple[int, int]) -> None:
        """Compute modulation for every time that is used at `size`: a table of another length is compiled anew."""
        grid = size[0] // 16, size[1] // 16
        record = [*(self.sampler.times(grid, steps)[:-1].tolist() for steps, _ in self.modes.values()), TIME.tolist()]
        times = torch.tensor(sorted({t for each in record for t in each}))
        for net in (self.net, self.compiled):
            with torch.no_grad(), net.precomputed(times):
                pass

    def noise(self, size: tuple[int, int]) -> Tensor:
        """Noise for one picture of `size` px."""
        return torch.randn(1, self.channels, size[0] // 16, size[1] // 16, device=self.device, generator=self.rng)

    @torch.no_grad()
    def by_port(self, noise: Tensor, steps: int, scale: float) -> Tensor:
        return self.euler(self.port_velocity(self.port, scale), noise, steps)

    def port_velocity(self, port: PlainPort, scale: float) -> flow.Velocity:
        """(x, t) -> v as the published pipeline has it: both branches in one padded batch."""
        dtype = port.weights["img_in.weight"].dtype

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if scale == 1.0:
                return port(x.to(dtype), t, self.text).float()
            uncond, cond = port(*guided_batch(x.to(dtype), t, self.text)).float().chunk(2)
            return flow.guide(cond, uncond, scale)

        return velocity

    @torch.no_grad()
    def euler(self, velocity: flow.Velocity, noise: Tensor, steps: int) -> Tensor:
        *_, (_, x) = self.sampler.sample(velocity, noise, steps)
        return x  # type: ignore[no-any-return]  # the sampler's class is not known here

    @torch.no_grad()
    def by_pipeline(self, net: Any, noise: Tensor, steps: int, scale: float) -> Tensor:
        pipeline = LensPipeline(None, None, net, self.sampler)
        pipeline.device = self.device
        *_, (_, x) = pipeline.sample(self.text, noise, steps, scale)
        return x

    @torch.no_grad()
    def by_loop(self, net: Any, noise: Tensor, steps: int, scale: float) -> Tensor:
        """As `by_pipeline`, without its look at the result, which cannot be recorded."""
        times = self.sampler.times((noise.shape[-2], noise.shape[-1]), steps)[:-1]
        with net.precomputed(times):
            return self.euler(guided_velocity(net, self.text, None, scale), noise, steps)


def measure(records: Records, device: torch.device, small: bool) -> None:
    """Run the stage; every item is in `records` as soon as it is known."""
    catalog = Catalog.installed()
    records.facts |= {"dtype": "bfloat16", "text_tokens": 20 if small else TOKENS, "weights": "random", "small": small}
    sizes: tuple[tuple[int, int], ...] = ((32, 48),) if small else ((1024, 1024), (512, 512))
    subjects: list[Subject] = []

    def make(record: dict[str, Any]) -> None:
        subjects.append(Subject(catalog, device, small))
        record["parameters"] = sum(p.numel() for p in subjects[0].net.parameters())
        record["memory_gb"] = peak_gb(device)

    records.run("ceilings", lambda record: record.update(ceilings(device, small)))
    if not records.run("build", make):
        return
    subject = subjects[0]
    for size in sizes:
        compare(records, subject, size)
    records.run("vae", lambda record: vae_decode(record, subject, sizes, False), need=3)
    pipeline_items(records, subject, sizes)
    for size in sizes:
        records.run(f"kernels {size[0]}x{size[1]}", partial(step_kernels, subject, size), need=6)
    if not small:
        records.run("vae, compiled", lambda record: vae_decode(record, subject, sizes, True), need=40)


def compare(records: Records, subject: Subject, size: tuple[int, int]) -> None:
    """Check and time the three ways at one size."""
    where = f"{size[0]}x{size[1]}"
    sound: dict[str, Loop] = {}
    subject.prepare_tables(size)
    if not records.run(f"agreement {where}", lambda record: sound.update(agreement(record, subject, size)), need=5):
        return
    noise = subject.noise(size)

    def race(mode: str, names: tuple[str, ...], record: dict[str, Any]) -> None:
        steps, scale = subject.modes[mode]
        reset_peak(subject.device)
        runs: dict[str, timing.Run] = {
            name: partial(loop, noise, steps, scale) for name, loop in sound.items() if name in names
        }
        if "graphed" in names:
            try:
                runs["graphed"] = recorded_loop(subject, noise, mode, record)
            except Exception as error:  # the other ways can still be timed
                if len(runs) == 1:
                    raise
                record["graphed, error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        warm_up = 1 if mode == "turbo" else 0  # what the long one runs was run by the check and by the short one
        rounds = timing.in_turn(runs, subject.device, subject.repeats, warm_up, records.left)
        record |= {"steps": steps, "guidance_scale": scale, "memory_gb": peak_gb(subject.device)}
        tell(record, rounds)

    plain = ("port", "lens", "compiled")
    records.run(f"turbo {where}", partial(race, "turbo", plain), need=5)
    every: tuple[str, ...] = plain
    if subject.device.type == "cuda" and "compiled" in sound:
        both = partial(race, "turbo", ("compiled", "graphed"))
        every = (*plain, "graphed") if records.run(f"graphed turbo {where}", both, need=5) else plain
    # The longest comes last: it is the first that is cut off.
    records.run(f"base {where}", partial(race, "base", every), need=10 if subject.device.type == "cuda" else 0)


def tell(record: dict[str, Any], rounds: Mapping[str, list[float]]) -> None:
    """Put the figures of each way, and how much faster each is than those before it, into `record`."""
    record["ways"] = {name: timing.figures(values) for name, values in rounds.items()}
    names = list(rounds)
    for n, slow in enumerate(names):
        record |= {f"{slow} / {fast}": timing.ratio(rounds[slow], rounds[fast]) for fast in names[n + 1 :]}


@torch.no_grad()
def agreement(record: dict[str, Any], subject: Subject, size: tuple[int, int]) -> dict[str, Loop]:
    """Compare one guided velocity of each way with the port's in float32 -> the ways that agree."""
    x = subject.noise(size)
    t = flow.at(float(TIME), x)
    wide = copy.deepcopy(subject.net).float()
    want = subject.port_velocity(PlainPort(wide), GUIDANCE)(x, t)
    record["lens, float32"] = timing.distance(guided_velocity(wide, subject.text, None, GUIDANCE)(x, t), want)
    del wide
    free_memory()
    far: dict[str, float] = {"port": timing.distance(subject.port_velocity(subject.port, GUIDANCE)(x, t), want)}
    for name, net in (("lens", subject.net), ("compiled", subject.compiled)):
        try:
            with net.precomputed(TIME):
                got = guided_velocity(net, subject.text, None, GUIDANCE)(x, t)
            far[name] = timing.distance(got, want)
        except Exception as error:  # no compiler here: the other ways can still be timed
            record[f"{name}, error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    record |= {f"{name}, bfloat16": value for name, value in far.items()}
    most = min(MAX_DISTANCE, MAX_EXCESS * far["port"])
    record["largest allowed"] = most
    sound = [name for name, value in far.items() if value <= most]
    record["void"] = [name for name in far if name not in sound]
    if not record["lens, float32"] <= MAX_DISTANCE_32:
        raise LensError(f"in float32 Lens is {record['lens, float32']:.2g} from the port: nothing is timed")
    return {name: subject.ways[name] for name in sound}


@torch.no_grad()
def recorded_loop(subject: Subject, noise: Tensor, mode: str, record: dict[str, Any]) -> timing.Run:
    """The whole loop as one CUDA graph, in which no host work is left: its replay, which gave what a plain run does."""
    run = partial(subject.by_loop, subject.compiled, noise, *subject.modes[mode])
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = run()
    torch.cuda.current_stream().wait_stream(side)
    graph, out = cuda_graphs.record(run)
    graph.replay()
    record["graphed, distance"] = timing.distance(out, want)
    # Twenty guided steps at random weights amplify a last bit; what is read too early or too late is off by far more.
    if not record["graphed, distance"] <= MAX_REPLAY_DISTANCE:
        raise LensError(f"the replay is {record['graphed, distance']:.2g} from the plain run")
    replay: timing.Run = graph.replay
    return replay


@torch.no_grad()
def step_kernels(subject: Subject, size: tuple[int, int], record: dict[str, Any]) -> None:
    """The kernels of one guided step, by way."""
    x = subject.noise(size)
    t = flow.at(float(TIME), x)
    subject.prepare_tables(size)
    velocities: dict[str, flow.Velocity] = {"port": subject.port_velocity(subject.port, GUIDANCE)}
    for name, net in (("lens", subject.net), ("compiled", subject.compiled)):
        velocities[name] = guided_velocity(net, subject.text, None, GUIDANCE)
    with subject.net.precomputed(TIME), subject.compiled.precomputed(TIME):
        for name, velocity in velocities.items():
            record[name] = timing.kernels(partial(velocity, x, t), subject.device)


@torch.no_grad()
def vae_decode(record: dict[str, Any], subject: Subject, sizes: tuple[tuple[int, int], ...], compiled: bool) -> None:
    """Decoding in bfloat16, and how far it is from float32, at random weights."""
    with subject.device:
        wide = component(subject.catalog, "vae", subject.small, SMALL["vae"])[0].eval()
    half = copy.deepcopy(wide).to(torch.bfloat16)
    if compiled:
        half.net.decoder.compile(backend=subject.backend, dynamic=False)
    for size in sizes:
        z = torch.randn(1, half.channels, size[0] // 16, size[1] // 16, device=subject.device, generator=subject.rng)
        pixels, want = half.decode(z), wide.decode(z)
        rounds = timing.in_turn({"decode": partial(half.decode, z)}, subject.device, subject.repeats, 1)
        about = timing.figures(rounds["decode"]) | {"distance": timing.distance(pixels, want)}
        record[f"{size[0]}x{size[1]}"] = about


def pipeline_items(records: Records, subject: Subject, sizes: tuple[tuple[int, int], ...]) -> None:
    """The text encoder alone, by how its experts are computed, and whole pictures from prompt to pixels."""
    # Each prompt is another: the pipeline keeps the features of those it has seen.
    rest = "and a blue square left of a small green star " * (1 if subject.small else 20)
    prompts = (f"a picture of {n} red circles {rest}" for n in range(10**6))
    pipelines: list[LensPipeline] = []

    def make(record: dict[str, Any]) -> None:
        encoder = random_encoder(subject)
        record["tokens"] = encoder.encode([next(prompts)]).mask.shape[1]
        record["memory_gb"] = peak_gb(subject.device)
        record |= expert_ways(encoder, prompts, subject)
        vae = component(subject.catalog, "vae", subject.small, SMALL["vae"])[0].to(subject.device, torch.bfloat16)
        pipelines.append(LensPipeline(vae.eval(), encoder, subject.compiled, subject.sampler))
        pipelines[0].device = subject.device

    def draw(size: tuple[int, int], steps: int, scale: float) -> None:
        options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "seed": 0}
        pipelines[0](next(prompts), height=size[0], width=size[1], output_type="pt", **options)

    def race(size: tuple[int, int], steps: int, scale: float, record: dict[str, Any]) -> None:
        subject.prepare_tables(size)
        runs = {"compiled": partial(draw, size, steps, scale)}
        tell(record, timing.in_turn(runs, subject.device, subject.repeats, 1, records.left))

    def pack(record: dict[str, Any]) -> None:
        encoder = pipelines[0].text_encoder
        reset_peak(subject.device)
        pack_experts(encoder, subject.rng)
        encoder.model.set_experts_implementation("eager")
        rounds = timing.in_turn({"4 bits": lambda: encoder.encode([next(prompts)])}, subject.device, subject.repeats, 1)
        record |= timing.figures(rounds["4 bits"]) | {"memory_gb": peak_gb(subject.device)}

    def all_sizes(experts: str) -> None:
        for size in sizes:
            for steps, scale in subject.modes.values():
                name = f"prompt to pixels {size[0]}x{size[1]}, {steps} steps{experts}"
                records.run(name, partial(race, size, steps, scale), need=4)

    if not records.run("text encoder", make, need=15):
        return
    all_sizes("")
    if records.run("text encoder, 4 bits", pack, need=6):
        all_sizes(", 4 bits")


def expert_ways(encoder: Any, prompts: Iterator[str], subject: Subject) -> dict[str, Any]:
    """Seconds of encoding one prompt with each of transformers' ways to compute experts that runs here."""
    record: dict[str, Any] = {}
    prompt = next(prompts)
    first: Tensor | None = None
    for way in ("eager", "grouped_mm"):
        try:
            encoder.model.set_experts_implementation(way)
            features = encoder.encode([prompt]).features
            first = features if first is None else first
            rounds = timing.in_turn({way: lambda: encoder.encode([next(prompts)])}, subject.device, subject.repeats)
            record[way] = timing.figures(rounds[way]) | {"distance": timing.distance(features, first)}
        except Exception as error:  # a way that this version or this device lacks
            record[way] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return record


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """bfloat16 FLOP/s of a large matrix product, and bytes/s of a copy, read and written; medians of 5."""
    side, count = (64, 1 << 12) if small else (8192, 1 << 30)
    rng = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16, generator=rng) for _ in range(2))
    source = torch.randn(count, device=device, dtype=torch.bfloat16, generator=rng)
    target = torch.empty_like(source)

    def median(run: timing.Run) -> float:
        for _ in range(3):
            run()
        return sorted(timing.seconds(run, device) for _ in range(5))[2]

    return {
        "matmul_flops_per_s": 2 * side**3 / median(lambda: a @ b),
        "copy_bytes_per_s": 2 * source.numel() * 2 / median(lambda: target.copy_(source)),
    }


# ---- what is measured ---------------------------------------------------------------------------------------


def component(catalog: Catalog, kind: str, small: bool, less: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the published component of a kind, new; its config), with `less` of it where `small`."""
    spec = published(catalog)["components"][kind]
    options = {**spec.get("config", {}), **(less if small else {})}
    _, cls, config = build(catalog, kind, ComponentSpec(spec["use"], options), f"the published {kind}")
    return cls(config), config


def random_backbone(
    catalog: Catalog, device: torch.device, small: bool, rng: torch.Generator, **less: Any
) -> nn.Module:
    """A backbone with random weights, float32: a new one predicts 0, and zeros are multiplied faster than numbers."""
    with device:
        net, _ = component(catalog, "backbone", small or bool(less), SMALL["backbone"] | less if small else less)
    randomise(net, rng)
    return net  # type: ignore[no-any-return]  # its class is not known here


@torch.no_grad()
def randomise(net: nn.Module, rng: torch.Generator) -> None:
    """Weights of variance 1 / inputs, norms about 1, biases small; drawn on the device of the generator."""
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 1 / math.sqrt(p[0].numel()), generator=rng)
        elif name.endswith("bias"):
            p.normal_(0, 0.02, generator=rng)
        else:
            p.normal_(1, 0.1, generator=rng)


def random_text(
    batch: int, layers: int, tokens: int, width: int, device: torch.device, rng: torch.Generator
) -> TextFeatures:
    """Text without padding, whose mask the host knows."""
    features = torch.randn(batch, layers, tokens, width, device=device, generator=rng).to(torch.bfloat16)
    host = torch.ones(batch, tokens, dtype=torch.bool)
    return TextFeatures(features, host.to(device), host)


def random_encoder(subject: Subject) -> Any:
    """The published text encoder with random weights in bfloat16, and the embedded checkpoint's tokenizer."""
    with subject.device, default_dtype(torch.bfloat16):
        encoder, _ = component(subject.catalog, "text_encoder", subject.small, SMALL["text_encoder"])
    encoder.lm_head = None
    encoder.tokenizer = LensPipeline.from_pretrained(
        "tiny:", catalog=subject.catalog, device="cpu"
    ).text_encoder.tokenizer
    tokens, encode_ids = subject.text.mask.shape[1], encoder.encode_ids
    # As long as the text that blocks were compiled for: they would be compiled anew for each other length.
    encoder.encode_ids = lambda ids, host: encode_ids(ids[:, :tokens], host[:, :tokens])
    return encoder.eval().requires_grad_(False).to(subject.device, torch.bfloat16)


def pack_experts(encoder: Any, rng: torch.Generator) -> None:
    """Hold the experts in 4 bits, as the published file does, at random: every byte is a number, of a small scale."""
    encoder.pack_experts()
    for name, buffer in encoder.named_buffers():
        if name.endswith(("_blocks", "_scales")):
            low, high = (0, 256) if name.endswith("_blocks") else (116, 121)
            buffer.random_(low, high, generator=rng)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shared_copy(net: nn.Module) -> nn.Module:
    """A copy with the same weights in memory."""
    return copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})


def compile_blocks(net: Any, backend: str = "inductor") -> None:
    """Compile the block of `net` once for all; a size of its own is compiled for each shape."""
    torch._dynamo.config.recompile_limit = 64  # three graphs a size: beyond the limit blocks would silently run eager
    getattr(net, "compile_repeated_blocks", net.compile)(dynamic=False, backend=backend)
