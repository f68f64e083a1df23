"""Train the embedded backbone (`tiny:`) from nothing within a time budget, on a GPU or a CPU.

    python scripts/train_embedded.py --minutes 7 --output runs/embedded                 (an H100 and 16 cores)
    python scripts/train_embedded.py --device cpu --minutes 3 --small --output runs/try

Everything is made on the spot: processes render scenes of the split `train`; meanwhile a first model learns to draw
writing (the VAE, `--vae-seconds`) and the fastest way to launch a step is measured (`--probe-seconds`); then scenes and
captions are encoded once, and the backbone learns from the cache until the time is up. The learning rate follows the
clock, so the decay is complete whenever the end comes. What is learned is written to --output once a minute.

    python scripts/train_embedded.py --start model --go-on --vae-seconds 0 --lr 2e-3 --output runs/further  (learn on)
    python scripts/train_embedded.py --assemble runs/embedded --output model            (a checkpoint from its files)
    python scripts/train_embedded.py --assemble runs/a,runs/b --output model            (from the mean of their weights)
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before that

import torch
from attrs import asdict, evolve
from embedded_loop import MODES, Cache, Step, TextStore, draw
from embedded_scenes import MIXTURES, Group, SceneFactory
from embedded_vae import by_task, choose_vae
from lens_flow.matching import FlowMatching
from lens_mmdit.model import LensTransformer2DModel
from lens_shapes.benchmark import ShapesBenchmark
from safetensors.torch import load_file, save_file

from lens_core import LensPipeline
from lens_core.recipe import ComponentSpec, unstructure

FLOW = {"caption_dropout": 0.0, "base_tokens": 64, "base_shift": 0.9, "max_tokens": 256, "max_shift": 1.2}
BACKBONE = {
    "in_channels": 32, "out_channels": 8, "num_layers": 8, "num_attention_heads": 5, "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12], "enc_hidden_dim": 128, "selected_layer_index": [0, 2],
}  # fmt: skip
SMALL = {"num_layers": 2, "num_attention_heads": 2}
BRIEF, LONG = 56, 208  # columns of text: the longest captions have 50 and 202 tokens

GROUPS = (
    Group("64", (64, 64), 786, False, BRIEF),
    Group("64x80", (64, 80), 80, False, BRIEF),
    Group("80x64", (80, 64), 80, False, BRIEF),
    Group("64 dense", (64, 64), 100, True, LONG),
    Group("128", (128, 128), 300, False, BRIEF),
    Group("96x160", (96, 160), 60, False, BRIEF),
    Group("160x96", (160, 96), 60, False, BRIEF),
    Group("128 dense", (128, 128), 60, True, LONG),
)
# Of the steps: before and after the share `--large-from` of the training time. All batches cost about the same.
EARLY = {"64": 0.7, "64x80": 0.05, "80x64": 0.05, "64 dense": 0.08, "128": 0.1, "128 dense": 0.02}
LATE = {"64": 0.18, "64x80": 0.02, "80x64": 0.02, "64 dense": 0.03, "128": 0.55, "96x160": 0.07, "160x96": 0.07,
        "128 dense": 0.06}  # fmt: skip
DECAY_FROM, WARMUP = 0.6, 0.01


PATHS = ("output", "scratch", "probe", "assemble", "vae", "until", "start")
"""Options that name places of one machine, which results do not repeat."""


class Log:
    """Lines of `log.jsonl`, with the seconds since the start, and of the terminal."""

    def __init__(self, out: Path) -> None:
        self.start, self.path, self.result = time.monotonic(), out / "log.jsonl", out / "result.json"
        self.facts: dict[str, Any] = {}

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, event: str, **values: Any) -> None:
        line = {"at": round(self.seconds(), 1), "event": event, **values}
        print(json.dumps(line), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def keep(self, **facts: Any) -> None:
        """Facts of the run, in `result.json`."""
        self.facts |= facts
        self.result.write_text(json.dumps(self.facts, indent=1), encoding="utf-8")


# ---- how to launch a step -----------------------------------------------------------------------------------------


def probe(options: argparse.Namespace) -> None:
    """Measure a step of each mode on random data; writes what is known after each mode."""
    out, results = Path(options.probe), {}
    for mode in MODES:
        try:
            results[mode] = {name: probe_mode(options, mode, name) for name in ("64", "128")}
        except RuntimeError as error:
            print(f"probe {mode}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        part = out.with_name(f".{out.name}")
        part.write_text(json.dumps(results))
        part.replace(out)
        print("probe", mode, json.dumps(results[mode]), flush=True)


def probe_mode(options: argparse.Namespace, mode: str, name: str) -> dict[str, float]:
    """Milliseconds of a step on batches of one group, and the losses before and after 20 steps."""
    group = next(g for g in GROUPS if g.name == name)
    count, device = batch_size(group, options), options.device
    torch.manual_seed(0)
    net = LensTransformer2DModel(backbone_config(options)).to(device)
    method = FlowMatching(FlowMatching.Config(**FLOW), None)  # type: ignore[arg-type]  # its loss needs no pipeline
    step = Step(method, net, mode, 0.99)
    step.lr.fill_(1e-3)
    z = torch.randn(count, 32, group.size[0] // 8, group.size[1] // 8, device=device).bfloat16()
    features = torch.randn(count, 2, group.tokens, 128, device=device).bfloat16()
    lengths = torch.randint(24, group.tokens, (count, 1), device=device)
    mask = torch.arange(group.tokens, device=device) < lengths
    begin = time.monotonic()
    for _ in range(6):
        step(name, z, features, mask)
    first = step.take_losses()[name]
    prepared, begin = time.monotonic() - begin, time.monotonic()
    for _ in range(20):
        step(name, z, features, mask)
    last = step.take_losses()[name]
    ms = (time.monotonic() - begin) / 20 * 1e3
    if (step.graphed, step.compiled) != (mode.endswith("graph"), mode.startswith("compile")):
        raise RuntimeError("does not work here")
    return {"ms": round(ms, 2), "prepared": round(prepared, 1), "first": first, "last": last,
            "pictures": round(count / ms * 1e3)}  # fmt: skip


def choose_mode(options: argparse.Namespace, results: dict[str, Any], log: Log) -> str:
    """The fastest mode whose loss fell as it did in eager mode; "eager" where nothing is known."""
    mode: str = options.mode
    if mode == "auto":
        eager = results.get("eager")
        good = {
            name: result["64"]["ms"] + result["128"]["ms"]
            for name, result in results.items()
            if eager and all(abs(result[g]["last"] - eager[g]["last"]) < 0.1 for g in ("64", "128"))
        }
        mode = min(good, key=lambda name: good[name], default="eager")
    log("mode", mode=mode, probe=results)
    log.keep(mode=mode, probe=results)
    return mode


def backbone_config(options: argparse.Namespace) -> Any:
    fields = BACKBONE | (SMALL if options.small and not options.go_on else {})
    return LensTransformer2DModel.Config(**fields)  # type: ignore[arg-type]  # by name


def flow_fields(options: argparse.Namespace) -> dict[str, float]:
    """The options of the method: `--shift` moves logit(t) of all sizes."""
    return FLOW | {name: FLOW[name] + options.shift for name in ("base_shift", "max_shift")}


def batch_size(group: Group, options: argparse.Namespace) -> int:
    """Samples of a batch: about `--tokens` tokens in all, text included."""
    tokens = group.size[0] * group.size[1] // 64 + group.tokens
    return max(2, int(options.tokens) // tokens // 8 * 8)


# ---- the backbone -------------------------------------------------------------------------------------------------


class Trial:
    """What is being learned, its evaluations, and its files."""

    def __init__(self, pipeline: LensPipeline, factory: SceneFactory, step: Step, out: Path, log: Log) -> None:
        self.pipeline, self.factory, self.step, self.out, self.log = pipeline, factory, step, out, log
        self.shown: Any = copy.deepcopy(step.net).to(torch.bfloat16).eval().requires_grad_(False)
        for block in self.shown.transformer_blocks:  # type: ignore[union-attr]  # a module list
            block._compiled_call_impl = None
        self.pending: list[tuple[dict[str, Any], Any, Any]] = []
        self.scores: list[dict[str, Any]] = []
        self.good = [p.detach().clone() for p in step.parameters]

    def refresh(self) -> None:
        """Put the average into the copy that draws, as bfloat16, which is what is shipped."""
        self.step.copy(list(self.shown.parameters()), self.step.average)

    def save(self) -> None:
        """Write the average, whole or not at all."""
        self.refresh()
        state = {name: t.cpu().contiguous() for name, t in self.shown.state_dict().items()}
        part = self.out / ".backbone.part"
        save_file(state, part)
        part.replace(self.out / "backbone.safetensors")

    def evaluate(self, side: int, guidance: float, count: int, split: str = "select", seed: int = 0) -> None:
        """Draw the prompts of a benchmark now, from noise of `seed`; they are read while training goes on."""
        with self.step.outside():
            self.refresh()
            self.pipeline.backbone = self.shown
            benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=count, split=split))
            prompts, drawn = benchmark.prompts(), []
            for n in range(0, count, 128):
                part = prompts[n : n + 128]
                text = self.pipeline.encode([p.text for p in part])
                seeds = [seed * 10_000 + n + i for i in range(len(part))]
                drawn.append(draw(self.pipeline, text, seeds, side, 20, guidance))
        images = torch.cat(drawn)
        fact = {"at": round(self.log.seconds(), 1), "split": split, "side": side, "guidance": guidance, "seed": seed,
                "prompts": count}  # fmt: skip
        self.pending.append((fact, self.factory.readers.score(images, prompts), prompts))
        sheet(images[:48], self.out / f"sheet-{side}.png")

    def collect(self, wait: bool = False) -> None:
        """The scores that are ready; all of them with `wait`."""
        for entry in list(self.pending):
            fact, handle, prompts = entry
            if wait or handle.ready():
                self.pending.remove(entry)
                parts = handle.get(120)
                self.scores.append(fact | by_task(parts, prompts))
                self.log("score", **self.scores[-1])
                if fact["split"] == "test":
                    self.scores[-1]["values"] = [int(value) for part in parts for value in part]
                self.log.keep(scores=self.scores)


def sheet(images: torch.Tensor, path: Path) -> None:
    """Pictures in rows of eight."""
    from PIL import Image

    count, _, height, width = images.shape
    rows = -(-count // 8)
    page = Image.new("RGB", (8 * width, rows * height))
    for n, image in enumerate(images):
        page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (n % 8 * width, n // 8 * height))
    page.save(path)


def rate(share: float, lr: float) -> float:
    """The learning rate at a share of the time: a short rise, level, then a straight fall to 0."""
    return lr * min(1.0, share / WARMUP + 0.01, (1 - share) / (1 - DECAY_FROM))


def train(trial: Trial, caches: dict[str, Cache], options: argparse.Namespace, end: float) -> None:
    """Learn until `end` (seconds of the log's clock)."""
    step, log = trial.step, trial.log
    order = torch.Generator().manual_seed(options.seed)
    rng = torch.Generator(step.device).manual_seed(options.seed)
    begin = log.seconds()
    span, lr = max(1.0, end - begin), options.lr
    seen: dict[str, int] = defaultdict(int)
    steps, marks = 0, {"log": begin, "save": begin, "score": begin}
    sizes = {name: batch_size(cache.group, options) for name, cache in caches.items()}
    while (share := (log.seconds() - begin) / span) < 1:
        weights = EARLY if share < options.large_from else LATE
        names = [name for name in weights if caches[name].used]
        place = torch.multinomial(torch.tensor([weights[n] for n in names]), 1, generator=order)
        name = names[int(place)]
        step.lr.fill_(rate(share, lr))
        step(name, *caches[name].draw(sizes[name], options.dropout, rng))
        seen[name] += sizes[name]
        steps += 1
        if steps == 200:
            step.copy(step.average, step.parameters)  # a young average would remember the first weights
        if steps % 10:
            continue
        if step.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock would run ahead of the device
        now = log.seconds()
        if now - marks["log"] > options.log_seconds:
            losses = step.take_losses()
            if all(torch.isfinite(torch.tensor(list(losses.values())))):
                step.copy(trial.good, step.parameters)
            else:
                lr /= 2
                step.copy(step.parameters, trial.good)
                step.copy(step.average, trial.good)
                for slots in step.optimizer.state.values():
                    step.copy(list(slots.values()), [torch.zeros_like(t) for t in slots.values()])
            rounded = {k: round(v, 4) for k, v in losses.items()}
            log(
                "train",
                steps=steps,
                pictures=sum(seen.values()),
                share=round(share, 3),
                lr=rate(share, lr),
                losses=rounded,
            )
            log.keep(steps=steps, pictures=dict(seen), losses=rounded, training_seconds=round(now - begin, 1))
            trial.collect()
            marks["log"] = now
        if now - marks["save"] > options.save_seconds:
            trial.save()
            marks["save"] = now
        if now - marks["score"] > options.score_seconds and share < 0.95:
            trial.evaluate(128 if share > options.large_from + 0.1 else 64, 4.0, options.score_prompts)
            marks["score"] = log.seconds()
    trial.save()


# ---- the whole run --------------------------------------------------------------------------------------------------


Chunk = tuple[int, int, torch.Tensor]  # the place of its group, its number, the rows of its captions in the store


def take(factory: SceneFactory, pipeline: LensPipeline, stores: dict[int, TextStore], wait: float) -> Iterator[Chunk]:
    """The chunks that are rendered, their captions encoded, until there is none for `wait` seconds."""
    for place, number, captions in factory.finished(wait):
        store = stores[factory.groups[place].tokens]
        yield place, number, torch.tensor(store.add(pipeline.text_encoder, captions))


def run(options: argparse.Namespace) -> None:
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out)
    if options.small:
        groups = [Group(g.name, g.size, 2, g.dense, g.tokens, 32) for g in GROUPS]
    else:
        groups = [evolve(g, chunks=max(1, round(g.chunks * options.scenes))) for g in GROUPS]
    torch.set_num_threads(1)  # until the processes are forked: threads do not survive that
    encoder = LensPipeline.from_pretrained(options.start, dtype=torch.bfloat16, device="cpu").text_encoder
    tasks = MIXTURES[options.mixture]
    factory = SceneFactory(groups, encoder, options.seed, options.workers, options.readers, tasks)
    torch.set_num_threads(options.threads)
    children: dict[str, Any] = {}
    scratch = Path(options.scratch or out)
    scratch.mkdir(parents=True, exist_ok=True)
    if options.vae_seconds:
        arguments = {"groups": [asdict(g) for g in groups], "files": factory.scenes.files, "start": options.start,
                 "device_name": options.device, "out": str(scratch / "vae_trained"), "seconds": options.vae_seconds,
                 "until": time.time() + options.prepare_seconds - 4, "lr": options.vae_lr,
                 "most": 8 if options.small else 1024}  # fmt: skip
        script = Path(__file__).with_name("embedded_vae.py")
        children["vae"] = subprocess.Popen(
            [sys.executable, str(script), json.dumps(arguments)], pass_fds=factory.scenes.files
        )
    if options.probe_seconds and options.mode == "auto":
        command = [sys.executable, *sys.argv, "--probe", str(out / "probe.json")]
        children["probe"] = subprocess.Popen(command)
    chosen = {name: value for name, value in vars(options).items() if name not in PATHS}
    about = {"torch": torch.__version__, "device": options.device, "cpus": os.cpu_count(), "options": chosen,
             "tasks": tasks, "flow": flow_fields(options),
             "backbone": unstructure(backbone_config(options))}  # fmt: skip
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    log.keep(**about)
    try:
        _run(options, factory, children, scratch, out, log)
    finally:
        for child in children.values():
            child.kill()
        factory.close()


