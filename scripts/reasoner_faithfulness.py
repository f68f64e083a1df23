"""How often a reasoner keeps what a request names: shapes, colours, counts, relations, words; read from its answers.

    python scripts/reasoner_faithfulness.py tiny:reasoner --output docs/results/reasoner/faithfulness.json

The requests are those of the dataset `shapes_chat`: of the tenth that no training conversation asks for, in any wording
or language. A second column is the control: each answer is compared with the facts of another request. Intervals are
Wilson's, 95 %.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cyclopts
from lens_shapes.chats import ShapesChats
from lens_shapes.faithful import KINDS, check
from lens_shapes.scenes import TASKS, prompt_facts

from lens_core import ComponentSpec, LensPipeline, Refinement
from lens_core.evaluation.statistics import wilson_interval

Facts = Mapping[str, Any]


def main(
    model: str,
    *,
    requests: int = 1000,
    seed: int = 1,
    split: str = "all",
    part: str = "heldout",
    translated: float = 0.3,
    intrusions: float = 0.0,
    language: str = "en",
    system: str | None = None,
    output: Path | None = None,
) -> None:
    """Parameters

    split, part: the scenes and the requests, as in the dataset `shapes_chat` (its options `split` and `requests`).
    model: a checkpoint whose text encoder writes, by any name that --model takes.
    translated, intrusions: shares of the requests, as in the dataset `shapes_chat`.
    system: a system prompt; the reasoner's default without one.
    """
    options = {"model": model, "language": language, "max_new_tokens": 320, "system": system}
    pipeline = LensPipeline.from_pretrained("tiny:", reasoner=ComponentSpec("gpt_oss", options))
    tasks = {task: weight for task, weight in TASKS.items() if task != "novel"}
    chats = ShapesChats(
        ShapesChats.Config(
            seed=seed, split=split, requests=part, translated=translated, intrusions=intrusions, tasks=tasks
        )
    )
    questions = [chats.question(0, row) for row in range(requests)]
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unused answers are counted
        answers = pipeline.refine([request for _, request, _ in questions])
    seconds = time.perf_counter() - begin
    facts = [prompt_facts(scene) for scene, _, _ in questions]
    result: dict[str, Any] = {
        "model": model,
        "split": split,
        "part": part,
        "seed": seed,
        "requests": requests,
        "translated": translated,
        "intrusions": intrusions,
        "used": share(sum(not answer.reason for answer in answers), requests),
        "reasons": dict(Counter(answer.reason for answer in answers if answer.reason).most_common(8)),
        "words_an_answer": sum(len(answer.text.split()) for answer in answers) / requests,
        "kept": table(facts, answers),
        "control": table([*facts[1:], facts[0]], answers),
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {platform.python_version()}",
    }
    for kind in (*KINDS, "all"):
        kept, other = result["kept"][kind], result["control"][kind]
        interval = f"{kept['low']:.3f}-{kept['high']:.3f}"
        print(f"{kind:<10} {kept['share']:.3f} [{interval}] of {kept['of']}, control {other['share']:.3f}")
    print(f"answers used: {result['used']['share']:.3f}; {result['reasons']}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def table(facts: Sequence[Facts], answers: Sequence[Refinement]) -> dict[str, Any]:
    """Kind of fact -> how many answers keep all of that kind, of those whose request names one. An answer that is not
    used keeps nothing."""
    checked = [check(one, answer.text if not answer.reason else "") for one, answer in zip(facts, answers, strict=True)]
    kept = {kind: [one[kind] for one in checked if kind in one] for kind in KINDS}
    kept["all"] = [all(one.values()) for one in checked]
    return {kind: share(sum(values), len(values)) for kind, values in kept.items()}


def share(count: int, of: int) -> dict[str, float]:
    """A share with Wilson's interval."""
    low, high = wilson_interval(count / of, of) if of else (0.0, 1.0)
    return {"share": count / of if of else 0.0, "low": low, "high": high, "of": of}


if __name__ == "__main__":
    cyclopts.run(main)
