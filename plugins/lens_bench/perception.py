"""Stage 2 of each public benchmark: pictures in, lines of perceptions out, by the perceivers that its Config names.

Each function takes the Config, pictures, and the folder of the caches, and returns for each picture the lines that
stage 3 decides: JSON fields beside those of the benchmark's reference. All pictures of a prompt come in one call. A
picture of which something could not be perceived is never a zero: LensError, and the rest is kept for the next call.
Further arguments, `catalog`, `kept` and `log`, are those of PerceptionRun. `…_roles` names who is asked what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_bench import geneval as rules
from lens_bench.perceive import pictures as files
from lens_bench.perceive.run import PerceivedPicture, PerceptionRun, Questions
from lens_bench.perceive.vlm import ASK, READ
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, Picture, Prompt

Lines = list[list[dict[str, Any]]]
Roles = list[tuple[str, ComponentSpec, Mapping[str, Questions]]]
"""(role, the perceiver that is named for it, what that may perceive with the questions about a picture), in order."""


def _once(picture: PerceivedPicture) -> list[Any]:
    return [None]


def _ask(run: PerceptionRun, roles: Roles) -> None:
    for role, spec, kinds in roles:
        run.ask(role, spec, kinds)


# ---- GenEval ------------------------------------------------------------------------------------------------------


def geneval_roles(config: Any) -> Roles:
    colors = {"colors": _color_questions}
    return [("detector", config.detector, {"objects": _once}), ("classifier", config.classifier, colors)]


def geneval(config: Any, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
    """Objects by `config.detector`, then the colours of those that a prompt asks for by `config.classifier`."""
    run = PerceptionRun(pictures, folder, **options)
    _ask(run, geneval_roles(config))
    perceiver = run.described("detector", "classifier")
    return [
        [{"bench": "geneval", "perceiver": perceiver, "detections": _detections(picture), "colors": _colors(picture)}]
        for picture in run.pictures
    ]


def _detections(picture: PerceivedPicture) -> dict[str, list[list[float]]]:
    (objects,) = picture.answers("detector")
    return {name: [[*thing["box"], thing["score"]] for thing in things] for name, things in objects.items()}


def _colored(picture: PerceivedPicture) -> list[tuple[str, list[int], list[dict[str, Any]]]]:
    """(class, rows, objects) of each class whose colour the prompt names: the rows that the decision may ask about."""
    (objects,) = picture.answers("detector")
    include = picture.prompt.data["metadata"].get("include", ())
    options, colored = rules.Options(), []
    for name in dict.fromkeys(clause["class"] for clause in include if "color" in clause):
        things = objects.get(name, [])
        rows = rules.kept_rows([[*t["box"], t["score"]] for t in things], options.threshold, options.max_objects)
        if rows:
            colored.append((name, rows, [things[row] for row in rows]))
    return colored


def _color_questions(picture: PerceivedPicture) -> list[Any]:
    return [
        {"class": name, "objects": [{"box": thing["box"], "mask": thing.get("mask")} for thing in things]}
        for name, _, things in _colored(picture)
    ]


def _colors(picture: PerceivedPicture) -> dict[str, list[str | None]]:
    colors: dict[str, list[str | None]] = {}
    for (name, rows, _), answer in zip(_colored(picture), picture.answers("classifier"), strict=True):
        by_row = dict(zip(rows, answer, strict=True))
        colors[name] = [by_row.get(row) for row in range(max(rows) + 1)]
    return colors


# ---- text ---------------------------------------------------------------------------------------------------------


def _reader(question: Questions) -> dict[str, Questions]:
    """What may read text: an OCR engine, or a model that is asked."""
    return {"lines": _once, "answer": question}


def _read_question(picture: PerceivedPicture) -> list[Any]:
    return [READ]


def _text(picture: PerceivedPicture, role: str) -> str:
    (answer,) = picture.answers(role)
    return answer if isinstance(answer, str) else "\n".join(answer)


def cvtg_roles(config: Any) -> Roles:
    similarity = {"similarity": _prompt_question}
    more: Roles = [] if config.similarity is None else [("similarity", config.similarity, similarity)]
    return [("ocr", config.ocr, _reader(_read_question)), *more]


def _prompt_question(picture: PerceivedPicture) -> list[Any]:
    return [picture.prompt.text]


def cvtg(config: Any, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
    """Lines by `config.ocr`; the cosine of CLIPScore by `config.similarity`, where it is not None."""
    run = PerceptionRun(pictures, folder, **options)
    _ask(run, cvtg_roles(config))
    roles = list(run.roles)
    perceiver = run.described(*roles)

    def line(picture: PerceivedPicture) -> dict[str, Any]:
        (lines,) = picture.answers("ocr")
        fields = {"bench": "cvtg2k", "perceiver": perceiver, "ocr_lines": [lines] if isinstance(lines, str) else lines}
        return fields | ({"clip_cosine": picture.answers("similarity")[0]} if "similarity" in roles else {})

    return [[line(picture)] for picture in run.pictures]


def longtext_roles(config: Any) -> Roles:
    """Raises ConfigError where there is no reader."""
    if config.reader is None:
        example = "'{use: longtext, reader: rapidocr}', or for the published numbers {use: vlm, llm: …}"
        raise ConfigError(f"$.reader: LongText-Bench needs something that reads; name a reader, as in {example}")
    return [("reader", config.reader, _reader(_read_question))]


def longtext(config: Any, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
    """Text by `config.reader`."""
    roles = longtext_roles(config)
    run = PerceptionRun(pictures, folder, **options)
    _ask(run, roles)
    perceiver, bench = run.described("reader"), f"longtext_{config.language}"
    return [[{"bench": bench, "perceiver": perceiver, "ocr_raw": _text(picture, "reader")}] for picture in run.pictures]


# ---- OneIG --------------------------------------------------------------------------------------------------------

NEEDS = {"text": "text_content", "alignment": "questions", "style": "style", "reasoning": "answer"}
"""Dimension -> the key of `Prompt.data` that its prompts have. Every prompt counts for diversity."""


def named_dimensions(config: Any) -> list[str]:
    """The dimensions whose perceivers the config names."""
    named = {
        "text": config.reader is not None,
        "alignment": config.vlm is not None,
        "style": config.style_csd is not None and config.style_encoder is not None,
        "reasoning": config.reasoning is not None,
    }
    return [name for name in NEEDS if named[name]] + (["diversity"] if config.diversity is not None else [])


def oneig_dimensions(config: Any, prompt: Prompt) -> list[str]:
    """The dimensions that a prompt counts for and whose perceivers the config names."""
    return [name for name in named_dimensions(config) if name not in NEEDS or prompt.data.get(NEEDS[name])]


def oneig_benches(config: Any, prompt: Prompt) -> list[str]:
    """The values of `bench` in the lines of a prompt's pictures."""
    return [f"oneig_{name}_{config.language}" for name in oneig_dimensions(config, prompt)]


