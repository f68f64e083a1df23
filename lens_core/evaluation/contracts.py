"""What the components of a benchmark run may return, checked: whatever else becomes one line that names the component.

The checks of scores, prompts and headlines, which training uses too, are in `lens_core.attribution`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NoReturn

from attrs import evolve

from lens_core.attribution import calling, name_of, refuse
from lens_core.io.readers import is_line, one_line, shown
from lens_core.io.redaction import replace_surrogates
from lens_core.types import (
    ConfigError,
    GenerationEstimate,
    LensError,
    PictureOutcome,
    PictureRequest,
    PluginError,
    Prompt,
    Score,
    SystemInfo,
)
from lens_core.validators import PIXELS, Rule, integer

IMAGES = integer(at_least=1, at_most=1000)
"""Pictures of one prompt."""


def plain(value: Any) -> Any:
    """`value` as JSON gives it back, half characters (lone surrogates) replaced.

    Raises TypeError or ValueError for what JSON cannot hold, NaN and infinite numbers included.
    """
    return json.loads(replace_surrogates(json.dumps(value, ensure_ascii=False, allow_nan=False)))


def _whole(value: Any) -> Any:
    """`value` as an int where it is a whole number of any type, as NumPy's or 4.0; else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return int(float(value)) if float(value).is_integer() else value


def _amount(value: Any) -> float | None:
    """`value` as a float where it is a finite number of at least 0, NumPy's and Decimal too; else None."""
    if not isinstance(value, Real | Decimal) or isinstance(value, bool):
        return None
    try:
        amount = float(value)
    except (OverflowError, ValueError):  # 10**400, and Decimal's sNaN
        return None
    return amount if 0 <= amount < math.inf else None


# ---- benchmarks -----------------------------------------------------------------------------------------------------


def images_of(benchmark: Any) -> int:
    """How many pictures of each prompt a benchmark asks for, checked; 1 where it does not say."""
    images: int = _whole(getattr(benchmark, "images_per_prompt", 1))
    _check_attribute(benchmark, "images_per_prompt", images, IMAGES, f"a whole number, {IMAGES.words()}")
    return images


def size_of(benchmark: Any) -> tuple[int, int] | None:
    """The (height, width) px that a benchmark asks for, checked; None: the generator's own."""
    size = getattr(benchmark, "size", None)
    if size is None:
        return None
    must = f"(height, width) in px, each {PIXELS.words()}"
    if not isinstance(size, tuple | list) or len(size) != 2:
        refuse(benchmark, "size", size, f"it must be {must}", verb="is")
    height, width = map(_whole, size)
    for side in (height, width):
        _check_attribute(benchmark, "size", side, PIXELS, must)
    return height, width


def _check_attribute(component: Any, name: str, value: Any, rule: Rule, must: str) -> None:
    if not rule.allows(value):
        raise PluginError(f"{name_of(component)}.{name} is {shown(value)}; it must be {must}")


def check_methods(benchmark: Any) -> None:
    """Raise PluginError where a benchmark has perceive or decide, and lacks one of perceive, references and decide."""
    names = ("perceive", "references", "decide")
    lacks = [name for name in names if not callable(getattr(benchmark, name, None))]
    if lacks and not {"perceive", "decide"} <= set(lacks):
        has = " and ".join(name for name in names if name not in lacks)
        raise PluginError(f"{name_of(benchmark)} has {has} and lacks {' and '.join(lacks)}; they belong together")


def check_requirements(benchmark: Any) -> None:
    """Raise ConfigError where a benchmark says that something it needs to score pictures is missing, before any is
    drawn. One that has no `check_requirements` lacks nothing."""
    if not hasattr(benchmark, "check_requirements"):
        return
    try:
        with calling(benchmark, "check_requirements"):
            benchmark.check_requirements()
    except PluginError:
        raise
    except LensError as error:
        raise ConfigError(error.problems if isinstance(error, ConfigError) else str(error)) from error


def free(benchmark: Any) -> None:
    """Have a benchmark free what its `score` keeps in memory between calls."""
    if hasattr(benchmark, "close"):
        with calling(benchmark, "close"):
            benchmark.close()


