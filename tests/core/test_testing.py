"""The checks for plugin authors: sound components pass, and every broken one is found for what is wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
import toy
from attrs import evolve
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.protocols import BaseMethod
from lens_core.testing import (
    check_backbone,
    check_benchmark,
    check_dataset,
    check_llm,
    check_method,
    check_reward,
    check_sampler,
    check_text_encoder,
    check_vae,
)
from lens_core.types import Batch, Loss, Message, Prompt, Score, TextFeatures

EMPTY, MIXER = toy.Blocks.Config(), toy.Mixer.Config()


def vae(cls: type[toy.Blocks] = toy.Blocks) -> None:
    part = cls(EMPTY)
    nn.init.constant_(part.gain, 0.7)
    check_vae(part, EMPTY)


def encoder(cls: type[toy.Letters] = toy.Letters) -> None:
    torch.manual_seed(0)
    check_text_encoder(cls(EMPTY), EMPTY)


def backbone(cls: type[toy.Mixer] = toy.Mixer) -> None:
    torch.manual_seed(0)
    check_backbone(cls(MIXER), MIXER, channels=4, layers=1, width=8)


def sampler(cls: type[toy.Even] = toy.Even) -> None:
    check_sampler(cls(toy.Even.Config()))


class Red(toy.Reds):
    """A reward: the share of red, where it is asked for."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        shares = images[:, 0].double().mean((1, 2)) / 255
        return [
            Score("ok", float(s)) if p.task == "red" else Score("abstain") for s, p in zip(shares, prompts, strict=True)
        ]


def reward(cls: type[toy.Reds] = Red) -> None:
    check_reward(cls(toy.Reds.Config()), [Prompt(f"red {n}", n, "red" if n else "other") for n in range(3)])


def dataset(cls: type[toy.Squares] = toy.Squares) -> None:
    check_dataset(lambda: cls(toy.Squares.Config()))


BATCHES = list(itertools.islice(toy.Squares(toy.Squares.Config()).batches(0, 1), 5))
CATALOG = Catalog.of(toy)


def method(cls: type[toy.Fit] = toy.Fit) -> None:
    check_method(lambda: cls(toy.Fit.Config(), LensPipeline.from_parts(toy.PARTS, CATALOG)), BATCHES)


@pytest.mark.parametrize("check", [vae, encoder, backbone, sampler, reward, dataset, method])
def test_sound_components_pass(check: Callable[[], None]) -> None:
    check()


def test_checking_a_method_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    method()  # whose critic has dropout
    assert torch.equal(torch.get_rng_state(), before)


class Transposed(toy.Blocks):
    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels).mT


class Centred(toy.Blocks):
    def encode(self, pixels: Tensor) -> Tensor:
        z = super().encode(pixels)
        return z - z.mean(0)


class Sampled(toy.Blocks):
    def encode(self, pixels: Tensor) -> Tensor:
        z = super().encode(pixels)
        return z + torch.randn(z.shape)


class Painted(toy.Blocks):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z).to(torch.uint8)


class Forgetful(toy.Blocks):
    @classmethod
    def load(cls, folder: Any, config: Any, dtype: torch.dtype | None = None) -> Self:
        return cls(config)


class Stubborn(toy.Blocks):
    @classmethod
    def load(cls, folder: Any, config: Any, dtype: torch.dtype | None = None) -> Self:
        return super().load(folder, config)


class Unsized(toy.Blocks):
    @property
    def downscale(self) -> int:  # type: ignore[override]  # what the test is about
        raise AttributeError


class Soft(toy.Letters):
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        text = super().encode(prompts)
        return TextFeatures(text.features, text.mask.float())


class Padded(toy.Letters):
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        text = super().encode(prompts)
        return TextFeatures(text.features, torch.ones_like(text.mask))


class Deaf(toy.Letters):
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        return super().encode(["same"] * len(prompts))


class Wide(toy.Letters):
    width = 9


class Neighbourly(toy.Letters):
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        text = super().encode(prompts)
        return TextFeatures(text.features * len(prompts), text.mask)


