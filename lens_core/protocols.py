"""What a component must offer, one protocol a kind. Shapes, units and letters are those of `lens_core.types`.

A component is a class with a nested, frozen attrs `Config`, built as `cls(config)`. Whatever carries weights (VAE,
text encoder, backbone) is an `nn.Module` that can `save(folder)` itself into the sub-folders of a checkpoint and be
read back with `load(folder, config, dtype)`, both through `lens_core.checkpoints`, so that files are checked once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from lens_core.types import (
    Batch,
    Completion,
    Loss,
    Message,
    PictureOutcome,
    PictureRequest,
    Prompt,
    Record,
    Refinement,
    Score,
    SystemInfo,
    TextFeatures,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn


def dtype_of(component: Any) -> torch.dtype:
    """What a part computes in: the dtype of its first floating-point weight or buffer, float32 where it has none."""
    import torch

    held = [getattr(component, name, None) for name in ("parameters", "buffers")]
    tensors = (tensor for each in held if each is not None for tensor in each())
    return next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)


class Component(Protocol):
    """Anything a plugin offers by name."""

    Config: ClassVar[type[Any]]


@runtime_checkable
class HasWeights(Protocol):
    """A component with weights. `folder` is the checkpoint's root; each component knows its own sub-folders."""

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, config: Any, dtype: torch.dtype | None = None) -> Self: ...

    # Optional. `companion_folders`: sub-folders with more files that describe it. `extras(cls, source)`: tensors and
    # texts that a single file holds besides the weights, those of a checkpoint's folder or of what `from_header`
    # returns. `note`: a line on how the weights are held, for people.

    # Optional: `model_index: ClassVar[Mapping[str, tuple[str, str]]]`, the entries of diffusers' model_index.json by
    # which other tools find what `save` writes: {"vae": ("diffusers", "NAME")}. Of a
    # sampler too.


@runtime_checkable
class VAE(HasWeights, Protocol):
    """Pictures to latents and back. `downscale` is pixels per latent cell; latents have about unit variance."""

    channels: int
    downscale: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [-1, 1] -> z [B,C,h,w]."""

    def decode(self, z: Tensor) -> Tensor:
        """z [B,C,h,w] -> pixels [B,3,H,W], about [-1, 1]; not clamped."""

    # Optional: `convolutional: bool`, whether a part of a picture looks about the same decoded alone, but for its
    # edges. Only then may it be decoded in tiles.


@runtime_checkable
class TextEncoder(HasWeights, Protocol):
    """Prompts to features. `layers` is L, `width` is D; `provenance` is what a picture must record (a pinned date)."""

    layers: int
    width: int

    def encode(self, prompts: Sequence[str]) -> TextFeatures: ...

    # Optional: excess_tokens(prompt) -> int, how many of its tokens do not fit and are cut.


@runtime_checkable
class ChatModel(Protocol):
    """A text encoder that is a language model, and can write, may have this."""

    def complete(self, chats: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Completion]:
        """What the model says next in each conversation, the likeliest token at each place, with little reasoning."""


@runtime_checkable
class Backbone(HasWeights, Protocol):
    """An `nn.Module` that predicts the velocity. float16 may be refused through `refuses(dtype) -> str | None`.

    `takes() -> (C, L, D)`, optional: the latent channels, encoder layers and text width that it reads. A recipe whose
    VAE or encoder gives others is then refused before anything is loaded.
    One that can take samples of different sizes in one pass has `packed(xs, t, text)` too: xs [C,h,w] each, t [B] and
    text as in `forward` -> v for each, of its own size and independent of the others. Packed training needs it.
    `fitting(options, C, L, D) -> Mapping[str, Any]`, optional, a class method: the options of its Config by which it
    takes such latents and features. A recipe may then say `like: neighbours` instead of them. `options` are the others.
    `flops((h, w), tokens)`, optional, is what a forward costs for one sample, so that a run can tell its MFU.
    """

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """x [B,C,h,w], t float32 [B] in [0, 1], text -> v [B,C,h,w] = noise - data."""


@runtime_checkable
class PrecomputesModulation(Protocol):
    """A backbone may have this: what depends on t alone is worked out once for all times of a run."""

    def precomputed(
        self, times: Tensor, temporarily_on_device: Callable[[nn.Module], AbstractContextManager[Any]]
    ) -> AbstractContextManager[None]:
        """While this lasts, passes without gradient at `times` float32 [K] read a table, and no `unused_modules`.

        What makes the table runs inside `temporarily_on_device(module)`, which brings that module's weights.
        """


class Offloads(Protocol):
    """What a part with weights may say of itself, all of it optional, so that `offload` can do more."""

    def blocks(self) -> Sequence[nn.Module]:
        """Modules that run one after the other in this order, each at most once a pass: they can be streamed."""

    def unused_modules(self) -> Sequence[nn.Module]:
        """Modules whose weights drawing does not read, or asks for through `precomputed`."""

    def activation_bytes(self, workload: Any) -> int:
        """An estimate of the bytes beside the weights in one pass of `lens_core.inference.offload_plans.Workload`."""


@runtime_checkable
class Sampler(Protocol):
    """Integrates a velocity from noise (t = 1) to data (t = 0)."""

    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        """Latent grid (h, w) -> float32 [steps + 1], falling from 1 to 0."""

    def sample(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: int,
        start: int = 0,
    ) -> Iterator[tuple[float, Tensor]]:
        """x [B,C,h,w] at times[start], which is noise at 0 -> (t, x) after each further step; the last has t = 0.

        `velocity` sees x and t float32 [B]. A sampler that adds noise of its own has `stochastic = True` and takes a
        fifth argument `draw`: () -> noise like x, each row from a generator of its own.
        """


@runtime_checkable
class Reward(Protocol):
    """`needs`, optional, are the keys of `Prompt.data` that it reads: where no prompt has one, RL is refused."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Score]:
        """Images uint8 [B,3,H,W] -> one Score each."""

    # Optional: `spend: Mapping[str, float]`, what it has cost since it was built ("usd", "calls"); RL logs it.
    # Optional: estimate(prompts, pictures: int), for a dry run: an object with `calls` and `usd`, at most, of scoring
    # so many pictures. Sends nothing. Without it, 0 is assumed.
    # Optional: again() -> the same reward with another seed, by which `lens rl audit` scores pictures a second time.