def workload_of(benchmark: Any, images: int) -> dict[str, int]:
    """How many "prompts" a benchmark says that it has, and how often each of its perceivers is asked, checked."""
    with calling(benchmark, "workload"):
        workload = benchmark.workload(images)
    counts = {name: _whole(count) for name, count in workload.items()} if isinstance(workload, Mapping) else {}
    if "prompts" not in counts or not all(isinstance(k, str) and type(n) is int and n >= 0 for k, n in counts.items()):
        must = 'it must return {"prompts": their number, …: how often each perceiver is asked}'
        raise PluginError(f"{name_of(benchmark)}.workload returned {shown(workload)}; {must}")
    return counts


def references_of(benchmark: Any, prompt: Prompt) -> list[Mapping[str, Any]]:
    """What a benchmark knows of a prompt's pictures without seeing them: the fields of each of their lines."""
    with calling(benchmark, "references"):
        references = benchmark.references(prompt)
    if not _is_list_of_mappings(references):
        refuse(benchmark, "references", references, "it must return a list of mappings, one for each line of a picture")
    return _plain_lines(benchmark, "references", references)


def checked_lines(benchmark: Any, lines: Any, count: int) -> Sequence[Sequence[Mapping[str, Any]]]:
    """What a benchmark's `perceive` returned for `count` pictures."""
    if not isinstance(lines, list) or not all(map(_is_list_of_mappings, lines)) or len(lines) != count:
        refuse(benchmark, "perceive", lines, "it must return a list of lines for each picture")
    return [_plain_lines(benchmark, "perceive", some) for some in lines]


def _plain_lines(benchmark: Any, method: str, lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of a picture as JSON gives them back. A line's `bench` says which reference it belongs to."""
    try:
        result: list[Mapping[str, Any]] = plain([dict(line) for line in lines])
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"{name_of(benchmark)}.{method} returned lines that are no JSON ({error}); it must return texts, finite "
            "numbers, lists and mappings"
        ) from error
    for bench in (line.get("bench") for line in result):
        if isinstance(bench, list | dict):  # references are kept by it
            raise PluginError(
                f"{name_of(benchmark)}.{method} returned, as bench, {shown(bench)}; it must be a text or a number"
            )
    return result


@contextlib.contextmanager
def naming_first(scores: Sequence[tuple[str, Score]], headline: Collection[str]) -> Iterator[None]:
    """Where means cannot be taken inside: say why the first picture of a headline task without any score has none.
    `scores` are of pictures that are there, each with its task."""
    try:
        yield
    except LensError as error:
        known = {task for task, score in scores if score.value is not None}
        first = next((score for task, score in scores if task in headline and task not in known), None)
        if first is None:
            raise
        reason = one_line(first.evidence) or "no reason was given"
        raise LensError(f"{error}; the first picture without a score: {first.status}, {reason}") from error


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


# ---- generators -----------------------------------------------------------------------------------------------------

_LINES = ("dtype", "device", "prompts")
"""Settings of a system that reports print and compare, where it has them."""


def describe(generator: Any) -> SystemInfo:
    """What a generator is, checked."""
    with calling(generator, "describe"):
        info = generator.describe()
    if not isinstance(info, SystemInfo):
        refuse(generator, "describe", info, "it must return a SystemInfo")
    must, settings = "", {}
    if not is_line(info.name) or not info.name.strip() or not is_line(info.revision):
        must = "name must be a line of text that is not empty, and revision a line of text, "
        must += f"not {shown(info.name)} and {shown(info.revision)}"
    elif type(info.seeded) is not bool:
        must = "seeded must be True or False"
    else:
        try:
            if not isinstance(info.settings, Mapping):
                raise TypeError(f"they are {shown(info.settings)}")
            settings = plain(dict(info.settings))
        except (TypeError, ValueError) as error:
            must = f"settings must be a mapping of what JSON has ({error})"
        else:
            settings |= {"steps": _whole(settings["steps"])} if "steps" in settings else {}
            must = _flaw_of_settings(settings)
    if must:
        raise PluginError(f"{name_of(generator)}.describe returned a SystemInfo that cannot be recorded: {must}")
    return evolve(info, settings=settings)


