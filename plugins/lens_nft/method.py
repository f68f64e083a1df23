"""The method `diffusion_nft`: draw with the old policy, judge, and learn from both good and bad (arXiv 2509.16117)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.attribution import name_of, prompts_of
from lens_core.catalog import Catalog
from lens_core.inference import lora
from lens_core.recipe import ComponentSpec, build, options, structure
from lens_core.training.distributed import gathered, own_parts, seed_of
from lens_core.types import ConfigError, LensError, Loss, Place, Prompt, TextFeatures, did_you_mean, move
from lens_core.validators import GUIDANCE, PIXELS, STEPS, WEIGHT, each, integer, one_of, real, within
from lens_nft.objective import (
    Advantages,
    advantages,
    heard,
    optimality,
    reflected_loss,
    spreads,
    squared_distance,
)
from lens_nft.panel import Judge, Verdicts, judge, spent
from lens_nft.rollout import Order, Picture, acting, alike, chosen, diversity, draw

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.recipe import Recipe
    from lens_nft.estimate import Estimate

PATIENCE = 5  # rollouts in a row that a judge may spoil before the run stops
BINS = ("0.0", "0.2", "0.4", "0.6", "0.8")  # where the fifths of r's range begin, for its histogram


@frozen
class Sample:
    """A judged picture to learn from: its optimality r is 1/2 + A / (2 advantage_clip); `seed` gives times, noises."""

    picture: Picture
    r: float
    seed: int


@frozen
class Lesson:
    """A micro-batch: samples of one size, each at one time of the schedule's part `turn`.

    `share` makes sums over its samples into parts of the step's mean; `facts` are logged.
    """

    samples: tuple[Sample, ...]
    turn: int
    share: float
    facts: Mapping[str, Tensor]


class DiffusionNFT:
    """Policy optimisation on the forward process: no likelihoods, any sampler, one velocity loss.

    A rollout is `prompts_per_rollout` prompts, `pictures_per_prompt` each, drawn by the *old* policy: a copy of the
    backbone that follows it with a lag. Which prompts, their sizes, every noise and every time is a function of the
    run's seed, the rollout's number, the prompt's id and the picture's number, so nothing depends on micro-batches,
    and a resumed run needs two counters. The dataset is not read: a benchmark brings the prompts, whose facts rewards
    may need. A step that is divided has its prompts shared out: a group stays whole, and each part judges its own.
    """

    divides = True

    @frozen
    class Config:
        prompts: ComponentSpec  # a benchmark whose prompts are learned from, as in {use: shapes, split: train}
        # Judges: [{use: rubric, …, weight: 1.0, fallback: {use: …}}]; weight and fallback may be left out.
        rewards: tuple[ComponentSpec, ...] = field(validator=each(options(weight=real(above=0)), at_least=1))
        tasks: tuple[str, ...] = ()  # of the benchmark's tasks, those whose prompts are used; (): all
        prompts_per_rollout: int = field(default=48, validator=integer(at_least=1))
        pictures_per_prompt: int = field(default=24, validator=integer(at_least=2))  # a group of one has no advantage
        # Height, width px, one for each prompt of a rollout; (): the preset.
        sizes: tuple[tuple[int, int], ...] = field(default=(), validator=each(each(PIXELS)))
        rollout_steps: int = field(default=20, validator=STEPS)
        rollout_guidance: float = field(default=1.0, validator=GUIDANCE)
        train_guidance: float = field(default=1.0, validator=GUIDANCE)
        # At how many times t each picture is learned, spread over the sampler's schedule.
        times: int = field(default=9, validator=integer(at_least=1))
        # The pictures of a prompt share times and noises: what they share cancels in the sum.
        common_noise: bool = False
        updates: int = field(default=1, validator=integer(at_least=1))  # optimizer steps a rollout, a part of it each
        batch: int = field(default=8, validator=integer(at_least=1))  # pictures drawn, or learned, at once
        # x0: self-normalised, as in the paper's code; velocity: as in its text.
        form: Literal["x0", "velocity"] = field(default="x0", validator=one_of("x0", "velocity"))
        # How far the velocity is mirrored beyond the old one; smaller is faster and less stable.
        beta: float = field(default=0.1, validator=real(above=0))
        # Advantages beyond this, in standard deviations, count as this.
        advantage_clip: float = field(default=5.0, validator=real(above=0))
        # Weighs the squared distance to the velocity at the start; 0 keeps no copy of it.
        kl: float = field(default=1e-4, validator=WEIGHT)
        # Over what rewards' standard deviation is taken.
        spread: Literal["group", "rollout"] = field(default="group", validator=one_of("group", "rollout"))
        # Several rewards.
        combine: Literal["normalise_then_sum", "sum_then_normalise"] = field(
            default="normalise_then_sum", validator=one_of("normalise_then_sum", "sum_then_normalise")
        )
        # Least standard deviation, in the reward's units; the noise of a judge that has some.
        floor: float = field(default=1e-4, validator=real(above=0))
        # Optimizer steps for which old is simply the policy of the last rollout.
        old_wait: int = field(default=0, validator=integer(at_least=0))
        # By how much its lag grows a step from then on: old = lag old + (1 - lag) policy.
        old_rise: float = field(default=0.001, validator=real(at_least=0))
        old_limit: float = field(default=0.5, validator=within(0, 1))  # up to which lag; 1 freezes it
        # Share of failed verdicts beyond which a rollout is thrown away.
        max_failed: float = field(default=0.05, validator=within(0, 1))

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """(path, kind, use) of every component that these options name: they are checked with the recipe."""
            yield "prompts", "benchmark", self.prompts
            for i, use in enumerate(self.rewards):
                own = {k: v for k, v in use.options.items() if k not in ("weight", "fallback")}
                yield f"rewards[{i}]", "reward", ComponentSpec(use.use, own)
                if use.options.get("fallback") is not None:
                    path = f"rewards[{i}].fallback"
                    yield path, "reward", structure(_Named, {"use": use.options["fallback"]}).use

        def lag(self, steps: int) -> float:
            """How much of the old policy stays after `steps` optimizer steps: 0 copies the new one, 1 keeps the old."""
            return min(self.old_rise * max(0, steps - self.old_wait), self.old_limit)

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        absent = [p for p in ("vae", "text_encoder", "backbone", "sampler") if getattr(pipeline, p) is None]
        if absent:
            raise ConfigError(f"diffusion_nft: the pipeline has no {absent[0]}; start from a checkpoint that can draw")
        self.config, self.pipeline = config, pipeline
        catalog = getattr(pipeline, "catalog", None) or Catalog.installed()  # a pipeline made by hand has none
        parts = _parts(config, catalog)
        _, benchmark, options = parts["prompts"]
        self.prompts = _of_tasks(prompts_of(benchmark(options)), config.tasks)
        if len({p.id for p in self.prompts}) < len(self.prompts):
            raise ConfigError(f"diffusion_nft: {config.prompts.use} has prompts of one id; a group is known by its id")
        if len(self.prompts) < config.prompts_per_rollout:
            raise ConfigError(
                f"diffusion_nft: {config.prompts.use} has {len(self.prompts)} prompts, fewer than a rollout takes "
                f"({config.prompts_per_rollout}); ask it for more, or lower prompts_per_rollout"
            )
        self.judges = _judges(config, parts)
        for one in self.judges:
            for key in getattr(one.reward, "needs", ()):
                if not any(key in prompt.data for prompt in self.prompts):
                    raise ConfigError(
                        f"diffusion_nft: the reward {name_of(one.reward)} needs {key} with each prompt, and no prompt "
                        f"of {config.prompts.use} has any; use prompts that do, or another reward"
                    )
        self.sizes = [pipeline.size(*size) for size in config.sizes] or [pipeline.size()]
        self.rollout = 0  # its number
        self.update = 0  # optimizer steps made with this rollout
        self.aborted = 0  # rollouts thrown away and drawn again
        self._drawn: dict[int, tuple[list[Picture], Verdicts]] = {}  # parts of this rollout that wait for their turn
        self._scales: tuple[int, list[float]] = (-1, [])  # a rollout's number, and its rewards' standard deviations

    # Copies are made when first asked for, which is before the first step: by then the loop has put adapters in place.

    @cached_property
    def old(self) -> nn.Module:
        """The policy that draws, and the centre of the reflection."""
        return _frozen(self.pipeline.backbone)

    @cached_property
    def base(self) -> nn.Module | None:
        """The backbone as the run began with it; None where nothing is kept near it."""
        return _frozen(self.pipeline.backbone) if self.config.kl else None

    def roles(self) -> Mapping[str, nn.Module]:
        backbone: Any = self.pipeline.backbone
        return {"backbone": backbone}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The backbone as the run began with it. The old policy changes, and is none of them."""
        return {"base": self.base} if self.base is not None else {}

    def steps(
        self, batches: Iterator[Any], nets: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Lesson]]:
        """A rollout, then its optimizer steps. `rng` gives the run's seed alone, `batches` the part of each rollout.

        Raises LensError where a judge spoils rollout after rollout, ConfigError where prompts cannot be shared out.
        """
        place = next(batches, Place())
        if self.config.prompts_per_rollout % place.parts:
            raise ConfigError(
                f"diffusion_nft: {self.config.prompts_per_rollout} prompts have no equal shares for {place.parts} "
                "parts; change prompts_per_rollout, or the number of processes"
            )
        _ = self.old, self.base
        while True:
            pictures, verdicts, found = self._judged(rng.initial_seed(), place)
            parts = self._lessons(pictures, found, self._facts(pictures, verdicts, found))
            yield from parts[self.update :]  # a run that stopped between them draws the same pictures again

    def _judged(self, seed: int, place: Place) -> tuple[list[Picture], Verdicts, Advantages]:
        """The part of this rollout that falls to `place`, and its advantages. Where they need the spread of the whole
        rollout, all of this process's parts are drawn first, and the processes tell each other their verdicts."""
        if self.config.spread == "group" or place.parts == 1:
            pictures, verdicts = self._accepted(seed, place)
            return pictures, verdicts, self._advantages(pictures, verdicts)
        if self._scales[0] != self.rollout:
            self._drawn = {n: self._accepted(seed, Place(n, place.parts)) for n in own_parts(place.parts)}
            mine = [heard(*self._verdicts(*part)) for part in self._drawn.values()]
            self._scales = self.rollout, spreads([part for theirs in gathered(mine) for part in theirs])
        pictures, verdicts = self._drawn.pop(place.part, None) or self._accepted(seed, place)
        return pictures, verdicts, self._advantages(pictures, verdicts, self._scales[1])

    def _accepted(self, seed: int, place: Place) -> tuple[list[Picture], Verdicts]:
        """Pictures, drawn again until their judges leave enough to learn from."""
        for attempt in range(PATIENCE):
            pictures = self._draw(seed, place, attempt)
            verdicts = judge(self.judges, pictures)
            enough = float(verdicts.failed().double().mean()) <= self.config.max_failed
            if enough and self._advantages(pictures, verdicts).valid.any():
                return pictures, verdicts
            self.aborted += 1
        raise LensError(_lament(verdicts, PATIENCE))

    def _verdicts(
        self, pictures: Sequence[Picture], verdicts: Verdicts
    ) -> tuple[Tensor, Tensor, list[int], Sequence[float], bool]:
        """values, failed, groups, weights and sum_first, as `objective` takes them."""
        groups, sum_first = [p.prompt.id for p in pictures], self.config.combine == "sum_then_normalise"
        return verdicts.values(), verdicts.failed(), groups, verdicts.weights, sum_first

    def _advantages(
        self, pictures: Sequence[Picture], verdicts: Verdicts, scales: Sequence[float] | None = None
    ) -> Advantages:
        *about, sum_first = self._verdicts(pictures, verdicts)
        over_all = self.config.spread == "rollout"
        return advantages(*about, self.config.floor, over_all, sum_first, scales)

    def turns(self, step: int) -> Sequence[str]:
        return ("backbone",)

    def loss(self, role: str, nets: Mapping[str, nn.Module], batch: Lesson, rng: torch.Generator) -> Loss:
        """The reflected loss, and kl times the squared distance to the start. Times and noise are the samples' own."""
        config = self.config
        z = torch.stack([s.picture.z for s in batch.samples])
        t, noise = (move(part, z.device) for part in self._noise(batch))
        r = move(torch.tensor([s.r for s in batch.samples]), z.device)
        text = TextFeatures.cat([s.picture.text for s in batch.samples])
        x = flow.mix(z, noise, t)
        v = self._velocity(nets[role], x, t, text)
        with torch.no_grad():
            old = self._velocity(self.old, x, t, text)
            base = self._velocity(self.base, x, t, text) if self.base is not None else None
        target, normalise = flow.velocity(z, noise), config.form == "x0"
        policy = batch.share * reflected_loss(
            v, old, target, t, r, beta=config.beta, clip=config.advantage_clip, normalise=normalise
        )
        total = policy.sum()
        parts = {"policy": total, "to_old": batch.share * squared_distance(v, old).sum()}
        if base is not None:
            parts["to_base"] = batch.share * squared_distance(v, base).sum()
            total = total + config.kl * parts["to_base"]
        return Loss(total, {**{k: p.detach() for k, p in parts.items()}, **batch.facts})

    def after_step(self, step: int, nets: Mapping[str, nn.Module]) -> None:
        """Old follows the backbone once a rollout, after its updates."""
        self.update += 1
        if self.update < self.config.updates:
            return
        self.rollout, self.update = self.rollout + 1, 0
        follow(self.old, nets["backbone"], self.config.lag(step + 1))

    def state_dict(self) -> dict[str, Any]:
        """The counters, the old policy, and the start: the checkpoint that it came from may change or vanish. Of a
        policy that learns through an adapter, the adapter: the rest is the start, which the run needs anyway."""
        tensors = {f"old/{k}": v for k, v in _learned(self.old).items()}
        if self.base is not None and len(tensors) == len(self.old.state_dict()):
            tensors |= {f"base/{k}": v for k, v in self.base.state_dict().items()}
        return {"rollout": self.rollout, "update": self.update, "aborted": self.aborted, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout, self.update, self.aborted = (int(state[k]) for k in ("rollout", "update", "aborted"))
        for name, net in (("old/", self.old), ("base/", self.base)):
            found = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
            if net is not None and found:
                net.load_state_dict(found, strict=len(found) == len(net.state_dict()))

    def _draw(self, seed: int, place: Place, attempt: int) -> list[Picture]:
        """The part of this rollout that falls to `place`; another `attempt` draws the same prompts from other seeds."""
        config, number = self.config, self.rollout
        orders = []
        for index in chosen(len(self.prompts), config.prompts_per_rollout, number, seed)[place.part :: place.parts]:
            prompt = self.prompts[index]
            size = self.sizes[seed_of(seed, number, prompt.id) % len(self.sizes)]
            again = (attempt,) if attempt else ()
            orders += [
                Order(prompt, seed_of(seed, number, prompt.id, k, *again), size)
                for k in range(config.pictures_per_prompt)
            ]
        actor = acting(self.pipeline, self.old)
        return draw(actor, orders, config.rollout_steps, config.rollout_guidance, config.batch)

    def _lessons(
        self, pictures: Sequence[Picture], found: Advantages, facts: Mapping[str, Tensor]
    ) -> list[list[Lesson]]:
        """The micro-batches of each update. Pictures of flat groups teach nothing, but count in the mean."""
        config = self.config
        r = optimality(found.value, config.advantage_clip).tolist()
        first = {p.prompt.id: p.seed for p in reversed(pictures)}
        seeds = [first[p.prompt.id] if config.common_noise else p.seed for p in pictures]
        learned = zip(pictures, r, seeds, found.valid & ~found.flat, strict=True)
        # In the order of their seeds: a shuffle that an absent picture leaves alone.
        samples = sorted((Sample(p, q, s) for p, q, s, learn in learned if learn), key=lambda s: s.picture.seed)
        whole = int(found.valid.sum()) * config.times / config.updates
        updates = []
        for part in range(config.updates):
            mine = samples[part :: config.updates]
            blocks = [tuple(mine[i] for i in rows) for rows in alike(mine, lambda s: s.picture.z.shape, config.batch)]
            count = len(blocks) * config.times
            lessons = [Lesson(b, turn, count / whole, facts) for b in blocks for turn in range(config.times)]
            # Where nothing differs there is nothing to learn: a step of zero gradient, whose facts are logged.
            updates.append(lessons or [Lesson((Sample(pictures[0], 0.5, seeds[0]),), 0, 0.0, facts)])
        return updates

    def _noise(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """(t [B], noise [B,C,h,w]) of a lesson, each row from its sample's seed."""
        shape = lesson.samples[0].picture.z.shape
        schedule = self.pipeline.sampler.times(shape[-2:], self.config.rollout_steps)
        times, noises = [], []
        for sample in lesson.samples:
            rng = torch.Generator().manual_seed(seed_of(sample.seed, lesson.turn))
            times.append((lesson.turn + torch.rand((), generator=rng)) / self.config.times)
            noises.append(torch.randn(shape, generator=rng))
        return between(schedule.cpu(), torch.stack(times)), torch.stack(noises)

    def _velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return acting(self.pipeline, net).velocity(text, None, self.config.train_guidance)(x, t)

    def _facts(self, pictures: Sequence[Picture], verdicts: Verdicts, found: Advantages) -> dict[str, Tensor]:
        """What to watch: rewards and their components, what had no verdict, what was flat, the spread of r, spend."""
        facts = verdicts.facts() | spent(self.judges)
        facts["failed"] = float(verdicts.failed().double().mean())
        facts["masked"] = float((~found.valid).double().mean())
        heard = {p.prompt.id for p, valid in zip(pictures, found.valid.tolist(), strict=True) if valid}
        facts["masked_groups"] = 1 - len(heard) / len({p.prompt.id for p in pictures})
        facts["flat"] = float(found.flat.double().sum() / found.valid.double().sum())
        r = optimality(found.value[found.valid], self.config.advantage_clip)
        facts |= {f"r_{q}": float(r.quantile(q / 100)) for q in (10, 50, 90)}
        shares = r.histc(len(BINS), 0, 1) / len(r)
        facts |= {f"r_in/{name}": float(share) for name, share in zip(BINS, shares, strict=True)}
        facts |= {"diversity": diversity(pictures), "aborted": float(self.aborted)}
        facts["pictures"] = float(
            (self.rollout + 1) * self.config.prompts_per_rollout * self.config.pictures_per_prompt
        )
        return {k: torch.tensor(v) for k, v in facts.items()}

    @staticmethod
    def estimate(config: Any, recipe: Recipe, catalog: Catalog) -> Estimate:
        """What a run by `recipe` would need: memory by part, pictures, calls, dollars. Draws and sends nothing."""
        from lens_nft.estimate import estimate

        return estimate(config, recipe, catalog)


@frozen
class _Named:
    use: ComponentSpec


def _of_tasks(prompts: Sequence[Prompt], tasks: Sequence[str]) -> list[Prompt]:
    known = {p.task for p in prompts}
    for task in tasks:
        if task not in known:
            raise ConfigError(f"diffusion_nft: no task of the prompts is called {task!r}.{did_you_mean(task, known)}")
    return [p for p in prompts if not tasks or p.task in tasks]


def _parts(config: DiffusionNFT.Config, catalog: Catalog) -> dict[str, tuple[str, type[Any], Any]]:
    """(name, class, config) of every component that the config names, by path."""
    return {path: build(catalog, kind, use, f"$.method.{path}") for path, kind, use in config.uses()}


def _judges(config: DiffusionNFT.Config, parts: Mapping[str, tuple[str, type[Any], Any]]) -> list[Judge]:
    """The rewards by the name they are logged under. `weight` and `fallback` are the method's, the rest is theirs."""
    judges: list[Judge] = []
    for i, use in enumerate(config.rewards):
        name, reward, options = parts[f"rewards[{i}]"]
        short = name.partition(":")[2]
        short = f"{short}_{i}" if short in {j.name for j in judges} else short
        _, other, others = parts.get(f"rewards[{i}].fallback", ("", None, None))
        weight = float(use.options.get("weight", 1.0))
        judges.append(Judge(short, reward(options), weight, other(others) if other else None))
    return judges


def _learned(net: nn.Module) -> dict[str, Tensor]:
    """The state of the net's adapters if it has any, else all of it."""
    state: dict[str, Tensor] = net.state_dict()
    return {k: v for k, v in state.items() if lora.owned(k)} or state


def _frozen(net: nn.Module) -> nn.Module:
    """`net` once more, frozen. Of one that learns through adapters, these alone are copied: what they stand beside does
    not change, and is held once."""
    named = [*net.named_parameters(), *net.named_buffers()]
    stays = {id(t): t for name, t in named if not lora.owned(name)}
    shared = stays if len(stays) < len({id(t) for _, t in named}) else {}
    return copy.deepcopy(net, shared).requires_grad_(False).eval()


@torch.no_grad()
def follow(old: nn.Module, new: nn.Module, lag: float) -> None:
    """old = lag old + (1 - lag) new, in every weight and buffer that is not shared; what is not floating is copied."""
    fresh = new.state_dict()
    for name, value in old.state_dict().items():
        if value.data_ptr() == fresh[name].data_ptr():
            continue
        if value.dtype.is_floating_point:
            value.lerp_(fresh[name].to(value.dtype), 1 - lag)
        else:
            value.copy_(fresh[name])


def between(schedule: Tensor, u: Tensor) -> Tensor:
    """Times at the shares `u` [B] in [0, 1] of a schedule [S + 1], straight between its points."""
    place = u * (len(schedule) - 1)
    left = place.floor().long().clamp(max=len(schedule) - 2)
    return torch.lerp(schedule[left], schedule[left + 1], place - left)


def _lament(verdicts: Verdicts, times: int) -> str:
    silent = [
        (s.status, name, s.evidence)
        for name, row in verdicts.scores.items()
        for s in row
        if s is not None and s.value is None
    ]
    status, name, evidence = max(silent)  # "failed" comes after "abstain"
    return (
        f"diffusion_nft: {times} rollouts in a row had too few verdicts to learn from; the reward {name} says "
        f"{status} ({evidence or 'no reason given'}): mend it, and the same command goes on"
    )
