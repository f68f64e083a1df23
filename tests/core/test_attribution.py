"""Whatever a plugin raises or wrongly returns is one line that names the component and its method."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve
from torch import nn

from lens_core import hookimpl
from lens_core.attribution import (
    batches_of,
    calling,
    check_fit,
    check_on_meta,
    checked_loss,
    checked_scores,
    checked_step,
    headline_tasks_of,
    items,
    latents_of,
    pixels_of,
    prompts_of,
    text_of,
    times_of,
    trainable_modules_of,
    trajectory_of,
    update_order_of,
)
from lens_core.catalog import Catalog, Plugin
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, Evaluation, PipelineSpec, Recipe, Training
from lens_core.training import memory_estimate
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, LensError, Loss, PluginError, Prompt, Score, TextFeatures

PIXELS = torch.zeros(2, 3, 32, 16)


def line(call: Callable[[], Any]) -> str:
    with pytest.raises(PluginError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def red(kind: str, **methods: Any) -> Any:
    """A component that `lens_red` offers as `red`, with these methods."""
    cls = type("Red", (), {"Config": toy.Even.Config, **methods})
    for name in ("times", "sample", "encode", "decode", "score", "prompts", "state_dict", "load_state_dict", "batches",
                 "trainable_modules", "steps", "update_order", "loss", "after_step"):  # fmt: skip
        if not hasattr(cls, name):
            setattr(cls, name, lambda self: None)
    module = types.ModuleType("lens_red")
    hook = f"lens_{kind}s"
    setattr(module, hook, hookimpl(lambda: {"red": cls}))
    assert [e.name for e in Catalog.of(module).entries(kind)] == ["lens_red:red"]
    return cls()


def fail(component: Any) -> None:
    with calling(component, "score"):
        raise ConnectionError("no\nroute")


def test_an_error_names_the_component_and_keeps_its_cause() -> None:
    reward = red("reward")
    with pytest.raises(PluginError, match=r"^lens_red:red\.score raised ConnectionError: no route$") as caught:
        fail(reward)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("error", [ConfigError("mine"), KeyboardInterrupt(), MemoryError()])
def test_errors_that_speak_for_themselves_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), calling(object(), "x"):
        raise error


def test_a_component_that_nobody_offers_is_called_by_its_class() -> None:
    assert line(lambda: checked_step(nn.Linear(1, 1), 3)).startswith("torch.nn.modules.linear:Linear.steps yielded int")


def test_an_iterator_that_breaks_in_the_middle_is_named_and_one_that_ends_ends() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("x")

    iterator = items(toy.Even, "sample", broken())
    assert next(iterator) == 1
    assert "sample raised ZeroDivisionError: x" in line(lambda: next(iterator))
    assert list(items(toy.Even, "sample", iter([1, 2]))) == [1, 2]
    assert "returned int; it must return an iterator" in line(lambda: list(items(toy.Even, "sample", 3)))  # type: ignore[arg-type]


MUST = "it must return one Score an image"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.5, 0.5], f"lens_red:red.score returned float; {MUST}"),
        (0.5, f"lens_red:red.score returned float; {MUST}"),
        (None, f"lens_red:red.score returned NoneType; {MUST}"),
        (torch.ones(2), f"lens_red:red.score returned Tensor float32 []; {MUST}"),
        ({"a": Score("ok", 1.0)}, f"lens_red:red.score returned dict; {MUST}"),
        ("ok", f"lens_red:red.score returned str; {MUST}"),
        ([Score("ok", 1.0), None], f"lens_red:red.score returned NoneType; {MUST}"),
        ([Score("ok", 1.0)], f"lens_red:red.score returned 1 scores for 2 images; {MUST}"),
        ([], f"lens_red:red.score returned 0 scores for 2 images; {MUST}"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(scores: Any, words: str) -> None:
    assert line(lambda: checked_scores(red("reward"), scores, 2)) == words


def test_a_score_of_no_status_is_a_fault_of_its_reward() -> None:
    def score() -> None:
        reward = red("reward")
        with calling(reward, "score"):
            Score(17)  # type: ignore[arg-type]  # what the test is about

    assert line(score).startswith("lens_red:red.score raised ValueError: a score's status is ok, abstain or failed")


def test_scores_may_come_from_a_generator() -> None:
    good = [Score("ok", 1.0), Score("abstain")]
    assert checked_scores(red("reward"), iter(good), 2) == tuple(good)


FEATURES, MASK = torch.zeros(2, 1, 3, 8), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "text",
    [
        None,
        FEATURES,
        (FEATURES, MASK),
        TextFeatures(FEATURES[:1], MASK[:1]),
        TextFeatures(FEATURES, MASK.float()),
        TextFeatures(FEATURES.long(), MASK),
        TextFeatures(FEATURES[0], MASK),
        TextFeatures(FEATURES, MASK[:, :2]),
        TextFeatures(FEATURES[..., :4], MASK),
        TextFeatures(FEATURES.repeat(1, 2, 1, 1), MASK),
        TextFeatures([1, 2], MASK),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_text_is_refused(text: Any) -> None:
    encoder = red("text_encoder", layers=1, width=8, encode=lambda self, prompts: text)
    assert line(lambda: text_of(encoder, ["a", "b"])).startswith("lens_red:red.encode returned ")


@pytest.mark.parametrize(
    "z",
    [None, torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 1), torch.zeros(2, 5, 2, 1), torch.zeros(2, 4, 2, 1).int()],
)
def test_wrong_latents_and_pixels_are_refused(z: Any) -> None:
    vae = red("vae", channels=4, downscale=16, encode=lambda self, x: z, decode=lambda self, x: z)
    assert line(lambda: latents_of(vae, PIXELS)).startswith("lens_red:red.encode returned ")
    assert line(lambda: pixels_of(vae, torch.zeros(2, 4, 2, 1))).startswith("lens_red:red.decode returned ")


@pytest.mark.parametrize(
    "times", [None, [1.0, 0.0], torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.2, 0.1]), torch.tensor([0.0, 0.5, 1.0]),
              torch.tensor([1.0, math.nan, 0.0]), torch.tensor([1, 0, 0])],
)  # fmt: skip
def test_wrong_times_are_refused(times: Any) -> None:
    sampler = red("sampler", times=lambda self, size, steps: times)
    assert line(lambda: times_of(sampler, (2, 2), 2)).startswith("lens_red:red.times returned ")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ([(0.0, torch.zeros(1, 4, 2, 2))], "yielded|returned"),
        ([torch.zeros(2)], "yielded Tensor"),
        ([(0.5, torch.zeros(2, 4, 2, 2))], "ended at t = 0.5; it must end at t = 0"),
        ([], "ended at t = 1.0"),
        (3, "returned int; it must return an iterator"),
    ],
)
def test_a_wrong_sample_is_refused(sample: Any, words: str) -> None:
    sampler = red("sampler", sample=lambda self, velocity, x, steps: sample)
    with pytest.raises(PluginError, match=rf"lens_red:red\.sample ({words})"):
        list(trajectory_of(sampler, None, torch.zeros(2, 4, 2, 2), 1))


IMAGES = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "batch",
    [
        None, IMAGES, (IMAGES, ("a", "b")), Batch(IMAGES, ()), Batch(IMAGES, ("a",)), Batch(IMAGES.float(), ("a", "b")),
        Batch(IMAGES[0], ("a", "b")), Batch(IMAGES[:, :1], ("a", "b")), Batch(IMAGES, ("a", 3)),  # type: ignore[arg-type]
        Batch(IMAGES, ("a", "b"), (1,)), Batch((IMAGES[0],), ("a", "b")), Batch(IMAGES.numpy(), ("a", "b")),  # type: ignore[arg-type]
        Batch(None, ("a", "b"), latents=torch.zeros(1, 4, 2, 2)), Batch(None, "ab"),  # type: ignore[arg-type]
        Batch(None, ("a", "b"), text=TextFeatures(FEATURES[:1], MASK[:1])),
    ],
)  # fmt: skip
def test_a_batch_that_is_none_is_refused(batch: Any) -> None:
    dataset = red("dataset", batches=lambda self, rank, world: iter([batch]))
    with pytest.raises(PluginError, match=r"lens_red:red\.batches yielded "):
        next(batches_of(dataset, 0, 1))


@pytest.mark.parametrize(
    "batch",
    [
        Batch(IMAGES, ("a", "b"), (1, 2)), Batch((IMAGES[0], IMAGES[1, :, :8]), ("a", "b")), Batch(None, ("a",)),
        Batch(None, ("a", "b"), latents=torch.zeros(2, 4, 2, 2).bfloat16(), text=TextFeatures(FEATURES, MASK)),
    ],
)  # fmt: skip
def test_a_sound_batch_passes_as_it_is(batch: Batch) -> None:
    assert next(batches_of(red("dataset", batches=lambda self, rank, world: iter([batch])), 0, 1)) is batch


def test_a_method_is_held_to_its_contract() -> None:
    net, total = nn.Linear(1, 1), torch.ones((), requires_grad=True)
    method = red("method", trainable_modules=lambda self: {"net": net}, update_order=lambda self, step: ("net",))
    assert trainable_modules_of(method) == {"net": net} and update_order_of(method, 0, {"net": net}) == ("net",)
    for trainable in (None, {}, [net], {"net": 3}, {3: net}):
        broken = red("method", trainable_modules=lambda self, trainable=trainable: trainable)
        assert line(lambda broken=broken: trainable_modules_of(broken)).startswith(
            "lens_red:red.trainable_modules returned "
        )
    with pytest.raises(ConfigError, match=r"lens_red:red: net is to learn, and .*ReLU has no weight"):
        trainable_modules_of(red("method", trainable_modules=lambda self: {"net": nn.ReLU()}))
    for turns in ("net", None, [net], 3):
        broken = red("method", update_order=lambda self, step, turns=turns: turns)
        assert line(lambda broken=broken: update_order_of(broken, 0, {"net": net})).startswith(
            "lens_red:red.update_order returned "
        )
    assert "update_order named 'nets'" in line(
        lambda: update_order_of(red("method", update_order=lambda self, step: ["nets"]), 0, {"net": net})
    )
    assert checked_loss(method, Loss(total)).total is total
    assert line(lambda: checked_loss(method, total)) == (
        "lens_red:red.loss returned Tensor float32 []; it must return a Loss"
    )
    for loss in (Loss(torch.ones(2, requires_grad=True)), Loss(torch.ones(())), Loss(1.0), Loss(total, [total])):  # type: ignore[arg-type]
        assert line(lambda loss=loss: checked_loss(method, loss)).startswith("lens_red:red.loss ")
    for step in (Batch(None, ("a",)), torch.ones(3), "ab", 3, {"a": 1}):
        message = line(lambda step=step: checked_step(method, step))
        assert message.startswith("lens_red:red.steps yielded ") and "a list of micro-batches" in message
    assert "yielded no micro-batch" in line(lambda: checked_step(method, []))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("a", task=None), "as a task, None; a task must be one line of text"),  # type: ignore[arg-type]
        (
            Prompt("a", task="overall"),
            "as a task, 'overall'; a task must be one line of text, and none of overall, all",
        ),
        (Prompt("a", data={"question": ["a", 1]}), "as data, dict; the data of a Prompt must be a mapping"),
        (Prompt("a", data=[1]), "as data, list of int; the data of a Prompt must be a mapping"),  # type: ignore[arg-type]
    ],
)
def test_tasks_and_data_of_prompts_are_checked(prompt: Prompt, words: str) -> None:
    broken = red("benchmark", prompts=lambda self: [prompt])
    assert line(lambda: prompts_of(broken)).startswith(f"lens_red:red.prompts gave, {words}")


def test_a_headline_is_a_list_of_tasks() -> None:
    assert headline_tasks_of(red("benchmark", headline=["a"])) == ("a",) and headline_tasks_of(red("benchmark")) == ()
    for headline in (None, "ab", [1]):
        assert line(lambda headline=headline: headline_tasks_of(red("benchmark", headline=headline))).endswith(
            "it must be a list of tasks"
        )


def test_prompts_are_checked() -> None:
    assert prompts_of(red("benchmark", prompts=lambda self: (Prompt("a"),))) == [Prompt("a")]
    for prompts in (None, "abc", ["abc"], [Prompt(3)], {"a": 1}):  # type: ignore[arg-type]
        broken = red("benchmark", prompts=lambda self, prompts=prompts: prompts)
        assert line(lambda broken=broken: prompts_of(broken)).startswith("lens_red:red.prompts returned ")


# ---- in a run -------------------------------------------------------------------------------------------------------


def plugin(**hooks: Any) -> Catalog:
    module = types.ModuleType("lens_red")
    for hook, offered in hooks.items():
        setattr(module, hook, hookimpl(lambda offered=offered: offered))
    return Catalog.of(toy, module)


def run(catalog: Catalog, out: Path, **changes: Any) -> Trainer:
    recipe = evolve(
        Recipe(ComponentSpec("fit"), Training(3, log_every=1, save_every=10), ComponentSpec("squares"), toy.PARTS),
        **changes,
    )
    return Trainer(recipe, catalog, out, log=SAID.append)


SAID: list[str] = []


class Bare(toy.Fit):
    def steps(self, batches: Any, modules: Any, rng: Any) -> Iterator[Any]:
        yield from batches


class Plain(toy.Fit):
    def loss(self, module_name: str, modules: Any, batch: Any, rng: Any) -> Any:
        return super().loss(module_name, modules, batch, rng).total


class Late(toy.Fit):
    def after_step(self, step: int, modules: Any) -> None:
        raise KeyError("lost")


class Floats(toy.Squares):
    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        for batch in super().batches(rank, world):
            yield evolve(batch, images=batch.images / 255)  # type: ignore[operator]  # what the test is about


@pytest.mark.parametrize(
    ("method", "dataset", "words"),
    [
        (Bare, toy.Squares, "lens_red:x.steps yielded Batch; each step must be a list of micro-batches"),
        (Plain, toy.Squares, "lens_red:x.loss returned Tensor float32 []; it must return a Loss"),
        (Late, toy.Squares, "lens_red:x.after_step raised KeyError: 'lost'"),
        (None, Floats, "lens_red:y.batches yielded Tensor float32 [4, 3, 16, 16]; images must be a uint8 tensor"),
    ],
)
def test_a_run_names_the_plugin_that_breaks_it(method: Any, dataset: Any, words: str, tmp_path: Path) -> None:
    catalog = plugin(lens_methods={"x": method} if method else {}, lens_datasets={"y": dataset})
    made = run(catalog, tmp_path / "run", method=ComponentSpec("x" if method else "fit"),
               dataset=ComponentSpec("squares" if dataset is toy.Squares else "y"))  # fmt: skip
    assert words in line(made.train)


class Away(toy.Reds):
    def score(self, images: Any, prompts: Any) -> Any:
        raise ConnectionError("no route")


class Numbers(toy.Reds):
    def score(self, images: Any, prompts: Any) -> Any:
        return [0.5] * len(prompts)


def test_a_benchmark_that_raises_is_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    catalog = plugin(lens_benchmarks={"away": Away, "numbers": Numbers})
    SAID.clear()
    evaluation = Evaluation(
        1, benchmarks=(ComponentSpec("away"), ComponentSpec("numbers"), ComponentSpec("reds")), size=(16, 16), steps=1
    )
    report = run(catalog, tmp_path / "run", evaluation=evaluation).train()
    assert report.steps == 3 and report.model is not None
    log = "\n".join(SAID)
    assert "benchmark away failed, and the run goes on: lens_red:away.score raised ConnectionError: no route" in log
    assert f"lens_red:numbers.score returned float; {MUST}" in log
    assert "reds 0" in log or "reds 1" in log


# ---- parts without parameters ---------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A part without weights."""

    Config = toy.Even.Config

    def __init__(self, config: Any) -> None:
        super().__init__()

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, config: Any, dtype: torch.dtype | None = None) -> Any:
        return cls(config)