def _flaw_of_settings(settings: Mapping[str, Any]) -> str:
    steps, guidance = settings.get("steps"), settings.get("guidance_scale")
    if steps is not None and type(steps) is not int:
        return f"settings.steps must be a whole number or None, not {shown(steps)}"
    if guidance is not None and type(guidance) not in (int, float):
        return f"settings.guidance_scale must be a number or None, not {shown(guidance)}"
    wrong = [name for name in _LINES if settings.get(name) is not None and not is_line(settings[name])]
    return f"settings.{wrong[0]} must be a line of text or None, not {shown(settings[wrong[0]])}" if wrong else ""


def most_failures_of(generator: Any, default: int) -> float | None:
    """After how many failures in a row a run with this generator stops, checked; None or infinity: it never does."""
    most = _whole(getattr(generator, "most_failures", default))
    if most not in (None, math.inf) and (type(most) is not int or most < 1):
        must = "it must be a whole number of at least 1, or None"
        raise PluginError(f"{name_of(generator)}.most_failures is {shown(most)}; {must}")
    return most  # type: ignore[no-any-return]  # as was checked


def estimate_of(generator: Any, count: int, size: tuple[int, int] | None) -> GenerationEstimate:
    """What a generator says that `count` pictures will cost, checked."""
    with calling(generator, "estimate"):
        estimate = generator.estimate(count, size)
    if not isinstance(estimate, GenerationEstimate):
        refuse(generator, "estimate", estimate, "it must return a GenerationEstimate")
    calls, usd, seconds = _whole(estimate.calls), _amount(estimate.usd), _amount(estimate.seconds)
    unknown = [(usd, estimate.usd), (seconds, estimate.seconds)]
    if type(calls) is not int or calls < 0 or any(a is None and value is not None for a, value in unknown):
        must = "calls must be a whole number of at least 0, and usd and seconds numbers of at least 0, or None"
        raise PluginError(f"{name_of(generator)}.estimate returned a GenerationEstimate that cannot be: {must}")
    return GenerationEstimate(calls, usd, seconds)


def checked_outcome(generator: Any, outcome: Any) -> PictureOutcome:
    """An item of a generator's `generate`, with facts as JSON has them and without half characters."""

    def fail(value: Any, must: str) -> NoReturn:
        refuse(generator, "generate", value, must, verb="yielded")

    if not isinstance(outcome, PictureOutcome):
        fail(outcome, "it must yield PictureOutcomes")
    if not isinstance(outcome.request, PictureRequest):
        fail(outcome.request, "the request of an outcome must be the one that it answers")
    if not isinstance(outcome.image, bytes):
        fail(outcome.image, "the image of an outcome must be bytes: a PNG, JPEG or WebP file")
    seconds, usd = (_outcome_amount(generator, outcome, name) for name in ("seconds", "usd"))
    if not isinstance(outcome.reason, str):
        fail(outcome.reason, "the reason of an outcome must be a text")
    if not isinstance(outcome.sent_prompt, str | None):
        fail(outcome.sent_prompt, "the sent_prompt of an outcome must be a text or None")
    try:
        facts = plain(dict(outcome.facts))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"{name_of(generator)}.generate yielded facts that are no mapping of what JSON has ({error})"
        ) from error
    sent = None if outcome.sent_prompt is None else replace_surrogates(outcome.sent_prompt)
    return evolve(
        outcome, reason=replace_surrogates(outcome.reason), sent_prompt=sent, facts=facts, seconds=seconds, usd=usd
    )


def _outcome_amount(generator: Any, outcome: PictureOutcome, name: str) -> float:
    value = getattr(outcome, name)
    amount = _amount(value)
    if amount is None:
        must = f"the {name} of an outcome must be a number of at least 0"
        raise PluginError(f"{name_of(generator)}.generate yielded, as {name}, {shown(value)}; {must}")
    return amount
