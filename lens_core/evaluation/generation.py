"""Stage 1 of a benchmark run: a generator draws a picture for each request, and each is on the disk before the next.

What is held in memory is one batch of requests, however many pictures there are. A run that is killed has its
finished pictures in the manifest and draws only the others when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lens_core.attribution import calling, items, name_of, refuse
from lens_core.evaluation.contracts import checked_outcome, most_failures_of
from lens_core.evaluation.manifest import Key, Manifest
from lens_core.io.images import ImageError, read_raw
from lens_core.io.json_fields import LONGEST_TEXT
from lens_core.io.progress import progress
from lens_core.types import (
    ConfigError,
    PictureOutcome,
    PictureRequest,
    PluginError,
    Prompt,
    StopGeneration,
)

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""The formats that a generator may return, by Pillow's names, and the endings of their files."""
FAILURES_IN_A_ROW = 20
"""So many failures without a picture or a refusal between them stop a run: something is wrong with all of them."""


def prompt_ids(prompts: Sequence[Prompt]) -> list[str]:
    """The names of prompts in a manifest: their ids where those differ, else their positions."""
    ids = [prompt.id for prompt in prompts]
    sound = len(set(ids)) == len(ids) and all(type(i) is int and 0 <= i < 10**40 for i in ids)
    return [f"{i:06d}" for i in (ids if sound else range(len(ids)))]


def generate(
    generator: Any,
    requests: Mapping[Key, PictureRequest],
    missing: Sequence[Key],
    manifest: Manifest,
    *,
    seeded: bool = True,
) -> None:
    """Draw the `missing` pictures, `generator.batch_size` requests at a time, and put each into the manifest.

    Raises StopGeneration where the generator cannot go on, and where `generator.most_failures` requests, by default
    FAILURES_IN_A_ROW, have failed in a row; what was drawn until then is in the manifest.
    """
    size = getattr(generator, "batch_size", 1)
    if type(size) is not int or size < 1:
        refuse(generator, "batch_size", size, "it must be a whole number of at least 1", verb="is")
    most = most_failures_of(generator, FAILURES_IN_A_ROW)
    failures = 0
    for outcome in progress(
        _all_outcomes(generator, requests, missing, size), "picture", len(missing), desc="generate"
    ):
        status = _record(manifest, outcome, seeded)
        failures = failures + 1 if status == "failed" else 0
        if most is not None and failures >= most:
            reason = manifest.entries[outcome.request.prompt_id, outcome.request.index].reason
            raise StopGeneration(
                f"{failures} pictures in a row failed, the last with: {reason}; fix the cause and start again"
            )


def _all_outcomes(
    generator: Any, requests: Mapping[Key, PictureRequest], missing: Sequence[Key], size: int
) -> Iterator[PictureOutcome]:
    """The outcomes of all missing requests, `size` requests a call."""
    for start in range(0, len(missing), size):
        yield from _outcomes(generator, {key: requests[key] for key in missing[start : start + size]})


def _outcomes(generator: Any, chunk: Mapping[Key, PictureRequest]) -> Any:
    """The outcomes of some requests, each checked to be one of these requests', and no other's twice."""
    open_requests = dict(chunk)
    with calling(generator, "generate"):
        outcomes = generator.generate(list(chunk.values()))
    for item in items(generator, "generate", outcomes):
        outcome = checked_outcome(generator, item)
        request = outcome.request
        if open_requests.pop((request.prompt_id, request.index), None) != request:
            raise PluginError(
                f"{name_of(generator)}.generate yielded an outcome that was not asked for, or twice: picture "
                f"{request.index} of {request.prompt_id!r}"
            )
        yield outcome
    if open_requests:
        raise PluginError(
            f"{name_of(generator)}.generate yielded nothing for {len(open_requests)} of {len(chunk)} requests; "
            "it must yield one outcome each, or raise StopGeneration"
        )


def _record(manifest: Manifest, outcome: PictureOutcome, seeded: bool) -> str:
    """Write an outcome -> its status, which is `failed` too where the picture's file cannot be read."""
    request = outcome.request
    key = request.prompt_id, request.index
    about: dict[str, Any] = {
        "seconds": outcome.seconds,
        "seed": request.seed if seeded else None,
        "sent_prompt": outcome.sent_prompt,
        "usd": outcome.usd,
        "facts": dict(outcome.facts),
    }
    if outcome.status != "ok":
        reason = " ".join(outcome.reason.split())[: LONGEST_TEXT // 64] or "no reason was given"
        return manifest.add_outcome(key, request.prompt, outcome.status, reason, **about).status
    try:
        image = read_raw(outcome.image, f"picture {request.index} of {request.prompt_id}")
        suffix = SUFFIXES.get(image.format or "")
        if suffix is None:
            raise ImageError("unsupported image", f"is {image.format}, not PNG, JPEG or WebP")
    except ImageError as error:
        return manifest.add_outcome(key, request.prompt, "failed", f"unreadable picture: {error}", **about).status
    return manifest.add_picture(key, request.prompt, outcome.image, suffix=suffix, **about).status


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError for prompts that no manifest can hold."""
    if not prompts:
        raise ConfigError("the benchmark has no prompts; there is nothing to measure")
    for prompt in prompts:
        if len(prompt.text) > LONGEST_TEXT:
            raise ConfigError(f"a prompt has {len(prompt.text):,} characters; at most {LONGEST_TEXT:,} can be measured")
