"""The method `diffusion_nft`: draw with the old policy, score, and learn from both good and bad (arXiv 2509.16117)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.attribution import name_of, prompts_of
from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build, options, structure
from lens_core.training.distributed import all_gather, local_micro_batches, seed_of
from lens_core.types import ConfigError, LensError, Loss, Shard, TextFeatures, move, prompts_of_tasks
from lens_core.validators import GUIDANCE, PIXELS, STEPS, WEIGHT, each, integer, one_of, real, within
from lens_nft.metrics import rollout_metrics
from lens_nft.micro_batches import MicroBatch, micro_batches, times_and_noise
from lens_nft.objective import (
    Advantages,
    advantages,
    counted_scores,
    reflected_loss,
    squared_distance,
    standard_deviations,
)
from lens_nft.policies import ema_update, policy_copy, trained_state
from lens_nft.rewards import RewardScores, score_pictures, total_spend, weighted_rewards
from lens_nft.rollout import GenerationRequest, Picture, draw, prompt_indices, with_backbone

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.recipe import Recipe
    from lens_nft.estimate import Estimate

PATIENCE = 5  # rollouts in a row that rewards may spoil before the run stops


class DiffusionNFT:
    """Reinforcement learning from rewards on the model's own pictures (DiffusionNFT).

    Policy optimisation on the forward process: no likelihoods, any sampler, one velocity loss.

    A rollout is `prompts_per_rollout` prompts, `pictures_per_prompt` each, drawn by the *old* policy: a copy of the
    backbone that follows it slowly. Which prompts, their sizes, every noise and every time is a function of the
    run's seed, the rollout's number, the prompt's id and the picture's number, so nothing depends on micro-batches,
    and a resumed run needs two counters. The dataset is not read: a benchmark brings the prompts, whose facts rewards
    may need. Several processes divide the prompts of a rollout: a group stays whole, on one process.
    """

    shards_itself = True

    @frozen
    class Config:
        prompts: ComponentSpec  # a benchmark whose prompts are learned from, as in {use: shapes, split: train}
        # Rewards: [{use: rubric, …, weight: 1.0, fallback: {use: …}}]; weight and fallback may be left out.
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
        timesteps_per_image: int = field(default=9, validator=integer(at_least=1))
        # The pictures of a prompt share times and noises: what they share cancels in the sum.
        common_noise: bool = False
        updates_per_rollout: int = field(
            default=1, validator=integer(at_least=1)
        )  # optimizer steps a rollout, a part of it each
        micro_batch_size: int = field(default=8, validator=integer(at_least=1))  # pictures drawn, or learned, at once
        # x0: self-normalised, as in the paper's code; velocity: as in its text.
        loss_space: Literal["x0", "velocity"] = field(default="x0", validator=one_of("x0", "velocity"))
        # How far the velocity is mirrored beyond the old one; smaller is faster and less stable.
        beta: float = field(default=0.1, validator=real(above=0))
        # Advantages beyond this, in standard deviations, count as this.
        advantage_clip: float = field(default=5.0, validator=real(above=0))
        # Weight of the KL penalty, the squared distance to the reference policy's velocity; 0 keeps no reference.
        kl: float = field(default=1e-4, validator=WEIGHT)
        # Over what rewards' standard deviation is taken.
        std_scope: Literal["group", "rollout"] = field(default="group", validator=one_of("group", "rollout"))
        # Several rewards.
        combine: Literal["normalise_then_sum", "sum_then_normalise"] = field(
            default="normalise_then_sum", validator=one_of("normalise_then_sum", "sum_then_normalise")
        )
        # Least standard deviation, in the reward's units; for a noisy reward, the noise of one score.
        min_std: float = field(default=1e-4, validator=real(above=0))
        # Optimizer steps for which old is simply the policy of the last rollout.
        old_policy_wait: int = field(default=0, validator=integer(at_least=0))
        # By how much its decay grows a step from then on: old = decay old + (1 - decay) policy.
        old_policy_decay_rise: float = field(default=0.001, validator=real(at_least=0))
        old_policy_max_decay: float = field(default=0.5, validator=within(0, 1))  # up to which decay; 1 freezes it
        # Share of failed scores beyond which a rollout is thrown away.
        max_failed: float = field(default=0.05, validator=within(0, 1))

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """(path, kind, use) of every component that these options name: they are checked with the recipe."""
            yield "prompts", "benchmark", self.prompts
            for i, use in enumerate(self.rewards):
                of_reward = {k: v for k, v in use.options.items() if k not in ("weight", "fallback")}
                yield f"rewards[{i}]", "reward", ComponentSpec(use.use, of_reward)
                if use.options.get("fallback") is not None:
                    path = f"rewards[{i}].fallback"
                    yield path, "reward", structure(_Named, {"use": use.options["fallback"]}).use

        def old_policy_decay(self, steps: int) -> float:
            """How much of the old policy stays after `steps` optimizer steps: 0 copies the new one, 1 keeps the old."""
            return min(self.old_policy_decay_rise * max(0, steps - self.old_policy_wait), self.old_policy_max_decay)

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        absent = [p for p in ("vae", "text_encoder", "backbone", "sampler") if getattr(pipeline, p) is None]
        if absent:
            raise ConfigError(f"diffusion_nft: the pipeline has no {absent[0]}; start from a checkpoint that can draw")
        self.config, self.pipeline = config, pipeline
        catalog = getattr(pipeline, "catalog", None) or Catalog.installed()  # a pipeline made by hand has none
        parts = _parts(config, catalog)
        _, benchmark, options = parts["prompts"]
        self.prompts = prompts_of_tasks(prompts_of(benchmark(options)), config.tasks)
        if len({p.id for p in self.prompts}) < len(self.prompts):
            raise ConfigError(f"diffusion_nft: {config.prompts.use} has prompts of one id; a group is known by its id")
        if len(self.prompts) < config.prompts_per_rollout:
            raise ConfigError(
                f"diffusion_nft: {config.prompts.use} has {len(self.prompts)} prompts, fewer than a rollout takes "
                f"({config.prompts_per_rollout}); ask it for more, or lower prompts_per_rollout"
            )
        self.rewards = weighted_rewards(config.rewards, parts)
        named = [f"backbone/reward/{one.name}" for one in self.rewards][:2]
        self.headline = (*named, "backbone/policy", "backbone/zero_variance", "backbone/diversity")
        for one in self.rewards:
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
        # The shards of this rollout that were drawn and wait to be learned, by their index.
        self._drawn: dict[int, tuple[list[Picture], RewardScores]] = {}
        self._scales: tuple[int, list[float]] = (-1, [])  # a rollout's number, and its rewards' standard deviations

    # Copies are made when first asked for, which is before the first step: by then the loop has put adapters in place.

    @cached_property
    def old(self) -> nn.Module:
        """The policy that draws, and the centre of the reflection."""
        return policy_copy(self.pipeline.backbone)

    @cached_property
    def reference(self) -> nn.Module | None:
        """The reference policy of the KL penalty: the backbone as the run began with it. None without a penalty."""
        return policy_copy(self.pipeline.backbone) if self.config.kl else None

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        backbone: Any = self.pipeline.backbone
        return {"backbone": backbone}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The reference policy. The old policy changes, so it is not among them."""
        return {"reference": self.reference} if self.reference is not None else {}

    def steps(
        self, batches: Iterator[Any], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[MicroBatch]]:
        """A rollout, then its optimizer steps. `rng` gives the run's seed alone, `batches` the part of each rollout.

        Raises LensError where a reward spoils rollout after rollout, ConfigError where prompts cannot be shared out.
        """
        shard = next(batches, Shard())
        if self.config.prompts_per_rollout % shard.count:
            raise ConfigError(
                f"diffusion_nft: {self.config.prompts_per_rollout} prompts have no equal shares for {shard.count} "
                "parts; change prompts_per_rollout, or the number of processes"
            )
        _ = self.old, self.reference
        while True:
            pictures, scores, advantage = self._scored(rng.initial_seed(), shard)
            updates = micro_batches(pictures, advantage, self._metrics(pictures, scores, advantage), self.config)
            yield from updates[self.update :]  # a run that stopped between them draws the same pictures again

    def _scored(self, seed: int, shard: Shard) -> tuple[list[Picture], RewardScores, Advantages]:
        """This shard of the rollout, and its advantages."""
        if self.config.std_scope == "group" or shard.count == 1:
            pictures, scores = self._accepted(seed, shard)
            return pictures, scores, self._advantages(pictures, scores)
        # Standard deviations of the whole rollout need every shard's scores: each process draws all of its shards
        # first, and the processes exchange their scores once a rollout.
        if self._scales[0] != self.rollout:
            self._drawn = {n: self._accepted(seed, Shard(n, shard.count)) for n in local_micro_batches(shard.count)}
            local = [counted_scores(*self._score_arrays(*part)) for part in self._drawn.values()]
            self._scales = self.rollout, standard_deviations([part for other in all_gather(local) for part in other])
        drawn = self._drawn.pop(shard.index, None)
        pictures, scores = drawn or self._accepted(seed, shard)
        return pictures, scores, self._advantages(pictures, scores, self._scales[1])

    def _accepted(self, seed: int, shard: Shard) -> tuple[list[Picture], RewardScores]:
        """Pictures, drawn again until their scores leave enough to learn from."""
        for attempt in range(PATIENCE):
            pictures = self._draw(seed, shard, attempt)
            scores = score_pictures(self.rewards, pictures)
            enough = float(scores.failed().double().mean()) <= self.config.max_failed
            if enough and self._advantages(pictures, scores).valid.any():
                return pictures, scores
            self.aborted += 1
        raise LensError(
            f"diffusion_nft: {PATIENCE} rollouts in a row had too few scores to learn from; the reward "
            f"{scores.first_missing()}: fix it, and the same command goes on"
        )

    def _score_arrays(
        self, pictures: Sequence[Picture], scores: RewardScores
    ) -> tuple[Tensor, Tensor, list[int], Sequence[float], bool]:
        """values, failed, groups, weights and sum_first, as `objective` takes them."""
        groups, sum_first = [p.prompt.id for p in pictures], self.config.combine == "sum_then_normalise"
        return scores.values(), scores.failed(), groups, scores.weights, sum_first

    def _advantages(
        self, pictures: Sequence[Picture], scores: RewardScores, scales: Sequence[float] | None = None
    ) -> Advantages:
        values, failed, groups, weights, sum_first = self._score_arrays(pictures, scores)
        over_rollout = self.config.std_scope == "rollout"
        return advantages(values, failed, groups, weights, self.config.min_std, over_rollout, sum_first, scales)

    def update_order(self, step: int) -> Sequence[str]:
        return ("backbone",)

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Loss:
        """The policy loss and the KL penalty. Times and noise are the pictures' own, so `rng` is not used."""
        config = self.config
        z = torch.stack([s.picture.z for s in batch.samples])
        t, noise = (move(part, z.device) for part in self._times_and_noise(batch))
        r = move(torch.tensor([s.r for s in batch.samples]), z.device)
        text = TextFeatures.cat([s.picture.text for s in batch.samples])
        x = flow.mix(z, noise, t)
        v = self._velocity(modules[module_name], x, t, text)
        with torch.no_grad():
            old = self._velocity(self.old, x, t, text)
            reference = self._velocity(self.reference, x, t, text) if self.reference is not None else None
        target, normalise = flow.velocity(z, noise), config.loss_space == "x0"
        policy = batch.share * reflected_loss(
            v, old, target, t, r, beta=config.beta, clip=config.advantage_clip, normalise=normalise
        )
        total = policy.sum()
        parts = {"policy": total, "to_old": batch.share * squared_distance(v, old).sum()}
        if reference is not None:
            parts["to_reference"] = batch.share * squared_distance(v, reference).sum()
            total = total + config.kl * parts["to_reference"]
        return Loss(total, {**{k: p.detach() for k, p in parts.items()}, **batch.metrics})

    def after_step(self, step: int, modules: Mapping[str, nn.Module]) -> None:
        """Old follows the backbone once a rollout, after its updates."""
        self.update += 1
        if self.update < self.config.updates_per_rollout:
            return
        self.rollout, self.update = self.rollout + 1, 0
        ema_update(self.old, modules["backbone"], self.config.old_policy_decay(step + 1))

    def state_dict(self) -> dict[str, Any]:
        """The counters, the old policy, and the start: the checkpoint that it came from may change or vanish. Of a
        policy that learns through an adapter, the adapter: the rest is the start, which the run needs anyway."""
        tensors = {f"old/{k}": v for k, v in trained_state(self.old).items()}
        if self.reference is not None and len(tensors) == len(self.old.state_dict()):
            tensors |= {f"reference/{k}": v for k, v in self.reference.state_dict().items()}
        return {"rollout": self.rollout, "update": self.update, "aborted": self.aborted, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollout, self.update, self.aborted = (int(state[k]) for k in ("rollout", "update", "aborted"))
        for name, net in (("old/", self.old), ("reference/", self.reference)):
            stored = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
            if net is not None and stored:
                net.load_state_dict(stored, strict=len(stored) == len(net.state_dict()))

    def _draw(self, seed: int, shard: Shard, attempt: int) -> list[Picture]:
        """The part of this rollout that falls to `shard`; another `attempt` draws the same prompts from other seeds."""
        config, number = self.config, self.rollout
        requests = []
        indices = prompt_indices(len(self.prompts), config.prompts_per_rollout, number, seed)
        for index in indices[shard.index :: shard.count]:
            prompt = self.prompts[index]
            size = self.sizes[seed_of(seed, number, prompt.id) % len(self.sizes)]
            again = (attempt,) if attempt else ()
            requests += [
                GenerationRequest(prompt, seed_of(seed, number, prompt.id, k, *again), size)
                for k in range(config.pictures_per_prompt)
            ]
        actor = with_backbone(self.pipeline, self.old)
        return draw(actor, requests, config.rollout_steps, config.rollout_guidance, config.micro_batch_size)

    def _times_and_noise(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        grid = batch.samples[0].picture.z.shape[-2:]
        schedule = self.pipeline.sampler.times(grid, self.config.rollout_steps)
        return times_and_noise(batch, schedule, self.config.timesteps_per_image)

    def _velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return with_backbone(self.pipeline, net).velocity(text, None, self.config.train_guidance)(x, t)

    def _metrics(self, pictures: Sequence[Picture], scores: RewardScores, advantage: Advantages) -> dict[str, Tensor]:
        """What is logged with each step of this rollout."""
        config = self.config
        metrics = rollout_metrics(pictures, scores, advantage, config.advantage_clip) | total_spend(self.rewards)
        metrics["aborted"] = float(self.aborted)
        metrics["pictures"] = float((self.rollout + 1) * config.prompts_per_rollout * config.pictures_per_prompt)
        return {k: torch.tensor(v) for k, v in metrics.items()}

    @staticmethod
    def estimate(config: Any, recipe: Recipe, catalog: Catalog) -> Estimate:
        """What a run by `recipe` would need: memory by part, pictures, calls, dollars. Draws and sends nothing."""
        from lens_nft.estimate import estimate

        return estimate(config, recipe, catalog)


@frozen
class _Named:
    use: ComponentSpec


def _parts(config: DiffusionNFT.Config, catalog: Catalog) -> dict[str, tuple[str, type[Any], Any]]:
    """(name, class, config) of every component that the config names, by path."""
    return {path: build(catalog, kind, use, f"$.method.{path}") for path, kind, use in config.uses()}
