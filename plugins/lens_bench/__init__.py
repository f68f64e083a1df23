"""The public benchmarks, measured by their authors' rules. This part decides: perceptions in, verdicts out, no model.

geneval     GenEval: objects, counts, colours and positions, from detections
cvtg        CVTG-2K: words of a prompt, from lines of OCR
longtext    LongText-Bench: recall of words, from the text that a vision model reads
oneig       OneIG: the text dimension
text        what the text benchmarks share: characters that count, edit distance
benchmarks  how a line of each is checked, decided and summed up
report      a file to verdicts and headlines, by the official and by the strict rule
prompt_files  the benchmarks' prompts, from files or fetched at a pinned revision
components  the benchmarks, with the perceivers that they name
decisions   a run's perceptions to the scores of its report
diffusers_pipeline  generator `diffusers`: any pipeline of that library
folder      generator `folder`: pictures that exist
published   the paper's table of systems, with published figures
latency     seconds a picture by part
figures     `lens figure speed-quality`
commands    `lens score`; `lens bench latency`, `ocr` and `table`
perception  stage 2 of each benchmark: pictures in, lines of perceptions out
perceive/   the models that look at pictures, and the cache of their answers
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    from lens_bench.components import CVTG, GenEval, LongText, OneIG

    return {"cvtg": CVTG, "geneval": GenEval, "longtext": LongText, "oneig": OneIG}


@hookimpl
def lens_generators() -> dict[str, type[Any]]:
    from lens_bench.diffusers_pipeline import Diffusers
    from lens_bench.folder import Folder
    from lens_core.evaluation.pipeline_generator import PipelineGenerator

    return {"diffusers": Diffusers, "folder": Folder, "pipeline": PipelineGenerator}


@hookimpl
def lens_perceivers() -> dict[str, type[Any]]:
    from lens_bench.perceive.clip import ClipColors, ClipSimilarity
    from lens_bench.perceive.dreamsim import DreamSim
    from lens_bench.perceive.mask2former import Mask2Former
    from lens_bench.perceive.rapid_ocr import PaddleOcr, RapidOcr
    from lens_bench.perceive.style import ClipStyle
    from lens_bench.perceive.vlm import Vlm

    return {
        "clip_colors": ClipColors,
        "clip_similarity": ClipSimilarity,
        "clip_style": ClipStyle,
        "dreamsim": DreamSim,
        "mask2former": Mask2Former,
        "paddle_ocr": PaddleOcr,
        "rapidocr": RapidOcr,
        "vlm": Vlm,
    }


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_bench import commands  # light; so `lens --help` can describe it

    names = ("bench csd", "bench latency", "bench ocr", "bench table", "score")
    places = {name: f"{commands.__name__}:{name.rpartition(' ')[2]}" for name in names}
    return {**places, "figure": "lens_bench.figures:app"}
