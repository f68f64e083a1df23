"""The public benchmarks, measured by their authors' rules. This part decides: perceptions in, verdicts out, no model.

geneval     GenEval: objects, counts, colours and positions, from detections
cvtg        CVTG-2K: words of a prompt, from lines of OCR
longtext    LongText-Bench: recall of words, from the text that a vision model reads
oneig       OneIG: the text dimension
text        what the text benchmarks share: characters that count, edit distance
benchmarks  how a line of each is checked, decided and summed up
report      a file to verdicts and headlines, by the official and by the strict rule
folder      generator `folder`: pictures that exist
commands    `lens score`
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_generators() -> dict[str, type[Any]]:
    from lens_bench.folder import Folder
    from lens_core.evaluation.pipeline_generator import PipelineGenerator

    return {"folder": Folder, "pipeline": PipelineGenerator}


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_bench import commands  # light; so `lens --help` can describe it

    return {"score": f"{commands.__name__}:score"}