def oneig(config: Any, pictures: Sequence[Picture], folder: Path, **options: Any) -> Lines:
    """A line for each dimension that a picture counts for. A purely black picture stands for a refusal."""
    black = [files.is_black(picture.path, picture.sha256) for picture in pictures]
    shown = [picture for picture, is_black in zip(pictures, black, strict=True) if not is_black]
    run = PerceptionRun(shown, folder, jpeg=True, **options)
    _ask(run, oneig_roles(config))
    perceived = iter(run.pictures)
    earlier: dict[Any, list[PerceivedPicture]] = {}
    lines: Lines = []
    for source, is_black in zip(pictures, black, strict=True):
        dimensions = oneig_dimensions(config, source.prompt)
        benches = dict(zip(dimensions, oneig_benches(config, source.prompt), strict=True))
        if is_black:
            reason = "black: every pixel is black, as where a system refuses"
            lines.append([{"bench": bench, "status": "refused", "reason": reason} for bench in benches.values()])
            continue
        before = earlier.setdefault((source.prompt.id, source.prompt.text), [])
        picture = next(perceived)
        lines.append([_oneig_line(run, name, bench, picture, before) for name, bench in benches.items()])
        before.append(picture)
    return lines


def oneig_roles(config: Any) -> Roles:
    def of(dimension: str, questions: Questions) -> Questions:
        return lambda picture: questions(picture) if dimension in oneig_dimensions(config, picture.prompt) else []

    def data(picture: PerceivedPicture) -> Mapping[str, Any]:
        return picture.prompt.data

    text = {"lines": of("text", _once), "answer": of("text", _read_question_by_length)}
    alignment = of("alignment", lambda picture: [ASK.format(question=q) for q in data(picture)["questions"].values()])
    style = of("style", lambda picture: [data(picture)["style"]])
    both = config.style_csd is not None and config.style_encoder is not None
    roles: list[tuple[str, ComponentSpec | None, dict[str, Questions]]] = [
        ("reader", config.reader, text),
        ("vlm", config.vlm, {"answer": alignment}),
        ("diversity", config.diversity, {"embedding": _once}),
        ("style_csd", config.style_csd if both else None, {"style similarity": style}),
        ("style_encoder", config.style_encoder if both else None, {"style similarity": style}),
        (
            "reasoning",
            config.reasoning,
            {"answer similarity": of("reasoning", lambda picture: [data(picture)["answer"]])},
        ),
    ]
    return [(role, spec, kinds) for role, spec, kinds in roles if spec is not None]


def _read_question_by_length(picture: PerceivedPicture) -> list[Any]:
    """The model may write 256 tokens where the reference has more than 60 words, else 128."""
    words = len(picture.prompt.data["text_content"].split())
    return [{"text": READ, "max_tokens": 256 if words > 60 else 128}]


def _oneig_line(
    run: PerceptionRun, name: str, bench: str, picture: PerceivedPicture, before: Sequence[PerceivedPicture]
) -> dict[str, Any]:
    roles = {"text": ("reader",), "alignment": ("vlm",), "style": ("style_csd", "style_encoder")}.get(name, (name,))
    line: dict[str, Any] = {"bench": bench, "perceiver": run.described(*roles)}
    if name == "text":
        return line | {"ocr_raw": _text(picture, "reader")}
    if name == "alignment":
        questions = picture.prompt.data["questions"]
        return line | {"answers": dict(zip(questions, picture.answers("vlm"), strict=True))}
    if name == "style":
        return line | {f"{role}_similarity": picture.answers(role)[0] for role in roles}
    if name == "reasoning":
        return line | {"answer_cosine": picture.answers("reasoning")[0]}
    mine = picture.answers("diversity")[0]
    others = [other.answers("diversity")[0] for other in before]
    return line | {"distances": [1 - sum(a * b for a, b in zip(mine, other, strict=True)) for other in others]}
