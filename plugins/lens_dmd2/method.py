"""The method `dmd2`: distribution matching distillation, joint or decoupled, with what keeps it stable.

DMD2 (Yin et al., 2024), Decoupled DMD (Liu et al., 2025), SenseFlow (Ge et al., 2025; IDA and ISG) and approximate R1
(Lin et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.attribution import latents_of
from lens_core.checkpoints import packed_linear
from lens_core.flow import Velocity
from lens_core.inference.pixels import to_pixels
from lens_core.protocols import dtype_of
from lens_core.training.frozen_weights import frozen_copy
from lens_core.types import Batch, ConfigError, LensError, Loss, TextFeatures, move
from lens_core.validators import GUIDANCE, PIXELS, STEPS, WEIGHT, each, integer, one_of, optional, real, text, within
from lens_dmd2 import losses
from lens_dmd2.heads import HEADS, Heads
from lens_dmd2.losses import MATCHINGS, NOISE_LEVELS, MatchingOptions, Schedule, Views
from lens_dmd2.rollout import ROLLOUTS
from lens_dmd2.student import check_teacher, empty_text, grid_of, teacher_of, text_of_batch, velocity_of

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


@frozen
class ExitStep:
    """The step of the student that an update learns: step `count`, begun at a noised picture (`real`) or at what the
    steps before it made."""

    count: int
    real: bool = False


@frozen
class MicroBatch:
    """A micro-batch: the captions' text, the latent grid (h, w) to draw at, real latents z [B,C,h,w] for a GAN, and
    the weight of its losses (`Batch.weight`).

    Each loss takes the next of `exit_steps`, or draws its own where none is left. They are drawn once for the
    whole batch: an exit step decides the number of passes, and with FSDP every process must make as many, or all would
    hang.
    """

    text: TextFeatures
    size: tuple[int, int]
    z: Tensor | None = None
    weight: float = 1.0
    exit_steps: Iterator[ExitStep] = field(factory=lambda: iter(()), eq=False)

    def __len__(self) -> int:
        return len(self.text)


class DMD2:
    """Distil the pipeline into a student of few steps without guidance (DMD2).

    The pipeline's backbone becomes the student of `steps` steps. As it was, it is the teacher, unless `teacher` names
    another checkpoint.

    A step is one update of the generator, after `fake_score_updates` of the fake score network (a copy that learns what
    the student makes) and, with a GAN, of the heads. The pipeline's presets become the student's. The teacher is not
    trained and not saved: a resumed run reads it anew, and refuses another one.
    """

    logs = True  # whether this step's values are logged; the trainer sets it

    @frozen
    class Config:
        steps: int = field(default=4, validator=STEPS)  # the student's
        # Checkpoint of the teacher, with the student's VAE and text encoder; None: the recipe's start.
        teacher: str | None = field(default=None, validator=optional(text()))
        # The teacher's; None: that of its presets.
        guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
        # ode: as the student will sample.
        rollout: str = field(default="ode", validator=one_of(*ROLLOUTS))
        matching: str = field(default="decoupled", validator=one_of(*MATCHINGS))
        ca_weight: float = field(default=1.0, validator=WEIGHT)  # weighs the decoupled gradient towards guidance
        dm_weight: float = field(default=1.0, validator=WEIGHT)  # weighs the decoupled gradient towards the teacher
        # The noise levels that everything is compared at, before `shift`.
        noise_levels: str = field(default="even", validator=one_of(*NOISE_LEVELS))
        shift: float = field(default=3.0, validator=real(above=0))  # it moves them; 1 leaves them
        # Least distance from the teacher's guess that gradients are divided by, in latent units.
        min_distance: float = field(default=0.1, validator=real(above=0))
        # Updates of the fake score network (and the heads) before each of the generator.
        fake_score_updates: int = field(default=5, validator=integer(at_least=1))
        # Steps at the start in which the generator waits for the fake.
        warmup: int = field(default=0, validator=integer(at_least=0))
        # Share of itself that the fake keeps after each update of the generator; 1: all.
        ida: float = field(default=0.97, validator=within(0, 1))
        isg_weight: float = field(default=0.0, validator=WEIGHT)  # weighs intra-segment guidance; 0: none
        # Of the discriminator in the generator's loss; 0: there is none.
        gan_weight: float = field(default=0.0, validator=WEIGHT)
        # The network whose features the discriminator reads.
        discriminator_features: str = field(default="teacher", validator=one_of("teacher", "fake"))
        # Of that network, the blocks whose features are read; needed with gan_weight.
        discriminator_blocks: tuple[int, ...] = field(default=(), validator=each(integer(at_least=0)))
        discriminator_head: str = field(default="conv", validator=one_of(*HEADS))  # on each of these blocks
        # Weighs the squared norm of the discriminator's gradient at real latents.
        r1_weight: float = field(default=0.01, validator=WEIGHT)
        # Of the differences that approximate it; below 0.03 bfloat16 rounds them away.
        r1_sigma: float = field(default=0.05, validator=real(above=0))
        # Share of draws that begin at a noised picture, not at what the student made until there.
        real_data_ratio: float = field(default=0.0, validator=within(0, 1))
        # Of generator and fake: those that stand on the teacher's weights, as adapters.
        lora_on_shared_base: tuple[str, ...] = field(default=(), validator=each(one_of("generator", "fake")))
        # px, for captions without pictures; (): the preset square.
        sizes: tuple[tuple[int, int], ...] = field(default=(), validator=each(each(PIXELS)))

        def __attrs_post_init__(self) -> None:
            problems = []
            if self.lora_on_shared_base and self.teacher is not None:
                problems.append(
                    f"dmd2: lora_on_shared_base puts adapters on the weights of the recipe's start, and the teacher is "
                    f"{self.teacher}; use one of the two"
                )
            if self.lora_on_shared_base and self.ida < 1:
                problems.append(
                    f"dmd2: ida averages whole weights, which lora_on_shared_base makes one; use ida: 1, not {self.ida}"
                )
            if self.gan_weight and not self.discriminator_blocks:
                problems.append(
                    f"dmd2: gan_weight reads discriminator_blocks of the {self.discriminator_features}; "
                    "name some, at a half and three quarters, say"
                )
            if problems:
                raise ConfigError(problems)

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:

        def shared(module_name: str, net: nn.Module) -> list[Tensor]:
            return [*net.parameters(), *net.buffers()] if module_name in config.lora_on_shared_base else []

        teacher = teacher_of("dmd2", config.teacher, pipeline, shared("generator", pipeline.backbone))
        scale = teacher.guidance_scale if config.guidance_scale is None else config.guidance_scale
        if config.matching == "decoupled" and scale == 1:
            raise ConfigError(
                "dmd2: decoupled matching learns guidance, but the teacher's guidance_scale is 1; "
                "use a guided teacher, or matching: joint"
            )
        self.config, self.pipeline, self.guidance = config, pipeline, float(scale)
        self.schedule = Schedule(config.shift, config.noise_levels)
        self.teacher = teacher.backbone
        fake = frozen_copy(self.teacher, shared("fake", self.teacher))
        if config.ida < 1 and _shapes(fake) != _shapes(pipeline.backbone):
            raise ConfigError(
                f"dmd2: ida averages the weights of the student and of the fake score network, a copy of the teacher; "
                f"{config.teacher} is of another size than the student; use ida: 1, not {config.ida}"
            )
        self._modules: dict[str, nn.Module] = {"generator": pipeline.backbone, "fake": fake}
        self.headline: tuple[str, ...] = ("generator/gradient_rms", "generator/x_std", "fake/unexplained")
        if config.gan_weight:
            self._modules["heads"] = self._heads()
            self.headline += ("heads/real", "heads/fake")
        self._teacher_version = teacher.version
        pipeline.presets |= {"steps": config.steps, "guidance_scale": 1.0}

    def _heads(self) -> nn.Module:
        if not hasattr(self.teacher, "features"):
            raise ConfigError("dmd2: gan_weight reads features, which this backbone does not offer; use gan_weight: 0")
        device = next((p.device for p in self.teacher.parameters()), self.pipeline.device)
        like = torch.empty(0, dtype=dtype_of(self.teacher), device=device)
        encoder = self.pipeline.text_encoder
        with torch.no_grad():
            features = self.teacher.features(
                like.new_zeros(1, self.pipeline.vae.channels, 2, 2),
                like.new_ones(1).float(),
                TextFeatures.empty(1, encoder.layers, encoder.width, like),
                self.config.discriminator_blocks,
            )
        heads = Heads([f.shape[1] for f in features], kind=self.config.discriminator_head)
        return heads.to(like.device).requires_grad_(False)

    # ---- who learns, from what ---------------------------------------------------------------------------------

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return self._modules

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def update_order(self, step: int) -> Sequence[str]:
        """A pure function of the step, so there is no counter to resume."""
        critic = [
            module_name for module_name in self._modules if module_name != "generator"
        ] * self.config.fake_score_updates
        return critic if step < self.config.warmup else [*critic, "generator"]

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[MicroBatch]]:
        """One encoded batch a step. `rng`, which is in one state in all processes, gives what they must share: the
        exit_steps, and one of the sizes where there are no pictures. A GAN needs pictures."""
        for batch in batches:
            uses_pictures = self.config.gan_weight or self.config.real_data_ratio
            z = self._real_latents(batch) if uses_pictures else None
            grid = grid_of(self.pipeline, batch, self.config.sizes, rng)
            updates = self.config.fake_score_updates * len(self._modules)  # of a step, or more
            exit_steps = [self._draw(rng) for _ in range(updates)]
            yield (MicroBatch(text_of_batch(self.pipeline, batch), grid, z, batch.weight, iter(exit_steps)),)

    def _draw(self, rng: torch.Generator) -> ExitStep:
        """Any of the student's steps, each as likely as the others."""
        count = int(torch.randint(self.config.steps, (), generator=rng))
        ratio = self.config.real_data_ratio
        return ExitStep(count, bool(ratio) and float(torch.rand((), generator=rng)) < ratio)

    @torch.no_grad()
    def _real_latents(self, batch: Batch) -> Tensor:
        """Of the batch's pictures, encoded unless the dataset has cached them. Raises LensError without any."""
        images = batch.even()
        if isinstance(batch.latents, Tensor):
            return move(batch.latents, self.pipeline.device).float()
        if images is None:
            raise LensError(
                "dmd2: the dataset yields captions only; gan_weight and real_data_ratio need one that yields pictures"
            )
        return latents_of(self.pipeline.vae, to_pixels(move(images, self.pipeline.device))).float()

    # ---- losses ------------------------------------------------------------------------------------------------

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Loss:
        """`rng` gives all noise."""
        if self.config.lora_on_shared_base and any(p.requires_grad for p in self.teacher.parameters()):
            raise ConfigError(
                f"dmd2: {module_name} shares the teacher's weights and would change them; name it in train.lora as well"
            )
        losses_of = {"generator": self._generator, "fake": self._fake, "heads": self._discriminator}
        loss = losses_of[module_name](modules, batch, rng)
        return evolve(loss, total=loss.total * batch.weight)

    def _exit_step(
        self, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator
    ) -> tuple[Tensor, float, float, Velocity]:
        """(x, t, the next time, the student's velocity): the step that learns, and where it begins."""
        student = velocity_of(modules["generator"], batch.text)
        sampler, steps = self.pipeline.sampler, self.config.steps
        exit_step = next(batch.exit_steps, None) or self._draw(rng)
        count = exit_step.count
        device = batch.text.features.device
        noise = move(torch.randn(len(batch), self.pipeline.vae.channels, *batch.size, generator=rng), device)
        t, after = sampler.times(batch.size, steps)[count : count + 2].tolist()
        if exit_step.real:
            if batch.z is None:
                raise LensError(
                    "dmd2: there are no pictures to begin at; use a dataset with pictures, or real_data_ratio: 0"
                )
            return flow.mix(move(batch.z, device), noise, noise.new_full((len(noise),), t)), t, after, student
        return ROLLOUTS[self.config.rollout](sampler, student, noise, steps, count, rng), t, after, student

    @torch.no_grad()
    def _student_guess(self, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Tensor:
        x, t, _, student = self._exit_step(modules, batch, rng)
        row = x.new_full((len(x),), t)
        return flow.data_from(x, student(x, row), row)

    def _generator(self, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Loss:
        config = self.config
        begin, t, after, student = self._exit_step(modules, batch, rng)
        row = begin.new_full((len(begin),), t)
        v = student(begin, row)
        x = flow.data_from(begin, v, row)
        views = Views(  # two passes of the teacher: the one without text is the cheaper
            velocity_of(self.teacher, batch.text),
            velocity_of(self.teacher, empty_text(batch.text)),
            velocity_of(modules["fake"], batch.text),
            self.guidance,
        )
        options = MatchingOptions(self.schedule, config.min_distance, config.ca_weight, config.dm_weight)
        matching = MATCHINGS[config.matching](x.detach(), views, t, options, rng)
        total = losses.descend(x, matching.g)
        parts = {**matching.parts, "x_std": x.detach().std(), "gradient_rms": matching.g.square().mean().sqrt()}
        if config.isg_weight:
            # A tenth of the way is kept from either end: an absolute margin would not fit the steps of large pictures.
            u = 0.1 + 0.8 * float(torch.rand((), generator=rng))
            isg = losses.guidance_within_a_step(student, lambda x, t: views.both(x, t)[1], begin, v, t, after, u)
            total = total + config.isg_weight * isg
            parts["isg"] = isg.detach()
        if config.gan_weight:
            x_t, at, _ = losses.noised(x, rng, self.schedule)
            gan = losses.passes_as_real(modules["heads"](self._features(modules, batch.text, at)(x_t)))
            parts["gan"] = gan.detach()
            if self.logs:  # a backward pass of its own, for one number
                (pull,) = torch.autograd.grad(config.gan_weight * gan, x, retain_graph=True)
                # `descend` divides by numel, a gradient of the GAN's mean does not: compare like with like.
                parts["gan_dm_ratio"] = losses.ratio(pull * x.numel(), matching.g)
            total = total + config.gan_weight * gan
        return Loss(total, parts)

    def _fake(self, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Loss:
        x = self._student_guess(modules, batch, rng)
        x_t, t, noise = losses.noised(x, rng, self.schedule)
        v = velocity_of(modules["fake"], batch.text)(x_t, t)
        total = losses.tracking(v, x, noise)
        # Against the best guess that sees nothing, the mean velocity: what is left to learn, as a share.
        unexplained = total.detach() / flow.velocity(x, noise).var()
        return Loss(total, {"unexplained": unexplained})

    def _discriminator(self, modules: Mapping[str, nn.Module], batch: MicroBatch, rng: torch.Generator) -> Loss:
        if batch.z is None:
            raise LensError("dmd2: there are no real latents to tell the student's from; use a dataset with pictures")
        x = self._student_guess(modules, batch, rng)
        # Real and made meet at the same noise level under the same noise: nothing else tells them apart.
        real_t, t, noise = losses.noised(move(batch.z, x.device), rng, self.schedule)
        features = self._features(modules, batch.text, t)

        def logits(x_t: Tensor) -> Tensor:
            # Only the heads learn here; without a graph the features cost no memory.
            with torch.no_grad():
                tapped = features(x_t)
            values: Tensor = modules["heads"](tapped)
            return values

        real, fake = logits(real_t), logits(flow.mix(x, noise, t))
        total = losses.real_or_fake(real, fake)
        parts = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        if self.config.r1_weight:
            n = move(torch.randn(real_t.shape, generator=rng), x.device)
            r1 = losses.approximate_r1(logits, real_t, real, self.config.r1_sigma, n)
            total = total + self.config.r1_weight * r1
            parts["r1"] = r1.detach()
        return Loss(total, parts)

    def _features(
        self, modules: Mapping[str, nn.Module], text: TextFeatures, t: Tensor
    ) -> Callable[[Tensor], list[Tensor]]:
        """x_t -> features of the teacher or the fake, at the blocks that the config names: neither learns from it, but
        gradients reach x_t."""
        read: Any = self.teacher if self.config.discriminator_features == "teacher" else modules["fake"]
        return lambda x_t: read.features(x_t, t, text, self.config.discriminator_blocks)

    # ---- between steps -----------------------------------------------------------------------------------------

    def after_step(self, step: int, modules: Mapping[str, nn.Module]) -> None:
        if self.config.ida < 1:  # in the warm-up as well, where it keeps all: a refusal must not wait
            keep = 1.0 if step < self.config.warmup else self.config.ida
            losses.align(modules["fake"], modules["generator"], keep)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's hash: its weights are in its checkpoint."""
        return {"teacher": self._teacher_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_teacher("dmd2", state["teacher"], self._teacher_version)


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the weights as they are when training has unpacked those that are quantised."""
    return {name: tuple(tensor.shape) for name, tensor in packed_linear.plain_tensors(net).items()}
