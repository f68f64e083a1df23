"""The data engine: from raw pictures to a training store, by filters, deduplication and captions.

recipe       a curation recipe: sources, filters with thresholds, duplicates, captions
measures     curators that need no weights: resolution, luminance, entropy, clarity, blockiness, borders, captions
models       curators with weights: classifiers, aesthetics, text in pictures, captions that mismatch
weights      models of the transformers library, at pinned revisions
grey         grey copies of a fixed size, made once for all measures
hashes       hashes of pixels and perceptual hashes, of a picture and of its mirror image
duplicates   equal keys and near hashes among many pictures, in linear time
parts        the units in which sources are listed and read
sources      folders, tars, parquet files and stores
urls         pictures from a list of addresses
text_pictures  pictures with text in them, drawn here
tables       what a curation knows, in tables beside the pictures of the store
worker       reads, decodes, hashes and scores; runs in every process
engine       runs the tasks of workers as a Daft dataflow, on this machine or on a Ray cluster
decide       which pictures are kept: a pure function of hashes, scores and thresholds
captioner    captions by a vision language model, and their checks
filling      captions, the training store and the table of verdicts
curation     one run, from sources to the report
report       what a run did; `page` is its HTML
verdicts     the verdicts of a store, and every stage's on one picture
progress     counts, rate and time left
commands     `lens data curate` and `lens data why`
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_curators() -> dict[str, type[Any]]:
    from lens_curate.measures import CURATORS
    from lens_curate.models import CURATORS as WITH_WEIGHTS

    return {**CURATORS, **WITH_WEIGHTS}


@hookimpl
def lens_commands() -> dict[str, str]:
    return {"data curate": "lens_curate.commands:curate", "data why": "lens_curate.commands:why"}
