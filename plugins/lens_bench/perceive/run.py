"""Ask perceivers about pictures: in batches, through the cache, after a canary.

One model is in memory at a time, unless `PerceptionRun` gets a place to keep them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_bench.perceive import pictures as files
from lens_bench.perceive.cache import Key, PerceptionCache, key_of, other_versions
from lens_bench.perceive.kept import KeptPerceivers, LoadedPerceiver
from lens_core.attribution import building, calling, name_of
from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError, LensError, Picture, PluginError, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 8  # questions at once, of a perceiver that does not say how many
MOST_FAILURES = 8  # one after the other, at the end of a batch: then the budget is spent or the server is gone


@frozen
class PerceivedPicture:
    """One picture with what has been perceived of it."""

    source: Picture
    _run: PerceptionRun

    @property
    def prompt(self) -> Prompt:
        return self.source.prompt

    def answers(self, role: str) -> list[Any]:
        """The answers to the questions of a role, in order."""
        stored = self._run.roles[role]
        return [stored.cache.answer(key_of(self.source.sha256, question)) for question in stored.questions(self)]


Questions = Callable[[PerceivedPicture], Sequence[Any]]


@frozen
class _Role:
    cache: PerceptionCache
    questions: Questions
    described: Mapping[str, Any]


class PerceptionRun:
    """Pictures, and what each role's perceiver says of them. `folder` holds the caches.

    `jpeg`: pictures go through JPEG before a model sees them. `catalog`: None for the installed one. `kept`: where
    perceivers stay for the next run; None: each is freed before the next one is asked.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        folder: Path,
        *,
        jpeg: bool = False,
        catalog: Catalog | None = None,
        kept: KeptPerceivers | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.pictures = [PerceivedPicture(picture, self) for picture in pictures]
        self.roles: dict[str, _Role] = {}
        self._folder, self._jpeg, self._kept, self._log = folder, jpeg, kept, log
        self._catalog = catalog or Catalog.installed()

    def ask(self, role: str, spec: ComponentSpec, kinds: Mapping[str, Questions]) -> None:
        """Have every question of a role answered and stored. `kinds`: what the perceiver may perceive, each with the
        questions to ask it.

        Raises ConfigError where `spec` names no such perceiver, LensError where it fails its canary, or where answers
        could not be had: those that could are stored, and the next run asks for the others alone.
        """
        kept = self._kept or KeptPerceivers()
        perceiver = build_perceiver(self._catalog, role, spec, kinds)
        # A copy, because the options are a mapping that its owner may change.
        options = type(perceiver), copy.deepcopy(spec)
        try:
            loaded = kept.get(role, options, lambda: _described(perceiver))
            self._ask(role, loaded, kinds)
        except BaseException:
            kept.drop(role)  # whatever is wrong with it, its memory is free and its next use begins with its canary
            raise
        finally:
            if self._kept is None:
                kept.close()

    def _ask(self, role: str, loaded: LoadedPerceiver, kinds: Mapping[str, Questions]) -> None:
        perceives = loaded.perceiver.perceives
        described = {**loaded.described, **({"pictures": files.JPEG_VERSION} if self._jpeg else {})}
        cache = PerceptionCache(self._folder, perceives, described)
        if others := other_versions(self._folder, cache):
            self._log(f"{role}: answers of another model, revision or version are not used: {', '.join(others)}")
        self.roles[role] = _Role(cache, kinds[perceives], described)
        self._answer(role, loaded)

    def described(self, *roles: str) -> dict[str, Any]:
        """What perceived, by role: the field `perceiver` of a line."""
        return {role: dict(self.roles[role].described) for role in roles}

    def _answer(self, role: str, loaded: LoadedPerceiver) -> None:
        perceiver, pending = loaded.perceiver, self._pending(role)
        size = getattr(perceiver, "batch_size", BATCH)
        batch = list(islice(pending, size))
        if not batch:
            return
        if not loaded.proven:
            prove(perceiver)
            loaded.proven = True
        cache, failures, done, in_a_row = self.roles[role].cache, [], 0, 0
        while batch:
            answers: list[tuple[Key, Any]] = []
            for (picture, question), answer in zip(batch, self._perceive(perceiver, batch), strict=True):
                if isinstance(answer, LensError):
                    failures.append(answer)
                    in_a_row += 1
                else:
                    answers.append((key_of(picture.source.sha256, question), answer))
                    in_a_row = 0
            cache.add(answers)
            done += len(batch)
            self._log(f"{role}: {done} questions about {len(self.pictures)} pictures answered")
            if in_a_row >= MOST_FAILURES:
                break
            batch = list(islice(pending, size))
        if failures:
            raise LensError(
                f"{name_of(perceiver)}: {len(failures)} questions about pictures have no answer (the first: "
                f"{failures[0]}). What was answered is kept; start again to ask for the rest"
            )

    def _pending(self, role: str) -> Iterator[tuple[PerceivedPicture, Any]]:
        """The questions that are not answered yet, each about a picture once."""
        current, begun = self.roles[role], set()
        for picture in self.pictures:
            for question in current.questions(picture):
                key = key_of(picture.source.sha256, question)
                if key not in current.cache and key not in begun:
                    begun.add(key)
                    yield picture, question

    def _perceive(self, perceiver: Any, batch: Sequence[tuple[PerceivedPicture, Any]]) -> list[Any]:
        """One answer a question; a LensError in its place says why there is none."""
        read: dict[str, Image] = {}
        for picture, _ in batch:
            if picture.source.sha256 not in read:
                read[picture.source.sha256] = files.read(picture.source.path, picture.source.sha256, self._jpeg)
        with calling(perceiver, "perceive"):
            images = [read[picture.source.sha256] for picture, _ in batch]
            answers = list(perceiver.perceive(images, [question for _, question in batch]))
        if len(answers) != len(batch):
            problem = f"returned {len(answers)} answers to {len(batch)} questions; it must return one each"
            raise PluginError(f"{name_of(perceiver)}.perceive {problem}")
        return answers


