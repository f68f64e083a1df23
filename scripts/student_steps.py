"""Which steps of a few-step student lose against its teacher: pictures of which both draw a part, and their scores.

    python scripts/student_steps.py tiny:turbo --teacher tiny: --output runs/student-steps.json

A pattern has a letter for each step: S, the student makes it, or T, the teacher goes the same way in three guided steps
of Euler's method. Where TTSS is as good as the teacher, the student's last two steps cost nothing. The prompts are
those of `shapes`, all patterns have the same noise, and differences to the first pattern are paired. A result stands in
docs/distill.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from lens_dmd2.regression import mean_velocity
from lens_dmd2.student import velocity_of
from lens_shapes.benchmark import ShapesBenchmark
from torch import Tensor

from lens_core import LensPipeline, flow
from lens_core.evaluation.run import BenchmarkResult, by_task, score
from lens_core.evaluation.statistics import paired_difference
from lens_core.io.atomic_files import write_json
from lens_core.types import Prompt, Score, TextFeatures

PATTERNS = ("SSSS", "TSSS", "TTSS", "TTTS", "SSTT", "SSST")
FIRST = 1000  # the seed of the first picture's noise


def step_by_step(student: Any, teacher: Any, text: TextFeatures, noise: Tensor, pattern: str, parts: int) -> Tensor:
    """Latents of pictures whose steps student and teacher make by turns."""
    unguided, scale = velocity_of(student.backbone, text), teacher.presets["guidance_scale"]
    times = student.sampler.times(tuple(noise.shape[-2:]), len(pattern)).tolist()
    x = noise
    for letter, (t, after) in zip(pattern, pairwise(times), strict=True):
        guided = letter == "T"
        v = mean_velocity(teacher.backbone, text, scale, x, t, after, parts) if guided else unguided(x, flow.at(t, x))
        x = x + (after - t) * v
    return x


@torch.no_grad()
def run(
    student: Any, teacher: Any, benchmark: Any, prompts: Sequence[Prompt], pattern: str, parts: int, batch: int
) -> BenchmarkResult:
    """Draw and score the benchmark's prompts by one pattern."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))  # like lengths together: little padding
    size = [side // student.vae.downscale for side in student.size()]
    images: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        noise = [
            torch.randn(student.vae.channels, *size, generator=torch.Generator().manual_seed(FIRST + i)) for i in rows
        ]
        text = student.encode([prompts[i].text for i in rows])
        drawn = student.decode(step_by_step(student, teacher, text, torch.stack(noise), pattern, parts)).float()
        images |= zip(rows, ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), strict=True)
    return score(benchmark, torch.stack([images[i] for i in range(len(prompts))]), prompts)


def against(result: BenchmarkResult, other: BenchmarkResult, prompts: Sequence[Prompt]) -> dict[str, float]:
    """How much better a result is than another on the same prompts."""
    scores = [
        Score("abstain") if a.value is None or b.value is None else Score("ok", a.value - b.value)
        for a, b in zip(result.scores, other.scores, strict=True)
    ]
    return dict(asdict(paired_difference(by_task(prompts, scores), result.headline)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--teacher", default="tiny:")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="S and T, a letter for each step")
    parser.add_argument("--parts", type=int, default=3, help="guided steps of the teacher for one of the student")
    parser.add_argument("--split", default="select", help="of the benchmark's prompts")
    parser.add_argument("--prompts", type=int, default=350)
    parser.add_argument("--batch", type=int, default=35)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    wrong = [p for p in options.patterns if set(p) - {"S", "T"} or len(p) != len(options.patterns[0])]
    if wrong:
        parser.error(f"{wrong[0]}: a pattern has a letter S or T for each step, and all have as many")
    torch.set_num_threads(options.threads)
    student, teacher = (LensPipeline.from_pretrained(m, device="cpu") for m in (options.student, options.teacher))
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=options.prompts, split=options.split, seed=1))
    settings = {n: getattr(options, n) for n in ("student", "teacher", "parts", "split", "prompts")}
    prompts, first, lines = benchmark.prompts(), None, {}
    for pattern in options.patterns:
        result = run(student, teacher, benchmark, prompts, pattern, options.parts, options.batch)
        first = first or result
        tasks = {name: estimate.value for name, estimate in result.tasks.items()}
        print(pattern, *(f"{name} {value:.2f}" for name, value in tasks.items()), f"overall {result.overall.value:.3f}")
        difference = against(result, first, prompts)
        lines[pattern] = {"overall": asdict(result.overall), "tasks": tasks, "difference": difference}
        write_json(options.output, {**settings, "patterns": lines})


if __name__ == "__main__":
    main()
