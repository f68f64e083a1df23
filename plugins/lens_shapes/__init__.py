"""The proving ground: a world of coloured shapes that can be drawn, described and read back exactly.

scenes     what a picture shows, sampled so that train and held-out scenes share no combination
render     a scene as anti-aliased pixels, at any size and aspect ratio
facts      what a scene shows, and which facts are kept from training
splits     the questions and scenes of train, select and test
captions   a scene in words: brief (what a benchmark would ask) and dense (about 109 words)
reader     pixels back to facts with classical vision, and the strict judge of a prompt
scoring    pictures against the facts of their prompts, in one process or in several
dataset    dataset `shapes`: endless or pooled training batches
languages  the requests in French, German and Spanish
faithful   whether a description says what a request asked for
styles     ways to describe a scene, and the system prompts that ask for them
editor     llm `shapes_editor`: proposes system prompts in a search, from the sentences of `styles`
writer     llm `shapes_writer`: rewrites requests by rules, in the style that a system prompt asks for
chats      dataset `shapes_chat`: requests rewritten as descriptions, in conversations
weights    the embedded checkpoints, `tiny:`
benchmark  benchmark and reward `shapes`: the six tasks of GenEval, and words; reward `shapes`
rubrics    reward `shapes_rubrics`: the facts of a prompt as yes-or-no questions
novel      benchmark `novel`: the shape that no scene of training holds
variety    benchmark `variety`: how far apart the pictures for one prompt are
matching   curator `shapes_caption`: whether a picture shows what its caption says, exactly
dirty_web  pictures and captions of which a known share is spoiled
perceivers  perceivers `shapes_objects` and `shapes_colors`: the reader as GenEval's detector and classifier
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_datasets() -> dict[str, type[Any]]:
    from lens_shapes.chats import ShapesChats
    from lens_shapes.dataset import ShapesDataset

    return {"shapes": ShapesDataset, "shapes_chat": ShapesChats}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    from lens_shapes.benchmark import ShapesBenchmark
    from lens_shapes.novel import Novel
    from lens_shapes.variety import Variety

    return {"novel": Novel, "shapes": ShapesBenchmark, "variety": Variety}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    from lens_shapes.benchmark import ShapesReward
    from lens_shapes.rubrics import ShapesRubrics

    return {"shapes": ShapesReward, "shapes_rubrics": ShapesRubrics}


@hookimpl
def lens_llms() -> dict[str, type[Any]]:
    from lens_shapes.editor import ShapesEditor
    from lens_shapes.writer import ShapesWriter

    return {"shapes_editor": ShapesEditor, "shapes_writer": ShapesWriter}


@hookimpl
def lens_perceivers() -> dict[str, type[Any]]:
    from lens_shapes.perceivers import ShapesColors, ShapesObjects

    return {"shapes_colors": ShapesColors, "shapes_objects": ShapesObjects}


@hookimpl
def lens_curators() -> dict[str, type[Any]]:
    from lens_shapes.matching import ShapesCaption

    return {"shapes_caption": ShapesCaption}


@hookimpl
def lens_fetch(uri: str) -> Path | None:
    """`tiny:` and its siblings `tiny:NAME` are checkpoints inside this package."""
    scheme, colon, name = uri.partition(":")
    if scheme != "tiny" or not colon:
        return None
    weights = Path(__file__).parent / "weights"
    folder = weights / (name or "base")
    if not (folder / "lens.json").is_file():
        from lens_core.types import CheckpointError, did_you_mean

        known = [f"tiny:{p.parent.name}" for p in weights.glob("*/lens.json")]
        raise CheckpointError(f"no embedded checkpoint is called {uri!r}.{did_you_mean(uri, known)}")
    return folder