def build_perceiver(catalog: Catalog, role: str, spec: ComponentSpec, kinds: Collection[str]) -> Any:
    """The perceiver that `spec` names, which loads nothing yet. Raises ConfigError where there is no such perceiver, or
    where it perceives none of `kinds`."""
    name, cls, config = build(catalog, "perceiver", spec, f"$.{role}")
    with building(name):
        perceiver = cls(config)
    if perceiver.perceives not in kinds:
        needed = " or ".join(kinds)
        raise ConfigError(f"$.{role}: {spec.use!r} perceives {perceiver.perceives}; this needs one of {needed}")
    return perceiver


def _described(perceiver: Any) -> LoadedPerceiver:
    with calling(perceiver, "describe"):
        described = dict(perceiver.describe())
        json.dumps(described)
    return LoadedPerceiver(perceiver, described)


def missing_for(roles: Iterable[tuple[str, ComponentSpec, Collection[str]]], catalog: Catalog) -> list[str]:
    """What perceivers need and is missing, a line each. `roles`: (role, use, what it may perceive). Loads nothing."""
    problems: list[str] = []
    for role, spec, kinds in roles:
        try:
            perceiver = build_perceiver(catalog, role, spec, kinds)
            if hasattr(perceiver, "check_requirements"):
                with calling(perceiver, "check_requirements"):
                    perceiver.check_requirements()
        except LensError as error:
            lines = error.problems if isinstance(error, ConfigError) else (str(error),)
            problems += [line if line.startswith("$.") else f"$.{role} ({spec.use}): {line}" for line in lines]
    return problems


def prove(perceiver: Any) -> None:
    """Show a perceiver a picture of known content. Raises LensError where it does not see what is there."""
    with calling(perceiver, "canary"):
        problem = perceiver.canary()
    if problem is not None:
        raise LensError(
            f"{name_of(perceiver)} does not see what is there: {problem}. Nothing is scored with it; check its "
            "weights, its settings and the driver"
        )
