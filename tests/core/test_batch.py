"""Requests and batches from Python, as the command line uses them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from lens_core.inference import png_metadata
from lens_core.inference.batch import generate_files, image_tasks, pending
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.reproduce import reproduce
from lens_core.inference.requests import GenerateRequest, ModelRequest
from lens_core.types import ConfigError


def test_a_script_goes_on_where_it_stopped(pipeline: LensPipeline, tmp_path: Path) -> None:
    request = GenerateRequest(height=16, width=32, steps=2)
    tasks = image_tasks(["one", "two"], tmp_path / "a.png", num_images=2, seed=5)
    assert [(t.prompt, t.seed, t.path.name) for t in tasks] == [
        ("one", 5, "a-0000.png"), ("one", 6, "a-0001.png"), ("two", 7, "a-0002.png"), ("two", 8, "a-0003.png"),
    ]  # fmt: skip
    steps: list[tuple[int, int]] = []
    written = list(
        generate_files(
            pipeline, request, tasks[:3], batch_size=2, on_step=lambda first, step, t: steps.append((first, step))
        )
    )
    assert [image.task for image in written] == tasks[:3] and written[0].facts["seed"] == 5
    assert steps == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert pending(pipeline, request, tasks) == tasks[3:]
    with pytest.raises(ConfigError, match="was asked for differently"):
        pending(pipeline, GenerateRequest(height=16, width=32, steps=3), tasks)


def test_a_failure_loses_no_picture_of_the_batches_before(
    pipeline: LensPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerateRequest(height=16, width=32, steps=2)
    tasks = image_tasks(["one", "two"], tmp_path / "a.png", num_images=2, seed=5)
    draw, threads = LensPipeline.__call__, set()

    def failing(self: LensPipeline, prompts: list[str], **options: object) -> object:
        if "two" in prompts:
            raise RuntimeError("out of memory")
        return draw(self, prompts, **options)  # type: ignore[arg-type]

    def slowly(*values: object) -> None:
        threads.add(threading.current_thread())
        time.sleep(0.05)
        save(*values)  # type: ignore[arg-type]

    save = png_metadata.save
    monkeypatch.setattr(LensPipeline, "__call__", failing)
    monkeypatch.setattr(png_metadata, "save", slowly)
    files = generate_files(pipeline, request, tasks, batch_size=2)
    for task in tasks[:2]:
        assert next(files).task == task and task.path.is_file()
    with pytest.raises(RuntimeError, match="out of memory"):
        next(files)
    assert not list(tmp_path.glob(".*"))
    assert threading.main_thread() not in threads  # drawing does not wait for a file


def test_each_setting_changes_the_fingerprint_and_the_batch_does_not(pipeline: LensPipeline) -> None:
    plain, mark = GenerateRequest(height=16, width=32), Image.new("RGB", (32, 16), "red")
    others = [
        GenerateRequest(height=16, width=48),
        GenerateRequest(height=16, width=32, steps=2),
        GenerateRequest("dog", 16, 32),
        GenerateRequest(height=16, width=32, image=mark),
        GenerateRequest(height=16, width=32, image=Image.new("RGB", (32, 16), "blue")),
        GenerateRequest(height=16, width=32, guidance_interval=(0.2, 1.0)),
    ]
    prints = [request.fingerprint(pipeline, "a", 1) for request in (plain, *others)]
    prints += [plain.fingerprint(pipeline, "a", 2), plain.fingerprint(pipeline, "b", 1)]
    assert len(set(prints)) == len(prints)
    assert GenerateRequest(height=16, width=32).fingerprint(pipeline, "a", 1) == prints[0]


def test_steps_out_of_range_are_refused_when_the_request_is_made() -> None:
    for steps in (0, 2**16 + 1):
        with pytest.raises(ConfigError, match="steps must be at"):
            GenerateRequest(steps=steps)


def test_an_image_is_reproduced_from_python(tmp_path: Path) -> None:
    model = ModelRequest("tiny:turbo", device="cpu")
    request = GenerateRequest(height=64, width=64, steps=2)
    pipeline = model.load(lambda loaded: request.workload(loaded, 1))
    (task,) = image_tasks(["a red circle"], tmp_path / "a.png", seed=3)
    list(generate_files(pipeline, request, [task]))
    again = reproduce(task.path, model)
    assert (again.max_difference, again.mean_difference, again.changes) == (0, 0.0, {})
    with pytest.raises(ConfigError, match="give --model and --lora"):
        reproduce(task.path, ModelRequest("tiny:", device="cpu"))
