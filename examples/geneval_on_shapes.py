"""GenEval's own path on the proving ground, beside a judge that makes no mistakes.

    python examples/geneval_on_shapes.py prompts shapes-geneval.jsonl --prompts 240
    lens bench '{use: geneval, file: shapes-geneval.jsonl, detector: shapes_objects, classifier: shapes_colors}' \\
        --model tiny:turbo --size 64x64 --num-images 1 --output runs/shapes-geneval
    lens bench '{use: shapes, prompts: 240, tasks: [single, two, counting, colours, position, attribution],
        extras: true}' --model tiny:turbo --size 64x64 --output runs/shapes-direct
    python examples/geneval_on_shapes.py compare runs/shapes-geneval runs/shapes-direct

The first command writes the prompts of the benchmark `shapes` as a prompt file of GenEval. Both runs draw the same
pictures; the last command compares the two verdicts on each. `extras` is GenEval's rule that things which were not
asked for do no harm; without it the judge of `shapes` is stricter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.perceivers import TAGS, geneval_entry


def write_prompts(path: Path, count: int) -> None:
    config = ShapesBenchmark.Config(prompts=count, tasks=tuple(TAGS))
    entries = [geneval_entry(prompt) for prompt in ShapesBenchmark(config).prompts()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    print(f"{path}: {len(entries)} prompts")


def compare(by_geneval: Path, direct: Path) -> None:
    """Agreement by tag, and both overall scores with their intervals of 95 %."""
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (by_geneval, direct)]
    pairs: dict[str, list[tuple[float, float]]] = {}
    for one, other in zip(*(result["pictures"] for result in results), strict=True):
        if (one["prompt"], one["seed"]) != (other["prompt"], other["seed"]):
            raise SystemExit("the two runs are of other prompts or seeds")
        pairs.setdefault(one["task"], []).append((one["value"], other["value"]))
    print("| tag | by GenEval's rules | by the judge of shapes | same verdict |\n|---|---|---|---|")
    for tag, values in pairs.items():
        a, b = (sum(column) / len(values) for column in zip(*values, strict=True))
        print(f"| {tag} | {a:.3f} | {b:.3f} | {sum(x == y for x, y in values)} of {len(values)} |")
    means = [_mean_of_tags(pairs, side) for side in (0, 1)]
    whole = results[0]["overall"]
    interval = f"[{whole['low']:.3f}, {whole['high']:.3f}]"
    print(f"mean of the tags: {means[0]:.3f} {interval} by GenEval's rules, {means[1]:.3f} by the judge of shapes")


def _mean_of_tags(pairs: dict[str, list[tuple[float, float]]], side: int) -> float:
    return sum(sum(pair[side] for pair in values) / len(values) for values in pairs.values()) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write a prompt file")
    prompts.add_argument("path", type=Path)
    prompts.add_argument("--prompts", type=int, default=240)
    both = commands.add_parser("compare", help="compare two runs")
    both.add_argument("by_geneval", type=Path)
    both.add_argument("direct", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "prompts":
        write_prompts(arguments.path, arguments.prompts)
    else:
        compare(arguments.by_geneval, arguments.direct)


if __name__ == "__main__":
    main()
