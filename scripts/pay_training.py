"""The trainings of `does_it_pay.py`: small runs from a bundle of pictures and captions, several processes side by side.

A process encodes the bundle once and trains one run after the other. Drawn pictures are read by other processes while
the next steps, or the next run, are on. Each run becomes `NAME.json` and `NAME.png` once all of it is read; a run that
is there is skipped.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import multiprocessing
import runpy
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen
from embedded_loop import Step, TextStore, draw
from embedded_scenes import Readers, caption_tokens
from embedded_vae import by_task
from lens_flow.matching import FlowMatching
from lens_shapes.benchmark import ShapesBenchmark
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from train_embedded import BRIEF, FLOW, LONG, sheet

from lens_core import Catalog, LensPipeline
from lens_core.checkpoints import manifest
from lens_core.inference.pixels import to_pixels
from lens_core.io.atomic_files import read_json, write_atomic
from lens_core.types import LensError, Prompt, TextFeatures

SIDE = 64  # px
START = "tiny:"
FORGET = Path(__file__).parents[1] / "examples" / "forget_text.py"
DROPOUT, WARMUP, EMA, EMA_FROM = 0.1, 30, 0.99, 50
TASKS = ("single", "two", "colours")
SAMPLER_STEPS, GUIDANCE = 12, 3.0
EVALUATIONS = 6  # in a run, evenly
READING_SECONDS = 300.0  # that the pictures of one evaluation may take to be read


@frozen
class Arm:
    """Which pictures of the bundle a run sees, and the share of samples with the dense caption."""

    store: str
    dense: float = 0.0
    shuffled: bool = False  # each picture has the captions of another
    both: bool = False  # also evaluated by dense prompts

    @property
    def tokens(self) -> int:
        """Columns of text that fit its captions."""
        return LONG if self.dense else BRIEF


ARMS = {
    "dirty": Arm("dirty"),
    "random": Arm("random"),
    "curated": Arm("curated", both=True),
    "dense": Arm("curated", 1.0, both=True),
    "mixed": Arm("curated", 0.5, both=True),
    "shuffled": Arm("curated", shuffled=True),
}


@frozen
class Options:
    """What all runs of one call share."""

    device: str
    mode: str  # of embedded_loop.MODES
    steps: int
    batch: int
    lr: float
    select_prompts: int  # prompts of an evaluation on the way
    test_prompts: int  # prompts of the last one
    readers: int  # processes that read pictures, of one job
    until: float  # the time.time() by which every run must have ended

    @property
    def facts(self) -> dict[str, Any]:
        """What a result must share with the runs of this call to count as one of them."""
        shared = ("steps", "batch", "lr", "select_prompts", "test_prompts")
        return {name: getattr(self, name) for name in shared} | {"start": start_version()}


@functools.cache
def start_version() -> str:
    """The hash of the checkpoint that runs go on from: another one makes another experiment."""
    return manifest.digest(manifest.resolve_uri(START, Catalog.installed()))


@frozen
class Run:
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


# ---- the bundle -----------------------------------------------------------------------------------------------------


@frozen
class Bundle:
    """Pictures uint8 [N,64,64,3] of all stores, with their captions; `members` has the places of each store's."""

    images: Tensor
    brief: list[str]
    dense: list[str]
    members: dict[str, Tensor]


def read_bundle(folder: Path) -> Bundle:
    """The bundle that `does_it_pay.py --prepare` wrote. Raises LensError where it is not whole."""
    try:
        lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
        tensors = load_file(folder / "pictures.safetensors")
        data, ends = tensors["files"].numpy().tobytes(), [0, *tensors["ends"].tolist()]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LensError(
            f"{folder}: holds no bundle ({error}); make one with `does_it_pay.py ROOT --prepare`"
        ) from error
    if len(ends) != len(lines) + 1 or ends[-1] != len(data):
        raise LensError(f"{folder}: {len(lines)} captions do not belong to {len(ends) - 1} pictures; make it again")
    images = np.stack([np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in pairwise(ends)])
    stores = {name for line in lines for name in line["stores"]}
    members = {s: torch.tensor([n for n, line in enumerate(lines) if s in line["stores"]]) for s in sorted(stores)}
    return Bundle(torch.from_numpy(images), [e["brief"] for e in lines], [e["dense"] for e in lines], members)