def _run(
    options: argparse.Namespace, factory: SceneFactory, children: dict[str, Any], scratch: Path, out: Path, log: Log
) -> None:
    while options.until and not Path(options.until).exists():  # scenes are rendered meanwhile
        time.sleep(0.05)
    log.start = time.monotonic()
    pipeline = LensPipeline.from_pretrained(options.start, dtype=torch.bfloat16, device=options.device)
    encoder: Any = pipeline.text_encoder
    device = pipeline.device
    log("loaded")
    totals = {tokens: sum(g.count for g in factory.groups if g.tokens == tokens) for tokens in (BRIEF, LONG)}
    stores = {t: TextStore(encoder.layers, encoder.width, t, n, device) for t, n in totals.items()}

    def prepared() -> bool:
        """Whether scenes, VAE and measurement are done, or out of time."""
        done = not factory.left and all(child.poll() is not None for child in children.values())
        return done or log.seconds() > options.prepare_seconds

    chunks: list[Chunk] = []
    while not prepared():
        for chunk in take(factory, pipeline, stores, 0.2):
            chunks.append(chunk)
            if prepared():
                break
        time.sleep(0 if factory.left else 0.1)
    log("rendered", chunks=len(chunks), left=factory.left, captions={t: s.used - 1 for t, s in stores.items()})
    for child in children.values():
        child.kill()
    folders = {"given": Path(options.vae)} if options.vae else {}
    folders |= {"trained": scratch / "vae_trained"} if options.vae_seconds else {}
    name, ceilings, vae = choose_vae(factory, pipeline, folders)
    log("vae", chosen=name, ceilings=ceilings)
    log.keep(vae=name, ceilings=ceilings)
    pipeline.vae = vae
    save_file({name: t.cpu().contiguous() for name, t in vae.net.state_dict().items()}, out / "vae.safetensors")
    probed = json.loads((out / "probe.json").read_text()) if (out / "probe.json").is_file() else {}
    mode = choose_mode(options, probed, log)
    caches = {g.name: Cache(g, vae.channels, vae.downscale, stores[g.tokens], device) for g in factory.groups}
    order = torch.Generator().manual_seed(options.seed)
    for part in (chunks, take(factory, pipeline, stores, 0.02)):  # what was rendered meanwhile comes second
        for place, number, rows in part:
            group = factory.groups[place]
            images = factory.scenes.images[place][number * group.chunk : (number + 1) * group.chunk]
            if options.shuffle_captions:
                rows = rows[torch.randperm(len(rows), generator=order)]
            caches[group.name].add(vae, torch.from_numpy(images), rows)
            if log.seconds() > options.render_seconds:
                break
    log("encoded", scenes={name: cache.used for name, cache in caches.items()})
    log.keep(scenes={name: cache.used for name, cache in caches.items()})
    torch.manual_seed(options.seed)
    net = LensTransformer2DModel(backbone_config(options)).to(device)
    if options.go_on:
        net.load_state_dict(pipeline.backbone.state_dict())
    method = FlowMatching(FlowMatching.Config(**flow_fields(options)), pipeline)  # type: ignore[arg-type]  # by name
    step = Step(method, net, mode, options.ema)
    trial = Trial(pipeline, factory, step, out, log)
    train(trial, caches, options, options.minutes * 60 - options.reserve)
    log("trained")
    for guidance in (3.0, 5.0):
        trial.evaluate(128, guidance, options.final_prompts)
    trial.collect(wait=True)
    best = max(trial.scores[-2:], key=lambda score: score["overall"])["guidance"]
    for side, seed in ((128, 0), (64, 0), (128, 1), (64, 1), (128, 2), (64, 2)):
        if log.seconds() < options.minutes * 60 - 5:
            trial.evaluate(side, best, options.test_prompts, "test", seed)
    trial.collect(wait=True)
    log.keep(seconds=round(log.seconds(), 1))
    log("finished")