class Pool(Fixed):
    channels, downscale = 4, 16

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        z = nn.functional.avg_pool2d(pixels, 16)
        return torch.cat([z, z.mean(1, keepdim=True)], 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(z[:, :3], scale_factor=16)


class Codes(Fixed):
    layers, width = 1, 8

    def encode(self, prompts: Any) -> TextFeatures:
        codes = [torch.tensor(list(p.encode()), dtype=torch.float32)[None, None, :, None] / 255 for p in prompts]
        return TextFeatures.cat(
            [TextFeatures(c.expand(-1, -1, -1, 8), torch.ones(1, c.shape[2], dtype=torch.bool)) for c in codes]
        )


def test_parts_without_weights_train_draw_save_and_load(tmp_path: Path) -> None:
    catalog = plugin(lens_vaes={"pool": Pool}, lens_text_encoders={"codes": Codes})
    parts = PipelineSpec(
        vae=ComponentSpec("pool"),
        text_encoder=ComponentSpec("codes"),
        backbone=ComponentSpec("mixer"),
        sampler=ComponentSpec("even"),
    )
    report = run(
        catalog, tmp_path / "run", pipeline=parts, evaluation=Evaluation(1, prompts=("red",), size=(16, 16), steps=1)
    ).train()
    assert report.model is not None
    pipeline = LensPipeline.from_pretrained(report.model, catalog=catalog, device="cpu")
    for placed in ("none", "model", "encoder-cpu"):
        pipeline.offload(placed, "cpu")
        assert pipeline("red", height=16, width=32, num_inference_steps=2, seed=1).images[0].size == (32, 16)
    pipeline.to("cpu", torch.float32)
    again = pipeline("red", height=16, width=16, num_inference_steps=2, seed=1, image=pipeline(
        "red", height=16, width=16, num_inference_steps=1, seed=1).images[0], strength=1.0)  # fmt: skip
    assert len(again.images) == 1


def test_a_backbone_of_the_wrong_shape_is_named() -> None:
    class Wide(toy.Mixer):
        def forward(self, x: Any, t: Any, text: Any) -> Any:
            return super().forward(x, t, text)[:, :3]

    catalog = plugin(lens_backbones={"wide": Wide})
    pipeline = LensPipeline.from_parts(evolve(toy.PARTS, backbone=ComponentSpec("wide")), catalog)
    message = line(lambda: pipeline("red", height=16, width=16, num_inference_steps=1))
    assert message == (
        "lens_red:wide.forward returned Tensor float32 [1, 3, 1, 1]; v must be a float tensor [1, 4, 1, 1], as x is"
    )


def test_a_component_that_cannot_be_built_is_named() -> None:
    class Shy(toy.Blocks):
        def __init__(self, config: Any) -> None:
            raise KeyError("no such table")

    catalog = plugin(lens_vaes={"shy": Shy})
    with pytest.raises(LensError, match=r"lens_red:shy cannot be built: KeyError: 'no such table'"):
        LensPipeline.from_parts(evolve(toy.PARTS, vae=ComponentSpec("shy")), catalog)


# ---- parts that fit one another -------------------------------------------------------------------------------------

SIZES = {"channels": 4, "downscale": 16}


@pytest.mark.parametrize(
    ("vae", "encoder", "words"),
    [
        (4, (1, 8), None),
        (5, (1, 8), "reads 4 latent channels, and lens_red:red gives 5"),
        (4, (2, 8), "reads 1 layers of text features, and lens_red:red gives 2"),
        (4, (1, 64), "reads 8 channels of a text feature, and lens_red:red gives 64"),
        (None, None, None),
    ],
)
def test_parts_that_do_not_fit_are_named(vae: Any, encoder: Any, words: str | None) -> None:
    class Saying(toy.Mixer):
        def takes(self) -> tuple[int, int, int]:
            return 4, 1, 8

    parts = [
        None if vae is None else red("vae", channels=vae, downscale=16),
        None if encoder is None else red("text_encoder", layers=encoder[0], width=encoder[1]),
        Saying(toy.Mixer.Config()),
    ]
    if words is None:
        check_fit(*parts)
        return
    with pytest.raises(ConfigError, match=words):
        check_fit(*parts)


def test_a_backbone_that_does_not_say_what_it_takes_is_tried_on_shapes() -> None:
    with torch.device("meta"):
        backbone, vae, encoder = toy.Mixer(toy.Mixer.Config()), toy.Blocks(None), toy.Letters(None)
    check_on_meta(vae, encoder, backbone)
    encoder.width = 64
    with pytest.raises(ConfigError, match=r"cannot take what .* \(4 latent channels\).*1 layers of 64"):
        check_on_meta(vae, encoder, backbone)


class Wide(toy.Letters):
    width = 64

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = nn.Embedding(256, 64)


def test_a_dry_run_refuses_an_encoder_that_does_not_fit_the_checkpoint() -> None:
    catalog = Catalog.installed()
    module = types.ModuleType("lens_red")
    module.lens_text_encoders = hookimpl(lambda: {"mine": Wide})  # type: ignore[attr-defined]  # made on the spot
    catalog._add(Plugin("lens_red", "red", "0"), lambda: module)
    recipe = Recipe(
        ComponentSpec("flow_matching"),
        Training(3),
        ComponentSpec("shapes"),
        PipelineSpec("tiny:", text_encoder=ComponentSpec("mine")),
    )
    with pytest.raises(ConfigError, match="channels of a text feature, and lens_red:mine gives 64"):
        memory_estimate.describe(recipe, catalog)
    with pytest.raises(ConfigError, match="channels of a text feature, and lens_red:mine gives 64"):
        LensPipeline.from_parts(recipe.pipeline, catalog)
    assert "learns" in memory_estimate.describe(evolve(recipe, pipeline=PipelineSpec("tiny:")), catalog)
