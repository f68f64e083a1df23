"""The script that finds which steps of a student lose: what each letter of a pattern does, and what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from attrs import evolve

from lens_core import LensPipeline
from lens_core.catalog import Catalog


@pytest.fixture(scope="module")
def script(import_script: Callable[[str], Any]) -> Any:
    return import_script("student_steps")


def pipeline(seed: int, guidance: float) -> LensPipeline:
    torch.manual_seed(seed)
    return LensPipeline.from_parts(evolve(toy.PARTS, guidance_scale=guidance), Catalog.of(toy))


@torch.no_grad()
def test_a_student_alone_draws_as_its_pipeline_and_a_teacher_with_guidance(script: Any) -> None:
    student, teacher = pipeline(1, 1.0), pipeline(2, 3.0)
    text, noise = student.encode(["red", "blue"]), torch.randn(2, 4, 3, 2)
    *_, (_, alone) = student.sample(text, noise, 4, 1.0)
    torch.testing.assert_close(script.step_by_step(student, teacher, text, noise, "SSSS", 3), alone)
    *_, (_, guided) = teacher.sample(text, noise, 4, 3.0)
    torch.testing.assert_close(script.step_by_step(student, teacher, text, noise, "TTTT", 1), guided)


@torch.no_grad()
def test_the_letters_are_the_steps_in_order(script: Any) -> None:
    student, teacher = pipeline(1, 1.0), pipeline(2, 3.0)
    text, noise = student.encode(["red", "blue"]), torch.randn(2, 4, 3, 2)
    _, (_, x), *_ = teacher.sample(text, noise, 4, 3.0)  # after two of four steps
    times = student.sampler.times((3, 2), 4).tolist()
    for t, after in pairwise(times[2:]):
        x = x + (after - t) * student.backbone(x, torch.full((2,), t), text)
    torch.testing.assert_close(script.step_by_step(student, teacher, text, noise, "TTSS", 1), x)
    assert not torch.allclose(script.step_by_step(student, teacher, text, noise, "TTSS", 3), x)
    assert not torch.allclose(script.step_by_step(student, teacher, text, noise, "SSTT", 1), x)


def test_a_result_has_each_pattern_and_its_difference_to_the_first(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "steps.json"
    options = ["--prompts", "7", "--patterns", "SSSS", "TTSS", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["student_steps.py", "tiny:turbo", *options])
    script.main()
    result = json.loads(output.read_text())
    assert [*result["patterns"]] == ["SSSS", "TTSS"] and result["prompts"] == 7
    first, second = result["patterns"].values()
    assert first["difference"]["value"] == 0
    gain = second["overall"]["value"] - first["overall"]["value"]
    assert second["difference"]["value"] == pytest.approx(gain)


def test_patterns_of_other_letters_or_lengths_are_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for patterns in (["SSSS", "SSXS"], ["SSSS", "TT"]):
        argv = ["student_steps.py", "tiny:turbo", "--patterns", *patterns, "--output", str(tmp_path / "x.json")]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit):
            script.main()
        assert f"{patterns[1]}: a pattern has a letter" in capsys.readouterr().err