class Unmasked(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return super().forward(x, t, TextFeatures(text.features, torch.ones_like(text.mask)))


class Wordy(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return super().forward(x, t, text) + text.features.mean()


class Loud(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return super().forward(x, t, text) + float(text.mask.shape[1] > 0)


class Mean(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        v = super().forward(x, t, text)
        return v - v.mean(0)


class Mingled(toy.Mixer):
    def packed(self, xs: Sequence[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        velocities = super().packed(xs, t, text)
        return [v + velocities[0].mean() for v in velocities]


class Greedy(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        v = super().forward(x, t, text)
        x.zero_()
        return v


class Severed(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return super().forward(x, t, text).detach().requires_grad_()


class Narrow(toy.Mixer):
    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        return super().forward(x, t, text)[:, :3]


class Rising(toy.Even):
    def times(self, size: tuple[int, int], steps: int) -> Tensor:
        return super().times(size, steps).flip(0)


class Short(toy.Even):
    def sample(self, velocity: Any, noise: Tensor, steps: int) -> Iterator[tuple[float, Tensor]]:
        yield from list(super().sample(velocity, noise, steps))[:-1]


class LazyTensor(toy.Even):
    def sample(self, velocity: Any, noise: Tensor, steps: int) -> Iterator[tuple[float, Tensor]]:
        yield from super().sample(lambda x, t: 0.9 * velocity(x, t), noise, steps)


class Scalar(toy.Even):
    def sample(self, velocity: Any, noise: Tensor, steps: int) -> Iterator[tuple[float, Tensor]]:
        yield from super().sample(lambda x, t: velocity(x, t[:1]), noise, steps)


class Diffuse(toy.Even):
    def sample(self, velocity: Any, noise: Tensor, steps: int) -> Iterator[tuple[float, Tensor]]:
        yield from super().sample(velocity, noise + torch.randn(noise.shape), steps)


class Askew(toy.Even):
    def sample(self, velocity: Any, noise: Tensor, steps: int) -> Iterator[tuple[float, Tensor]]:
        yield from ((t + 0.1, x) for t, x in super().sample(velocity, noise, steps))


class Bare(Red):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Any]:  # type: ignore[override]
        return [1.0 for _ in prompts]


class Ranked(Red):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", n / len(images)) for n in range(len(images))]


class Strict(Red):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float({"red": 1, "other": 0}[p.task])) for p in prompts]


class Broken(Red):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float("inf")) for _ in prompts]


class Silent(Red):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return super().score(images, prompts)[1:]


class Amnesiac(toy.Squares):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Floating(toy.Squares):
    def batches(self, rank: int, world: int) -> Iterator[Any]:
        for batch in super().batches(rank, world):
            assert batch.images is not None
            yield evolve(batch, images=batch.images.float())


class Ahead(toy.Fit):
    def steps(self, batches: Iterator[Any], modules: Any, rng: torch.Generator) -> Iterator[Any]:
        first = next(batches)
        for batch in batches:
            yield from super().steps(iter([first]), modules, rng)
            first = batch


class Endless(toy.Fit):
    def steps(self, batches: Iterator[Any], modules: Any, rng: torch.Generator) -> Iterator[Any]:
        yield from super().steps(iter(list(batches)), modules, rng)


class Growing(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        loss = super().loss(module_name, modules, batch, rng)
        return Loss(loss.total * self.count) if module_name == "backbone" else loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Meddling(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        modules["critic"].requires_grad_(True)
        return Loss(
            super().loss(module_name, modules, batch, rng).total + modules["critic"](batch[0].movedim(1, -1)).mean()
        )


class Detached(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        return Loss(super().loss(module_name, modules, batch, rng).total.detach())


class Tied(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        total = super().loss(module_name, modules, batch, rng).total
        return Loss(total, {"total": total})


class Estranged(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: torch.Generator) -> Loss:
        return Loss(torch.zeros((), requires_grad=True))


class Unknown(toy.Fit):
    def update_order(self, step: int) -> Sequence[str]:
        return ("generator",)


class Unlearning(toy.Fit):
    def steps(self, batches: Iterator[Any], modules: Any, rng: torch.Generator) -> Iterator[Any]:
        with torch.no_grad():
            yield from super().steps(batches, modules, rng)


class Pickled(toy.Fit):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": {1, 2}}


class Validating(toy.Fit):
    def validate(self, batch: Batch, modules: Any, rng: torch.Generator) -> dict[str, float]:
        return {"loss": float(torch.rand((), generator=rng))}


class Careless(Validating):
    def validate(self, batch: Batch, modules: Any, rng: torch.Generator) -> dict[str, float]:
        return {"loss": float(torch.rand(()))}


class Cheating(Validating):
    def validate(self, batch: Batch, modules: Any, rng: torch.Generator) -> dict[str, float]:
        with torch.no_grad():
            modules["backbone"].inner.weight.mul_(0.9)
        return super().validate(batch, modules, rng)


class Wordless(toy.Fit):
    headline = ("backbone/reward",)


class Mute(Validating):
    def validate(self, batch: Batch, modules: Any, rng: torch.Generator) -> dict[str, float]:
        return {"error": 1.0}


class Hoarder(toy.Mixer):
    """It keeps its last layer as it was when it first drew."""

    kept: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        v = super().forward(x, t, text)
        if torch.is_grad_enabled():
            return v
        self.kept = self.outer.weight.clone() if self.kept is None else self.kept
        return v * (self.kept.sum() / self.outer.weight.sum())


class Stale(toy.Fit):
    def __init__(self, config: Any, pipeline: Any) -> None:
        pipeline.backbone.__class__ = Hoarder
        super().__init__(config, pipeline)


def test_a_sound_validation_passes() -> None:
    method(Validating)


class Quiz:
    """A benchmark of two prompts."""

    Config = toy.Even.Config

    def prompts(self) -> list[Prompt]:
        return [Prompt("a red circle", 0), Prompt("a blue star", 1)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float(image[0].float().mean()) / 255) for image in images]


class NoPrompts(Quiz):
    def prompts(self) -> list[Prompt]:
        return []


class Twins(Quiz):
    def prompts(self) -> list[Prompt]:
        return [Prompt("a red circle"), Prompt("a blue star")]


class Blank(Quiz):
    def prompts(self) -> list[Prompt]:
        return [Prompt("a red circle", 0), Prompt(" ", 1)]


class Shuffled(Quiz):
    calls = itertools.count()

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"a red circle, {next(self.calls)}")]


class Generous(Quiz):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", 2.0)] * len(images)


class Curt(Quiz):
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return super().score(images, prompts)[:1]


class Echo:
    """An llm that answers with what it hears."""

    Config = toy.Even.Config

    def chat(self, messages: Sequence[Message]) -> Any:
        return messages[-1].text


class Numeric(Echo):
    def chat(self, messages: Sequence[Message]) -> Any:
        return 7


class Speechless(Echo):
    def chat(self, messages: Sequence[Message]) -> Any:
        return "\n"


class Rewriting(Echo):
    def chat(self, messages: Sequence[Message]) -> Any:
        assert isinstance(messages, list)
        messages.append(Message("assistant", "…"))
        return "a red circle"


def benchmark(cls: type[Quiz] = Quiz) -> None:
    check_benchmark(cls())


def llm(cls: type[Echo] = Echo) -> None:
    check_llm(cls(), [Message("user", "a red circle")])


@pytest.mark.parametrize("check", [benchmark, llm])
def test_sound_services_pass(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "broken", "words"),
    [
        (vae, Transposed, r"z has the shape \[2, 4, 3, 2\], not \[2, 4, 2, 3\]"),
        (vae, Centred, "a picture's z depends on its batch"),
        (vae, Sampled, "encode draws from torch's global generator; take a generator"),
        (vae, Painted, "the decoded picture is torch.uint8, not a float"),
        (vae, Forgetful, r"\['gain'\] is not what was saved"),
        (vae, Stubborn, r"load\(dtype=torch.bfloat16\) gives {torch.float32}"),
        (vae, Unsized, "lacks downscale, which every vae has"),
        (encoder, Soft, "mask"),
        (encoder, Padded, "the features of 'a red circle' depend on its batch"),
        (encoder, Deaf, "two prompts read the same"),
        (encoder, Wide, r"features has the shape \[3, 1, \d+, 8\], not \[3, 1, \d+, 9\]"),
        (encoder, Neighbourly, "the features of 'a red circle' depend on its batch"),
        (backbone, Unmasked, "tokens that the mask hides change v|a row of v depends on its batch"),
        (backbone, Wordy, "depends on its batch"),
        (backbone, Loud, r"a text that is all masked is not the empty text \(T = 0\)"),
        (backbone, Mean, "a row of v depends on its batch"),
        (backbone, Mingled, "a sample of a packed batch is not what it is alone"),
        (backbone, Greedy, "not the same twice|changes what it is given"),
        (backbone, Severed, "no weight gets a gradient"),
        (backbone, Narrow, r"v has the shape \[2, 3, 4, 6\], not \[2, 4, 4, 6\]"),
        (sampler, Rising, r"times must fall from 1 to 0, not \[0.0, 1.0\]"),
        (sampler, Short, "sample yields 3 times in 4 steps"),
        (sampler, LazyTensor, "does not arrive at the data"),
        (sampler, Scalar, r"the velocity's t has the shape \[1\], not \[2\]"),
        (sampler, Diffuse, "sample draws from torch's global generator"),
        (sampler, Askew, "not at those of times"),
        (reward, Bare, "a verdict is 1.0, not a Score"),
        (reward, Ranked, "a picture's score depends on its batch"),
        (reward, Strict, r"what cannot be judged is Score\('abstain'\), not KeyError\(''\)"),
        (reward, Broken, r"a score is inf; what broke is Score\('failed'\)"),
        (reward, Silent, "2 scores for 3 pictures"),
        (dataset, Amnesiac, "goes on with other batches"),
        (dataset, Floating, "images is torch.float32, not torch.uint8"),
        (method, Ahead, "resumed after 2 steps its losses are"),
        (method, Endless, "pulls 1000 batches for a few steps; it must be lazy"),
        (method, Growing, "resumed after 2 steps its losses are"),
        (method, Meddling, "the loss of backbone gives critic gradients too"),
        (method, Detached, "the loss of critic has no gradient"),
        (method, Tied, r"the parts \['total'\] have a gradient; detach them"),
        (method, Estranged, "the loss of critic does not reach it"),
        (method, Unknown, "update_order names 'generator'; the trainable modules are backbone, critic"),
        (method, Unlearning, "steps leaves gradients off while its step is out"),
        (method, Careless, "validate draws from torch's global generator"),
        (method, Cheating, "validate changes weights"),
        (method, Wordless, "logs no figure of its headline"),
        (method, Mute, "validate gives .*, no loss"),
        (method, Stale, "draws with what it kept of earlier weights; a cache must see every step"),
        (method, Pickled, "state_dict must hold tensors and what JSON can keep"),
        (benchmark, NoPrompts, "there are no prompts"),
        (benchmark, Twins, "two prompts have the same id"),
        (benchmark, Blank, "the prompt with the id 1 is blank"),
        (benchmark, Shuffled, "prompts is not the same twice"),
        (benchmark, Generous, r"a score is 2.0; it must be in \[0, 1\]"),
        (benchmark, Curt, "1 scores for 2 pictures"),
        (llm, Numeric, "chat gives a int, not text"),
        (llm, Speechless, "chat gives a blank answer"),
        (llm, Rewriting, "changes the messages"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_component_is_found(check: Callable[[Any], None], broken: type[Any], words: str) -> None:
    with pytest.raises(AssertionError, match=words) as caught:
        check(broken)
    assert "\n" not in str(caught.value) and broken.__name__ in str(caught.value)


class Half(BaseMethod):
    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}


def test_a_method_without_a_state_need_not_write_one_but_a_state_is_never_lost_in_silence() -> None:
    plain = BaseMethod()
    plain.after_step(0, {})
    plain.load_state_dict(plain.state_dict())
    with pytest.raises(NotImplementedError, match="Half saves kept; write its load_state_dict"):
        Half().load_state_dict(Half().state_dict())