@runtime_checkable
class Reasoner(Protocol):
    """Rewrites requests as detailed prompts. `provenance() -> Mapping[str, str]`, optional, is what a picture must
    record of it: its model, say. `attach(pipeline)`, optional, is called once, by the pipeline that it belongs to."""

    def refine(self, prompts: Sequence[str]) -> Sequence[str | Refinement]:
        """One for each request, in their order; a Refinement where an answer is of no use, with the request and the
        reason. Raises LensError where a request must not be drawn, or nobody answers."""


@runtime_checkable
class LLM(Protocol):
    def chat(self, messages: Sequence[Message]) -> str: ...

    # Optional: check_requirements(), before work of hours that needs answers. Raises LensError where a key or an
    # address is missing. Sends nothing.


@runtime_checkable
class Dataset(Protocol):
    """Endless, seeded, resumable. `state_dict` counts what was handed out, so reading ahead does no harm."""

    def batches(self, rank: int, world: int) -> Iterator[Batch]: ...

    # Optional: check_encoders(pipeline, precision: str), before training. Raises LensError where what this dataset has
    # encoded beforehand was made by other encoders than the pipeline's, or in another precision ("fp32", "bf16").

    # Optional: estimate(config) -> str, a class method: what the batch of a rank costs, for a dry run. Reads no data.

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Curator(Protocol):
    """Measures pictures, their captions, or both. Which numbers are good enough is the recipe's to say, not its own.

    `version` is a text that changes whenever the numbers of an equal Config would; scores are kept under it.
    `columns` names the numbers. Both may be class attributes, or be set by the constructor.
    """

    version: str
    columns: tuple[str, ...]

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        """One number for each record, by column; NaN where there is none. Record i alone decides number i."""

    # Optional: prepare(), before the first picture is read. Loads weights, or raises LensError where there are none.

    # Optional: weights_id() -> str, where its Config alone does not say which weights it has: a hash of a folder's
    # files.

    # Optional: costly: bool. One that is runs last, on the pictures alone that all others and deduplication keep.

    # Optional: reads_captions: bool. Where it is true, numbers belong to a file with its captions, else to the file.


@runtime_checkable
class Benchmark(Protocol):
    """Held-out prompts and their judge. Scores are in [0, 1], one list a task."""

    def prompts(self) -> Sequence[Prompt]: ...

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Score]:
        """Images uint8 [B,3,H,W] -> one Score each; `lens_core.evaluation.run` gathers them by task."""

    # Optional: `images_per_prompt: int`, 1 where absent, and `size: (height, width)` px that it asks generators for.
    # Optional, together, of a benchmark that perceives and decides by rules of its own; `lens_core.evaluation.stages`
    # calls them instead of `score`:
    #   references(prompt) -> a Mapping for each line of a picture: what is known without it, as JSON fields. Several
    #       have a "bench" each.
    #   perceive(pictures: Sequence[Picture], folder: Path, log: (str) -> None) -> one list of Mappings a picture: what
    #       was read in it, to be joined with the reference of the same "bench". All pictures of a process come at once,
    #       those of one prompt together: read a few at a time. Caches go below `folder`; `log` takes lines of progress.
    #   decide(perceptions: Path) -> lens_core.evaluation.decision.Decision.
    # Optional: check_requirements(), before the first picture is drawn. Raises LensError where something that scoring
    # needs is missing: an option, a package, a file, a key. Loads no model and downloads nothing.
    # Optional: close(), which frees what `score` keeps in memory between calls. Another call may follow.