class Samples:
    """The latents of a bundle and the features of its captions, on the device."""

    def __init__(self, bundle: Bundle, pipeline: LensPipeline, arms: Sequence[Arm]) -> None:
        self.bundle, self.device = bundle, pipeline.device
        self.latents = torch.cat([self._latents(pipeline.vae, part) for part in torch.split(bundle.images, 256)])
        self.stores: dict[int, TextStore] = {}
        self.rows: dict[tuple[int, bool], Tensor] = {}  # by columns and kind of caption: the row of each picture's
        for tokens in sorted({arm.tokens for arm in arms}):
            members = torch.cat([bundle.members[arm.store] for arm in arms if arm.tokens == tokens])
            places = torch.unique(members).tolist()
            self._encode(pipeline.text_encoder, tokens, places)

    @torch.no_grad()
    def _latents(self, vae: Any, images: Tensor) -> Tensor:
        latents: Tensor = vae.encode(to_pixels(images.to(self.device).permute(0, 3, 1, 2)))
        return latents.to(torch.bfloat16)

    def _encode(self, encoder: Any, tokens: int, places: Sequence[int]) -> None:
        """Encode the captions of these pictures; those of LONG columns of both kinds."""
        kinds = {False: self.bundle.brief} | ({True: self.bundle.dense} if tokens == LONG else {})
        distinct = list({captions[place] for captions in kinds.values() for place in places})
        store = TextStore(encoder.layers, encoder.width, tokens, len(distinct), self.device)
        rows: dict[str, int] = {}
        for start in range(0, len(distinct), 512):
            part = sorted(distinct)[start : start + 512]
            rows |= dict(zip(part, store.add(encoder, caption_tokens(encoder, part)), strict=True))
        self.stores[tokens] = store
        for dense, captions in kinds.items():
            known = [rows.get(caption, 0) for caption in captions]
            self.rows[tokens, dense] = torch.tensor(known, device=self.device)

    def of(self, arm: Arm, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each picture of an arm: its place, and the rows of its brief and dense caption."""
        places = self.bundle.members[arm.store]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)) if arm.shuffled else ...
        sources = places[order].to(self.device)
        brief = self.rows[arm.tokens, False][sources]
        return places.to(self.device), brief, self.rows[arm.tokens, True][sources] if arm.dense else brief

    def draw(
        self, arm: Arm, rows: tuple[Tensor, Tensor, Tensor], count: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random samples: latents, text features, and their mask, all False where the caption is dropped."""
        places, brief, dense = rows
        store, device = self.stores[arm.tokens], self.device
        chosen = torch.randint(len(places), (count,), generator=rng, device=device)
        long = torch.rand(count, generator=rng, device=device) < arm.dense
        kept = torch.rand(count, generator=rng, device=device) >= DROPOUT
        texts = torch.where(long, dense[chosen], brief[chosen])
        mask = torch.arange(store.tokens, device=device) < (store.lengths[texts] * kept)[:, None]
        return self.latents[places[chosen]], store.features[texts], mask


# ---- evaluations ----------------------------------------------------------------------------------------------------


@frozen
class Questions:
    """Prompts of one split, brief or dense, with their features."""

    prompts: list[Prompt]
    text: TextFeatures

    @classmethod
    def make(cls, pipeline: LensPipeline, split: str, count: int, dense: bool) -> Questions:
        options = {"prompts": count, "split": split, "tasks": TASKS, "largest": True, "dense_prompts": dense}
        prompts = ShapesBenchmark(ShapesBenchmark.Config(**options)).prompts()  # type: ignore[arg-type]  # by name
        return cls(prompts, pipeline.encode([prompt.text for prompt in prompts]))


@define
class Trial:
    """One run: its results so far, and the pictures that are still being read."""

    run: Run
    result: dict[str, Any]
    begun: float
    step: Step | None
    shown: Any  # the averaged weights in bfloat16, which draw
    pending: list[tuple[dict[str, Any], str, Any, list[Prompt]]] = field(factory=list)
    finished: bool = False  # all is drawn

    def collect(self, wait: bool) -> bool:
        """Take over what is read; whether all of it is, and the run has ended."""
        for entry in list(self.pending):
            point, kind, handle, prompts = entry
            if not wait and not handle.ready():
                continue
            parts = handle.get(READING_SECONDS)
            point[kind] = by_task(parts, prompts)
            if point is self.result["test"]:
                values = [int(value) for part in parts for value in part]
                self.result["verdicts"][kind] = [
                    [p.task, p.data["question"], value] for p, value in zip(prompts, values, strict=True)
                ]
            self.pending.remove(entry)
        return self.finished and not self.pending


class Job:
    """One process: it trains run after run of the queue, and writes their results."""

    def __init__(self, folder: Path, out: Path, options: Options, arms: Sequence[str]) -> None:
        torch.set_num_threads(1)
        self.readers = Readers(options.readers)  # before CUDA starts
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in train_embedded.py
        self.out, self.options = out, options
        self.pipeline = LensPipeline.from_pretrained(START, dtype=torch.bfloat16, device=options.device)
        self.start, self.config = self.pipeline.backbone, self.pipeline.specs["backbone"].options
        self.samples = Samples(read_bundle(folder), self.pipeline, [ARMS[arm] for arm in arms])
        splits = (("select", options.select_prompts), ("test", options.test_prompts))
        self.questions = {
            (split, kind): Questions.make(self.pipeline, split, count, kind == "dense")
            for split, count in splits
            for kind in ("brief", "dense")
        }
        self.without_text = runpy.run_path(str(FORGET))["without_text"]
        self.open: list[Trial] = []
        self.longest = 0.0  # seconds that a run took, until it was written

    def train(self, run: Run) -> None:
        """One run. Its result is written by `collect`; nothing is left of it where the time is up before."""
        options, arm, begun = self.options, ARMS[run.arm], time.time()
        net, new = self.without_text(self.start, self.config, run.seed)
        method = FlowMatching(FlowMatching.Config(**FLOW), self.pipeline)  # type: ignore[arg-type]  # by name
        step = Step(method, net.to(self.pipeline.device), options.mode, EMA)
        step.rng.manual_seed(run.seed)
        rng = torch.Generator(step.device).manual_seed(run.seed)
        rows, group = self.samples.of(arm, run.seed), f"{arm.tokens}"
        result = {"arm": run.arm, "seed": run.seed, **options.facts, "pictures": len(rows[0]), "new_tensors": new,
                  "device": device_name(step.device), "torch": torch.__version__, "curve": [], "test": {},
                  "verdicts": {}}  # fmt: skip
        shown = copy.deepcopy(step.net).to(torch.bfloat16).eval().requires_grad_(False)
        trial = Trial(run, result, begun, step, shown)
        self.open.append(trial)
        marks = {round(options.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
        for number in range(1, options.steps + 1):
            step.lr.fill_(rate(number - 1, options.steps, options.lr))
            step(group, *self.samples.draw(arm, rows, options.batch, rng))
            if number == min(EMA_FROM, max(1, options.steps // 4)):
                step.copy(step.average, step.parameters)  # a young average would remember the first weights
            if number in marks:
                loss = step.take_losses().get(group)  # none where a recording failed on the first step
                loss = loss and round(loss, 4)
                result["curve"].append({"step": number, "loss": loss})
                self.evaluate(trial, "select", result["curve"][-1])
                self.collect()
                if time.time() > options.until:
                    self.open.remove(trial)
                    print(f"{run.name}: the time is up at step {number}; dropped", flush=True)
                    return
        result["graph"], result["training_seconds"] = step.graphed, round(time.time() - begun, 1)
        pictures = self.evaluate(trial, "test", result["test"])
        write_atomic(self.out / f"{run.name}.png", lambda path: sheet(pictures[:24], path))
        trial.finished, trial.step = True, None  # nothing more is drawn; its graph goes
        self.longest = max(self.longest, time.time() - begun)
        print(f"{run.name}: trained, {result['training_seconds']:.0f} s, loss {loss}", flush=True)

    def evaluate(self, trial: Trial, split: str, point: dict[str, Any]) -> Tensor:
        """Draw the prompts of a split with the averaged weights; they are read while training goes on. Pictures of the
        brief ones."""
        drawn: dict[str, Tensor] = {}
        assert trial.step is not None, "a run that has ended draws no more"
        with trial.step.outside():
            trial.step.copy(list(trial.shown.parameters()), trial.step.average)
            self.pipeline.backbone = trial.shown
            for kind in ("brief", "dense") if ARMS[trial.run.arm].both else ("brief",):
                questions = self.questions[split, kind]
                # From the same noise in all runs.
                seeds = range(len(questions.prompts))
                drawn[kind] = draw(self.pipeline, questions.text, seeds, SIDE, SAMPLER_STEPS, GUIDANCE)
                handle = self.readers.score(drawn[kind], questions.prompts)
                trial.pending.append((point, kind, handle, questions.prompts))
        return drawn["brief"]

    def collect(self, wait: bool = False) -> None:
        """Write the runs of which all is read. One whose pictures cannot be read is given up, and the others go on."""
        for trial in list(self.open):
            try:
                ended = trial.collect(wait)
            except Exception as error:
                self.open.remove(trial)
                print(f"{trial.run.name}: its pictures were not read: {type(error).__name__}: {error}", flush=True)
                continue
            if ended:
                self.open.remove(trial)
                seconds = time.time() - trial.begun
                self.longest = max(self.longest, seconds)
                text = json.dumps(trial.result | {"seconds": round(seconds, 1)})
                write_atomic(self.out / f"{trial.run.name}.json", partial(Path.write_text, data=text))
                scores = {kind: trial.result["test"][kind]["overall"] for kind in trial.result["test"]}
                print(f"{trial.run.name}: {json.dumps(scores)} after {seconds:.0f} s", flush=True)

    def fits(self) -> bool:
        """Whether a run as long as the longest so far would end in time."""
        return time.time() + self.longest < self.options.until

    def close(self) -> None:
        self.readers.close()


def rate(step: int, steps: int, lr: float) -> float:
    """The learning rate: a short rise, level, and a straight fall over the last half."""
    return lr * min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4)), 2 * (1 - step / steps))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- the queue ------------------------------------------------------------------------------------------------------


def queue(arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Seed by seed, so that something complete is there early; of one seed, the runs that take longest first."""
    ordered = sorted(arms, key=lambda arm: (ARMS[arm].tokens, ARMS[arm].both), reverse=True)
    return [Run(arm, seed) for seed in seeds for arm in ordered]


def missing(out: Path, runs: Sequence[Run], options: Options) -> list[Run]:
    """The runs whose results are not there. Raises LensError where one is there of other options."""
    left = []
    for run in runs:
        path = out / f"{run.name}.json"
        if not path.is_file():
            left.append(run)
            continue
        result = read_json(path)
        other = [name for name, value in options.facts.items() if result.get(name) != value]
        if other:
            raise LensError(f"{path}: is a run with another {', '.join(other)}; choose another --output")
    return left


def work(folder: Path, out: Path, options: Options, runs: Sequence[Run], next_run: Any) -> None:
    """One process: take runs from the queue until it is empty or the time is up. `next_run`: a number all share."""
    job = Job(folder, out, options, sorted({run.arm for run in runs}))
    try:
        while job.fits():
            with next_run.get_lock():
                place, next_run.value = next_run.value, next_run.value + 1
            if place >= len(runs):
                break
            try:
                job.train(runs[place])
            except Exception as error:  # one run that fails is no reason to lose the others
                print(f"{runs[place].name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
                job.open = [trial for trial in job.open if trial.finished]
        else:
            print("no time is left for another run", flush=True)
        job.collect(wait=True)
    finally:
        job.close()


def train_all(folder: Path, out: Path, options: Options, runs: Sequence[Run], jobs: int) -> int:
    """Train the runs that are missing, in `jobs` processes. How many of `runs` have no result afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    left = missing(out, runs, options)
    if left:
        context = multiprocessing.get_context("spawn")
        next_run = context.Value("i", 0)
        arguments = (folder, out, options, left, next_run)
        processes = [context.Process(target=work, args=arguments) for _ in range(min(jobs, len(left)))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return len(missing(out, runs, options))
