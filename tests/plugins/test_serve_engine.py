"""The engine of `lens serve`: order, batches, seeds, previews, cancelling, bounds and faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lens_flow
import numpy as np
import pytest
import torch
import toy
from attrs import evolve
from lens_serve.engine import Engine
from lens_serve.jobs import (
    Busy,
    Cancelled,
    Done,
    Failed,
    ImageRequest,
    Job,
    JobCancelled,
    Limits,
    Queued,
    Step,
    Stopping,
)
from lens_serve.live import is_due
from PIL import Image
from serving import WAIT, Gate

from lens_core.catalog import Catalog
from lens_core.checkpoints import lora_keys
from lens_core.checkpoints.adapters import LoRA
from lens_core.inference import png_metadata
from lens_core.inference.call_arguments import MAX_SEED
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.types import ConfigError, LensError, Refinement

SMALL = GenerateRequest(height=32, width=32)


def request(prompt: str = "red", seed: int = 1, **fields: Any) -> ImageRequest:
    return ImageRequest(prompt=prompt, seed=seed, settings=fields.pop("settings", SMALL), **fields)


@pytest.fixture
def engine(pipeline: LensPipeline) -> Iterator[Callable[..., Engine]]:
    """Engines over the toy pipeline, which draw at guidance 1: one pass of the backbone a step."""
    pipeline.presets["guidance_scale"] = 1.0
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        options["limits"] = options.get("limits") or Limits(max_batch=8, max_queue=4)
        made.append(Engine(pipeline, **options))
        return made[-1]

    yield make
    for one in made:
        one.close(WAIT)
        assert not one._thread.is_alive()


def pixels(job: Job) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(drawn.image).astype(int) for drawn in job.result(WAIT)]


def test_a_job_tells_each_step_and_ends_with_pictures_and_their_facts(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    job = engine().submit(request(num_images=2, seed=7, settings=evolve(SMALL, steps=4)))
    events = list(job.events(WAIT))
    assert events[0] == Queued(0)
    assert [(e.step, e.steps, e.indices, e.latents) for e in events[1:-1] if isinstance(e, Step)] == [
        (step, 4, (0, 1), None) for step in (1, 2, 3, 4)
    ]
    assert isinstance(events[-1], Done) and job.finished
    drawn = job.result(0)
    assert [one.seed for one in drawn] == [7, 8] and [one.image.size for one in drawn] == [(32, 32)] * 2
    facts = dict(drawn[1].facts)
    assert (facts["prompt"], facts["seed"], facts["steps"], facts["negative_prompt"]) == ("red", 8, 4, "")
    assert job.take() == []


def test_the_pictures_are_those_of_the_pipeline_alone_and_in_a_batch(
    engine: Callable[..., Engine], pipeline: LensPipeline
) -> None:
    settings = evolve(SMALL, guidance_scale=3.0)
    words = [("red", "blue"), ("a green one", "red"), ("x", "y")]
    alone = [
        np.asarray(pipeline(p, n, seed=i, height=32, width=32, guidance_scale=3.0).images[0]).astype(int)
        for i, (p, n) in enumerate(words)
    ]
    gate, running = Gate(pipeline), engine()
    first = running.submit(request("wait"))
    gate.arrived()  # so that the others wait, and are drawn together
    jobs = [
        running.submit(request(p, i, settings=evolve(settings, negative_prompt=n))) for i, (p, n) in enumerate(words)
    ]
    gate.open()
    drawn = [pixels(job)[0] for job in jobs]
    assert first.result(WAIT)
    assert running.counters.batches == 2  # the first one, and the three together
    assert max(np.abs(a - b).max() for a, b in zip(alone, drawn, strict=True)) <= 1
    assert np.abs(alone[0] - alone[1]).max() > 8  # other pictures would be noticed
    assert [job.result(0)[0].facts["negative_prompt"] for job in jobs] == ["blue", "red", "y"]


def test_only_requests_that_agree_share_a_batch_and_the_oldest_goes_first(
    engine: Callable[..., Engine], pipeline: LensPipeline
) -> None:
    gate, running = Gate(pipeline), engine(limits=Limits(max_batch=3, max_queue=9))
    jobs = [running.submit(request("wait"))]
    gate.arrived()
    pipeline.backbone.calls.clear()
    other = evolve(SMALL, steps=2)
    jobs += [running.submit(request("a")), running.submit(request("b", settings=other))]
    jobs += [running.submit(request("c", num_images=3)), running.submit(request("d", settings=other))]
    gate.open()
    for job in jobs:
        job.result(WAIT)
    passes = [batch for batch, _ in pipeline.backbone.calls]
    # the first alone (3 steps); a with two pictures of c; b with d, which have 2 steps; the last picture of c
    assert passes == [1] * 3 + [3] * 3 + [2] * 2 + [1] * 3


def test_a_batch_of_one_is_bit_for_bit_the_pipeline(engine: Callable[..., Engine], pipeline: LensPipeline) -> None:
    expected = np.asarray(pipeline("red", seed=3, height=32, width=32).images[0])
    (drawn,) = engine(limits=Limits(max_batch=1)).submit(request(seed=3)).result(WAIT)
    assert (np.asarray(drawn.image) == expected).all()


def test_previews_are_the_guess_of_the_finished_picture(engine: Callable[..., Engine], pipeline: LensPipeline) -> None:
    job = engine().submit(request(settings=evolve(SMALL, steps=8), num_images=2, previews=3))
    steps = [e for e in job.events(WAIT) if isinstance(e, Step)]
    shown = [e for e in steps if e.latents is not None]
    assert all(len(e.images) == 2 and e.images[0].size == (32, 32) for e in shown)
    assert all(tuple(e.latents.shape) == (2, 4, 2, 2) for e in shown if e.latents is not None)
    final = pixels(job)[0]
    away = [np.abs(np.asarray(e.images[0]).astype(int) - final).mean() for e in shown]
    noise = np.abs(np.asarray(pipeline.decode(pipeline.noise([torch.Generator().manual_seed(1)], (2, 2)))) * 127).mean()
    assert away[-1] <= away[0] < noise  # nearer with each


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [(4, 0, []), (4, 1, [2]), (4, 3, [1, 2, 3]), (4, 9, [1, 2, 3]), (20, 3, [5, 10, 15]), (1, 3, [])],
)
def test_previews_are_spread_over_the_steps_before_the_last(steps: int, previews: int, expected: list[int]) -> None:
    assert [s for s in range(1, steps + 1) if is_due(s, steps, previews)] == expected


def test_a_slow_reader_loses_old_steps_and_never_the_end(engine: Callable[..., Engine]) -> None:
    job = engine().submit(request(settings=evolve(SMALL, steps=50), previews=49))
    job.result(WAIT)
    kept = list(job.events(WAIT))
    assert [type(e) for e in kept] == [Queued, Step, Step, Step, Step, Done]
    assert [e.step for e in kept if isinstance(e, Step)] == [47, 48, 49, 50]


def test_a_slow_reader_loses_steps_without_a_preview_first(engine: Callable[..., Engine]) -> None:
    job = engine().submit(request(settings=evolve(SMALL, steps=20), previews=3))
    job.result(WAIT)
    kept = [e for e in job.events(WAIT) if isinstance(e, Step)]
    assert [(e.step, len(e.images)) for e in kept] == [(5, 1), (10, 1), (15, 1), (20, 0)]


def test_cancelling_stops_within_a_step(engine: Callable[..., Engine], pipeline: LensPipeline) -> None:
    gate, running = Gate(pipeline), engine()
    job = running.submit(request(settings=evolve(SMALL, steps=90)))
    for _ in range(3):
        gate.arrived()
        gate.passes.release()
    job.cancel()
    gate.open()
    assert isinstance(list(job.events(WAIT))[-1], Cancelled)
    assert len(pipeline.backbone.calls) <= 5
    with pytest.raises(JobCancelled):
        job.result(WAIT)
    assert running.submit(request()).result(WAIT)
    assert (running.counters.cancelled, running.counters.done) == (1, 1)


def test_cancelling_one_of_a_batch_takes_its_rows_out_and_leaves_the_others_as_they_were(
    engine: Callable[..., Engine], pipeline: LensPipeline
) -> None:
    settings = evolve(SMALL, steps=6, guidance_scale=3.0, negative_prompt="grey")
    expected = pipeline("stay", "grey", seed=5, height=32, width=32, num_inference_steps=6, guidance_scale=3.0)
    gate, running = Gate(pipeline), engine()
    first = running.submit(request("wait"))
    gate.arrived()
    pipeline.backbone.calls.clear()
    leave = running.submit(request("leave me", 4, settings=settings, num_images=2))
    stay = running.submit(request("stay", 5, settings=settings))
    gate.passes.release(3)  # the three steps of the first
    for _ in range(3 + 1):  # its other two passes, and the first two of the batch: one of each branch of guidance
        gate.arrived()
        gate.passes.release()
    leave.cancel()
    gate.open()
    assert first.result(WAIT) and isinstance(list(leave.events(WAIT))[-1], Cancelled)
    assert np.abs(pixels(stay)[0] - np.asarray(expected.images[0]).astype(int)).max() <= 1
    batches = [batch for batch, _ in pipeline.backbone.calls][3:]
    assert batches[0] == 3 and batches[-1] == 1 and set(batches) == {1, 3} and len(batches) == 12


def test_a_job_that_waits_is_cancelled_at_once(engine: Callable[..., Engine], pipeline: LensPipeline) -> None:
    gate, running = Gate(pipeline), engine()
    first = running.submit(request())
    gate.arrived()
    second = running.submit(request("other"))
    second.cancel()
    assert [type(e) for e in second.events(0.0)] == [Queued, Cancelled] and running.waiting == 0
    gate.open()
    assert first.result(WAIT)
    second.cancel()
    first.cancel()  # finished: it stays as it is
    assert isinstance(first.final, Done) and running.counters.cancelled == 1


def test_a_full_queue_refuses_with_a_time_and_loses_nothing(
    engine: Callable[..., Engine], pipeline: LensPipeline
) -> None:
    gate, running = Gate(pipeline), engine(limits=Limits(max_queue=2, max_batch=1))
    jobs = [running.submit(request())]
    gate.arrived()
    jobs += [running.submit(request(seed=seed)) for seed in (2, 3)]
    with pytest.raises(Busy, match="2 requests wait already") as busy:
        running.submit(request())
    assert busy.value.retry_after >= 1 and not isinstance(busy.value, Stopping)
    gate.open()
    assert all(len(job.result(WAIT)) == 1 for job in jobs)
    assert running.submit(request()).result(WAIT)
    assert running.counters.refused == 1 and running.counters.done == 4


def test_closing_finishes_what_was_accepted_and_refuses_the_rest(
    engine: Callable[..., Engine], pipeline: LensPipeline
) -> None:
    gate, running = Gate(pipeline), engine()
    jobs = [running.submit(request(seed=seed)) for seed in (1, 2)]
    gate.arrived()
    closer = threading.Thread(target=running.close, args=(WAIT,))
    closer.start()
    while not running.closing:
        pass
    with pytest.raises(Stopping, match="is stopping"):
        running.submit(request())
    gate.open()
    closer.join(WAIT)
    assert all(isinstance(job.final, Done) for job in jobs) and not running._thread.is_alive()


def test_closing_cancels_what_is_not_finished_in_time(engine: Callable[..., Engine], pipeline: LensPipeline) -> None:
    gate, running = Gate(pipeline), engine()
    jobs = [running.submit(request(settings=evolve(SMALL, steps=80))), running.submit(request("waits"))]
    gate.arrived()
    threading.Timer(0.3, gate.open).start()
    assert running.close(0.05) is False
    assert [type(job.final) for job in jobs] == [Cancelled, Cancelled] and len(pipeline.backbone.calls) < 80


def test_the_fault_of_one_request_fails_that_request_alone(
    engine: Callable[..., Engine], pipeline: LensPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refine(prompts: list[str]) -> list[Refinement]:
        if "broken" in prompts:
            raise RuntimeError("no words\nfor this")
        return [Refinement(p, p) for p in prompts]

    monkeypatch.setattr(pipeline, "refine", refine)
    gate, running = Gate(pipeline), engine()
    first = running.submit(request("wait"))
    gate.arrived()
    jobs = [running.submit(request(word)) for word in ("fine", "broken", "well")]
    gate.open()
    assert first.result(WAIT) and jobs[0].result(WAIT) and jobs[2].result(WAIT)
    failed = list(jobs[1].events(WAIT))[-1]
    assert isinstance(failed, Failed) and not failed.bad_request
    assert failed.message.startswith("RuntimeError: no words for this;") and "\n" not in failed.message
    with pytest.raises(RuntimeError):
        jobs[1].result(WAIT)
    assert running.counters.failed == 1 and running.counters.done == 3


def test_a_panic_that_is_no_exception_ends_the_job_and_not_the_thread(
    engine: Callable[..., Engine], pipeline: LensPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def refine(_: list[str]) -> list[Refinement]:
        raise Panic("at the disco")

    running = engine()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "refine", refine)
        failed = list(running.submit(request()).events(WAIT))[-1]
    assert isinstance(failed, Failed) and "Panic: at the disco" in failed.message
    assert running.submit(request()).result(WAIT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "a" * 101}, "prompt has 101 characters, and at most 100"),
        ({"prompt": "half \ud800"}, "half a character"),
        ({"prompt": 7}, "prompt must be a text"),
        ({"settings": evolve(SMALL, negative_prompt="b" * 101)}, "negative_prompt has 101"),
        ({"settings": evolve(SMALL, height=33)}, "not a multiple of 16"),
        ({"settings": evolve(SMALL, height=64, width=160)}, "160x64 px has 10240 pixels, .* at most 10000"),
        ({"settings": GenerateRequest()}, "1048576 pixels"),
        ({"settings": evolve(SMALL, steps=51)}, "steps must be at most 50 on this server, not 51"),
        ({"settings": evolve(SMALL, guidance_scale=float("nan"))}, "guidance_scale must be a finite number"),
        ({"settings": evolve(SMALL, strength=0.5)}, "a strength without a picture"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"num_images": 5}, "num_images must be at most 4"),
        ({"num_images": True}, "num_images must be a whole number"),
        ({"previews": 101}, "previews must be at most 100"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at most"),
        ({"sampler": "eule"}, "no sampler is called 'eule'. Known: even"),
        ({"loras": (("style", 1.0),)}, "no LoRA is called 'style'. This server offers none"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_waits(
    engine: Callable[..., Engine], changes: dict[str, Any], message: str
) -> None:
    running = engine(limits=Limits(max_prompt=100, max_pixels=10_000, max_steps=50, max_images=4))
    with pytest.raises(ConfigError, match=message) as fault:
        running.submit(request(**changes))
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 400
    assert running.waiting == running.running == 0


def test_an_init_image_and_a_mask_are_honoured_and_checked_at_once(engine: Callable[..., Engine]) -> None:
    running = engine()
    image, mask = Image.new("RGB", (32, 32), (10, 200, 30)), Image.new("L", (32, 32))
    with pytest.raises(ConfigError, match="black all over"):
        running.submit(request(settings=GenerateRequest(image=image, mask=mask)))
    mask.paste(255, (0, 0, 16, 32))
    job = running.submit(request(settings=GenerateRequest(image=image, mask=mask, steps=4), previews=2))
    previews = [e.images[0] for e in job.events(WAIT) if isinstance(e, Step) and e.images]
    for picture in [*previews, job.result(0)[0].image]:
        assert {picture.getpixel((x, y)) for x in (16, 31) for y in (0, 31)} == {(10, 200, 30)}
        assert picture.getpixel((0, 0)) != (10, 200, 30)
    assert len(previews) == 2 and "mask_hash" in job.result(0)[0].facts


def test_what_only_drawing_finds_is_a_bad_request_too(engine: Callable[..., Engine]) -> None:
    image = Image.new("RGB", (32, 32))
    failed = list(engine().submit(request(settings=GenerateRequest(image=image, strength=0.5))).events(WAIT))[-1]
    assert isinstance(failed, Failed) and failed.bad_request and "can only begin at noise" in failed.message


def test_loras_of_a_request_leave_no_trace_on_the_next(
    engine: Callable[..., Engine], pipeline: LensPipeline, tmp_path: Path
) -> None:
    rng = torch.Generator().manual_seed(0)
    pair = LoRA(torch.randn(2, 16, generator=rng), torch.randn(4, 2, generator=rng), 2.0)
    for name in ("style", "base"):
        lora_keys.write(tmp_path / f"{name}.safetensors", {"outer": pair}, "diffusers")
    pipeline.load_lora_weights(tmp_path / "base.safetensors", 0.1)
    weights = pipeline.backbone.outer.weight.clone()
    running = engine(
        loras={"style": tmp_path / "style.safetensors", "gone": tmp_path / "gone.safetensors"},
        base_loras=[(tmp_path / "base.safetensors", 0.1)],
    )
    plain = pixels(running.submit(request()))[0]
    with_lora = running.submit(request(loras=(("style", 2.0),)))
    assert np.abs(pixels(with_lora)[0] - plain).max() > 1
    assert with_lora.result(0)[0].facts["loras"] == ["base.safetensors:0.1", "style.safetensors:2"]
    failed = list(running.submit(request(loras=(("gone", 1.0),))).events(WAIT))[-1]
    assert isinstance(failed, Failed)
    assert (pixels(running.submit(request()))[0] == plain).all()
    assert torch.equal(pipeline.backbone.outer.weight, weights)
    for wrong, message in (
        ((("style", float("nan")),), "finite"),
        ((("style", 1.0), ("style", 2.0)), "named twice"),
        ((("styl", 1.0),), "Did you mean 'style'"),
    ):
        with pytest.raises(ConfigError, match=message):
            running.submit(request(loras=wrong))


def test_a_listener_hears_of_every_event_and_a_late_one_of_those_before(engine: Callable[..., Engine]) -> None:
    job = engine().submit(request())
    job.result(WAIT)
    heard = threading.Event()
    job.listen(heard.set)
    assert heard.is_set() and isinstance(job.take()[-1], Done)


def test_a_sampler_that_was_assigned_leaves_the_version_as_it_is(
    pipeline: LensPipeline, engine: Callable[..., Engine]
) -> None:
    pipeline.catalog, pipeline.version = Catalog.of(toy, lens_flow), "abc"
    pipeline.sampler = toy.Even(toy.Even.Config())
    running = engine()
    hashes = {running.submit(request(sampler=name)).result(WAIT)[0].facts["model_hash"] for name in ("heun", None) * 2}
    assert hashes == {"abc+sampler"} == {running.model_hash}


def test_a_model_that_cannot_draw_is_refused_at_the_start(pipeline: LensPipeline) -> None:
    with pytest.raises(LensError, match="there is no vae and no backbone and no sampler in this pipeline") as fault:
        Engine.load(ModelRequest("tiny:reasoner"))
    assert "\n" not in str(fault.value)
    pipeline.store = pipeline.store.replaced("vae", None)
    with pytest.raises(LensError, match="there is no vae in this pipeline"):
        Engine(pipeline)


def test_the_largest_seed_is_that_of_the_last_picture(engine: Callable[..., Engine]) -> None:
    running = engine()
    for count in (1, 3):
        first = MAX_SEED - count + 1
        drawn = running.submit(request(seed=first, num_images=count)).result(WAIT)
        assert [one.seed for one in drawn] == list(range(first, MAX_SEED + 1))
        with pytest.raises(ConfigError, match=f"seed must be at most {first}"):
            running.submit(request(seed=first + 1, num_images=count))


def test_a_sampler_has_the_shift_of_the_checkpoint_whichever_came_before(
    pipeline: LensPipeline, engine: Callable[..., Engine]
) -> None:
    pipeline.catalog = Catalog.of(toy, lens_flow)
    pipeline.use_sampler("euler", mu=0.7)
    running = engine()
    for name, mu in (("heun", 0.7), ("even", None), ("dpmpp", 0.7), (None, 0.7)):
        (drawn,) = running.submit(request(sampler=name)).result(WAIT)
        assert drawn.facts["sampler"].get("mu") == mu, name


def test_tiny_draws_the_same_picture_alone_and_batched_with_any_sampler(tmp_path: Path) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", offload="auto")
    prompts = ["a green square", "two red circles left of a blue star"]
    settings = GenerateRequest(height=64, width=64, steps=2)
    gate = Gate(pipeline)
    running = Engine(pipeline, limits=Limits(max_batch=3))
    assert pipeline.latent_preview is not None  # so that previews are made by the map
    try:
        assert {"euler", "heun", "euler_ancestral"} <= set(running.samplers)
        for sampler in ("euler_ancestral",):  # its noise in every step must be each picture's
            gate.open()
            alone = [pixels(running.submit(request(p, 5, sampler=sampler, settings=settings)))[0] for p in prompts]
            gate.always, gate.passes, gate.reached = False, threading.Semaphore(0), threading.Semaphore(0)
            first = running.submit(request("x", settings=settings))
            gate.arrived()
            jobs = [running.submit(request(p, 5, sampler=sampler, settings=settings)) for p in prompts]
            batches = running.counters.batches
            gate.open()
            assert max(np.abs(pixels(job)[0] - one).max() for job, one in zip(jobs, alone, strict=True)) <= 1
            assert first.result(WAIT) and running.counters.batches == batches + 2
            assert np.abs(alone[0] - alone[1]).max() > 100
        job = running.submit(request(prompts[0], 5, settings=evolve(settings, steps=4), previews=3))
        previews = [e.images[0] for e in job.events(WAIT) if isinstance(e, Step) and e.images]
        away = [np.abs(np.asarray(one).astype(int) - pixels(job)[0]).mean() for one in previews]
        assert [one.size for one in previews] == [(64, 64)] * 3 and away[2] < 25 and away[2] <= away[0]
        drawn = jobs[0].result(0)[0]
        png_metadata.save(drawn.image, tmp_path / "a.png", dict(drawn.facts))
        assert png_metadata.facts(tmp_path / "a.png")[1]["sampler"]["use"] == "lens_flow:euler_ancestral"
    finally:
        running.close(WAIT)
