"""Results as `lens bench` writes them, from what `train_embedded.py` measured at its end on the split test.

    python scripts/embedded_results.py docs/results/embedded docs/results/tiny

Writes one folder for each size and seed, `128/seed-0` and so on, with `result.json` and `table.md`. The ceiling of each
size is measured here, with the VAE of `tiny:`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from lens_shapes.benchmark import ShapesBenchmark

from lens_core import LensPipeline
from lens_core.evaluation import report, run
from lens_core.types import Prompt, Score


@frozen
class Scored:
    """A benchmark whose scores are known already."""

    headline: tuple[str, ...]
    values: tuple[int, ...]

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float(value)) for value in self.values]


def write(folder: Path, facts: Mapping[str, Any], measured: Mapping[str, Any], ceiling: Mapping[str, float]) -> None:
    """The result of one seed at one size. `facts`: those of the whole run."""
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=measured["prompts"], split="test"))
    prompts, values = benchmark.prompts(), tuple(measured["values"])
    nothing = torch.zeros(len(prompts), 3, 1, 1, dtype=torch.uint8)
    result = run.score(Scored(benchmark.headline, values), nothing, prompts, ceiling)
    about = {
        "benchmark": "{use: shapes, split: test}", "model": "tiny:",
        "model_hash": LensPipeline.from_pretrained("tiny:", parts=("sampler",)).version,
        "seed": measured["seed"], "steps": 20, "guidance_scale": measured["guidance"],
        "size": [measured["side"], measured["side"]], "dtype": "bfloat16", "device": facts["device"],
        "versions": {"torch": facts["torch"]}, "script": "scripts/train_embedded.py",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    content = about | report.result_json(result, prompts, measured["seed"])
    (folder / "result.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    line = ", ".join(f"{name} {value}" for name, value in about.items())
    (folder / "table.md").write_text(f"{report.table(result)}\n\n{line}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    facts = json.loads((options.run / "result.json").read_text(encoding="utf-8"))
    pipeline, ceilings = LensPipeline.from_pretrained("tiny:"), {}
    for measured in facts["scores"]:
        if "values" not in measured:
            continue
        side = measured["side"]
        if side not in ceilings:
            benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=measured["prompts"], split="test"))
            ceilings[side] = run.ceiling_of(pipeline, benchmark, benchmark.prompts(), (side, side))
        write(options.output / str(side) / f"seed-{measured['seed']}", facts, measured, ceilings[side])


if __name__ == "__main__":
    main()