def assemble(options: argparse.Namespace) -> None:
    """A checkpoint from the files of a run: its backbone and VAE, all else of `--start`. Of several runs that began at
    one start and kept its VAE: the mean of their backbones."""
    sources = [Path(name) for name in options.assemble.split(",")]
    facts = json.loads((sources[0] / "result.json").read_text())
    pipeline = LensPipeline.from_pretrained(options.start, dtype=torch.bfloat16, device="cpu")
    config = LensTransformer2DModel.Config(**facts["backbone"])
    net = LensTransformer2DModel(config).to(torch.bfloat16)
    states = [load_file(source / "backbone.safetensors") for source in sources]
    net.load_state_dict({name: torch.stack([s[name].float() for s in states]).mean(0) for name in states[0]})
    pipeline.backbone = net
    pipeline.specs["backbone"] = ComponentSpec("lens_mmdit:mmdit", unstructure(config))
    pipeline.vae.net.load_state_dict(load_file(sources[0] / "vae.safetensors"))
    pipeline.presets |= {"steps": 20, "guidance_scale": options.guidance, "base_resolution": options.resolution}
    digest = hashlib.sha256(b"".join((s / "backbone.safetensors").read_bytes() for s in sources)).hexdigest()[:16]
    made = {"method": "flow_matching", "steps": facts["steps"], "seed": facts["options"]["seed"], "sha256": digest}
    pipeline.provenance = {"recipe": made}
    pipeline.save_pretrained(Path(options.output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", default="")
    add("--scratch", default="", help="where files go that nobody needs afterwards; default: --output")
    add("--start", default="tiny:", help="the checkpoint whose text encoder and VAE are used")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=7.0, help="of the whole run")
    add("--reserve", type=float, default=56.0, help="seconds at the end, for the last evaluation")
    add("--go-on", action="store_true", help="begin with the backbone of --start")
    add("--mixture", choices=sorted(MIXTURES), help="of tasks; further if --go-on is given, else first")
    add("--scenes", type=float, default=1.0, help="how many are rendered, as a share of the 780,000 of a whole run")
    add("--shift", type=float, default=0.0, help="added to the mean of logit(t): above 0, noisier pictures")
    add("--until", default="", help="render, and use the device once there is this file; time counts from then on")
    add("--vae", default="", help="a checkpoint folder whose VAE may be chosen, too")
    add("--vae-seconds", type=float, default=38.0)
    add("--vae-lr", type=float, default=7e-4)
    add("--probe-seconds", type=float, default=70.0, help="0: do not measure modes")
    add("--prepare-seconds", type=float, default=80.0, help="of the run, until VAE and measurement must be done")
    add("--render-seconds", type=float, default=125.0, help="of the run, until the last scenes are encoded")
    add("--mode", default="auto", choices=["auto", *MODES])
    add("--tokens", type=int, default=61440, help="of a batch, text included")
    add("--lr", type=float, default=3e-3)
    add("--large-from", type=float, default=0.5, help="the share of the training from which most pictures are large")
    add("--ema", type=float, default=0.998)
    add("--dropout", type=float, default=0.1, help="share of samples without their caption")
    add("--seed", type=int, default=17)
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    add("--readers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    add("--threads", type=int, default=1)
    add("--log-seconds", type=float, default=5.0)
    add("--save-seconds", type=float, default=60.0)
    add("--score-seconds", type=float, default=45.0)
    add("--score-prompts", type=int, default=140)
    add("--final-prompts", type=int, default=140, help="of the split select, to choose the guidance")
    add("--test-prompts", type=int, default=500, help="of the split test, at the very end")
    add("--shuffle-captions", action="store_true", help="a control: each scene gets the caption of another one")
    add("--small", action="store_true", help="a small network and few scenes, to try the script")
    add("--probe", default="", help=argparse.SUPPRESS)
    add("--assemble", default="", help="a folder that this script wrote, or several with commas between them")
    add("--guidance", type=float, default=5.0)
    add("--resolution", type=int, default=128)
    options = parser.parse_args()
    options.mixture = options.mixture or ("further" if options.go_on else "first")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention under a mask is not needed; fewer things to go wrong
    if options.device.startswith("cuda:"):
        torch.cuda.set_device(options.device)  # streams and graphs are the current device's
    if options.until and (options.vae_seconds or options.probe_seconds):
        parser.error(
            "--until keeps the device free, which a VAE and a measurement would use: --vae-seconds 0 --probe-seconds 0"
        )
    if options.go_on and (options.vae_seconds or options.vae):
        parser.error("--go-on keeps the VAE whose latents the backbone knows: leave out --vae, and use --vae-seconds 0")
    if options.small:
        options.tokens = min(options.tokens, 2048)
    if options.probe:
        probe(options)
    elif options.assemble:
        assemble(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
