"""The data engine: from raw pictures to a training store, by filters, deduplication and captions.

recipe       a curation recipe: sources, filters with thresholds, duplicates, captions
measures     curators that need no weights: resolution, luminance, entropy, clarity, blockiness, borders, captions
grey         grey copies of a fixed size, made once for all measures
hashes       hashes of pixels and perceptual hashes, of a picture and of its mirror image
duplicates   equal keys and near hashes among many pictures, in linear time
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_curators() -> dict[str, type[Any]]:
    from lens_curate.measures import CURATORS

    return dict(CURATORS)