@runtime_checkable
class Generator(Protocol):
    """A system that draws: a checkpoint, another library's pipeline, a remote API, a folder of pictures.

    Building it must neither load weights nor need a key: `estimate` is asked for in dry runs.
    """

    def describe(self) -> SystemInfo:
        """What draws. May load the model; raises LensError where it cannot be used (no key, no such model)."""

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        """One outcome a request, each as soon as it is known, in any order. A picture depends on its request alone.

        Raises StopGeneration, after what is finished has been yielded, where nothing more can be drawn.
        """

    # Optional: `batch_size: int`, how many requests a call should get; 1 where absent. `most_failures: int | None`, so
    # many failures in a row stop a run, None: no number; 20 where absent.
    # Optional: estimate(count: int, size: (height, width) | None) -> GenerationEstimate of so many pictures. Sends
    # nothing.
    # Optional: open(folder: Path), once before the first call: the folder of the run, where it may keep files of its
    # own (an account of what was paid for). Several processes open the same folder.
    # Optional: close(), after the last call.


@runtime_checkable
class Perceiver(Protocol):
    """A model that reads pictures for a benchmark: objects, colours, words, answers, features.

    `perceives` says what, and with it what a question and an answer are; `lens_bench.perceivers` has the table.
    Building it loads nothing.
    """

    perceives: str

    def describe(self) -> Mapping[str, Any]:
        """JSON: "model", "revision" and "version", which changes whenever the same picture may be read otherwise."""

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> Sequence[Any]:
        """RGB pictures, with a question each (JSON; None where there is nothing to ask) -> one answer each, JSON."""

    def canary(self) -> str | None:
        """What is wrong with its answer about a picture of known content, or None. Asked once before it is used."""

    # Optional: check_requirements(), before pictures are drawn for it. Raises LensError where a package, a file or a
    # key is missing. Loads no model and downloads nothing.
    # Optional: close(), which frees its memory. It may be used again.


@runtime_checkable
class Method(Protocol):
    """A training algorithm without a loop, built as `cls(config, pipeline)`. It never sees a device or an optimizer."""

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        """Who can learn, by name."""

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Any]]:
        """One item an optimizer step: its micro-batches. Pulls from `batches` lazily, never ahead.

        A method that reads no dataset may say `shards_itself = True`. `batches` then yields a `Shard`: which
        micro-batch of each step this iterator makes. What the micro-batches may share is up to the method.
        """

    def update_order(self, step: int) -> Sequence[str]:
        """Who learns in this step, in order."""

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Any, rng: torch.Generator) -> Loss: ...

    # Optional: validate(batch: Batch, modules, rng) -> Mapping[str, float], means over a batch that is not trained on.
    # "loss" is the figure to follow; "loss/…" are parts of it. Draws from `rng` alone, the same in each evaluation.

    # Optional: `headline: tuple[str, ...]`, the figures that training prints, five at most, as they are logged:
    # "backbone/loss", "backbone/grad_norm", or a part of a Loss. All others go to log.jsonl alone. Without it, the loss
    # of each module. A class attribute, or set by the constructor.

    # Optional: flops(module_name: str, batch) -> float, of that module's forward over a micro-batch. The log then has
    # the rate of the run; the loop adds what backward computes.

    # Optional: frozen() -> Mapping[str, nn.Module], by name the networks that it holds besides trainable modules and
    # the pipeline, and that never change: a teacher. The loop keeps them as it keeps the frozen parts of the pipeline,
    # shards them where it shards trainable modules, and lets them compute activations again.

    # Optional: logs: bool, which the loop sets before each step: whether what `loss` tells is logged. Where it is
    # False, figures that cost more than a step without them may be left out.

    # Optional: after_update(module_name, modules, sums: Mapping[str, Tensor]), after each optimizer step that was made,
    # with what the `Loss.sums` of all micro-batches, parts and processes add up to.

    # `BaseMethod` has these three for a method that keeps nothing between steps.
    def after_step(self, step: int, modules: Mapping[str, nn.Module]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the trainable weights: tensors, and what JSON can hold."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class BaseMethod:
    """The three members that a method without a state of its own need not write: `class FlowMatching(BaseMethod)`."""

    def after_step(self, step: int, modules: Mapping[str, nn.Module]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises NotImplementedError where there is a state, which would be lost in silence."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} saves {', '.join(state)}; write its load_state_dict")


KINDS: dict[str, tuple[str, type[Any]]] = {
    "vae": ("lens_vaes", VAE),
    "text_encoder": ("lens_text_encoders", TextEncoder),
    "backbone": ("lens_backbones", Backbone),
    "sampler": ("lens_samplers", Sampler),
    "reward": ("lens_rewards", Reward),
    "reasoner": ("lens_reasoners", Reasoner),
    "method": ("lens_methods", Method),
    "dataset": ("lens_datasets", Dataset),
    "curator": ("lens_curators", Curator),
    "benchmark": ("lens_benchmarks", Benchmark),
    "generator": ("lens_generators", Generator),
    "perceiver": ("lens_perceivers", Perceiver),
    "llm": ("lens_llms", LLM),
}
"""Kind -> (the hook that provides it, what its classes must offer)."""
