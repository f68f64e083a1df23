"""What benchmark runs would cost, before anything is drawn or sent: pictures, calls, hours, dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from lens_core.attribution import building, prompts_of
from lens_core.catalog import Catalog
from lens_core.evaluation import contracts
from lens_core.evaluation.bench import BenchmarkRequest, build_benchmark, check_requirements, make_generator
from lens_core.io import markdown
from lens_core.types import ConfigError, GenerationEstimate


@frozen
class Cost:
    """One run. `perceptions`: what is asked of each perceiver -> how often."""

    benchmark: str
    generator: str
    prompts: int
    pictures: int
    generation: GenerationEstimate
    perceptions: Mapping[str, int]
    missing: tuple[str, ...] = ()  # why the run would stop before its first picture


def estimate(request: BenchmarkRequest, catalog: Catalog) -> Cost:
    """The cost of a run. A benchmark that has `workload(images)` says how many prompts and questions it has, so that
    no prompt file is needed."""
    name, cls, config = build_benchmark(request, catalog)
    with building(name):
        benchmark = cls(config)
    images = request.images or contracts.images_of(benchmark)
    if hasattr(benchmark, "workload"):
        workload = contracts.workload_of(benchmark, images)
        prompts = workload.pop("prompts")
    else:
        prompts, workload = len(prompts_of(benchmark)), {}
    generator = make_generator(request.generator, catalog)
    size = request.size or contracts.size_of(benchmark)
    generation = GenerationEstimate(prompts * images)
    if hasattr(generator, "estimate"):
        generation = contracts.estimate_of(generator, prompts * images, size)
    options = request.generator.options
    label = str(options.get("model", options.get("folder", "")))
    system = f"{request.generator.use} {label}".strip()
    return Cost(
        request.spec().use, system, prompts, prompts * images, generation, workload, _missing(request, benchmark)
    )


def _missing(request: BenchmarkRequest, benchmark: Any) -> tuple[str, ...]:
    try:
        check_requirements(request, benchmark)
    except ConfigError as error:
        return error.problems
    return ()


def table(requests: Sequence[BenchmarkRequest], catalog: Catalog | None = None) -> str:
    """A Markdown table, a line a run, and a line with the sums."""
    catalog = catalog or Catalog.installed()
    costs, problems = [], []
    for request in requests:
        try:
            costs.append(estimate(request, catalog))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    rows = markdown.header(("benchmark", "generator", "prompts", "pictures", "calls", "hours", "USD", "perceptions"))
    rows += [_row(cost) for cost in costs]
    if len(costs) > 1:
        rows.append(_sums(costs))
    note = "Hours and USD are of stage 1; – is not known: give seconds_per_picture or dollars_per_picture as an option."
    missing = {f"{cost.benchmark} would draw nothing: {problem}" for cost in costs for problem in cost.missing}
    return "\n".join([*rows, "", note, *sorted(missing)])


def _row(cost: Cost) -> str:
    e = cost.generation
    perceptions = ", ".join(f"{count:,} {what}" for what, count in cost.perceptions.items()) or "–"
    cells = [cost.benchmark, cost.generator, f"{cost.prompts:,}", f"{cost.pictures:,}", f"{e.calls:,}"]
    return markdown.row([*cells, _hours(e.seconds), _usd(e.usd), perceptions])


def _sums(costs: Sequence[Cost]) -> str:
    """A sum that lacks a part is a lower bound and says so."""

    def total(values: Sequence[float | None], show: Any) -> str:
        known = [v for v in values if v is not None]
        bound = "≥ " if len(known) < len(values) and known else ""
        return f"{bound}{show(sum(known) if known else None)}"

    prompts, pictures = (f"{sum(getattr(c, n) for c in costs):,}" for n in ("prompts", "pictures"))
    calls = f"{sum(c.generation.calls for c in costs):,}"
    perceptions = f"{sum(sum(c.perceptions.values()) for c in costs):,}"
    hours = total([c.generation.seconds for c in costs], _hours)
    usd = total([c.generation.usd for c in costs], _usd)
    return f"| **all** | | {prompts} | {pictures} | {calls} | {hours} | {usd} | {perceptions} |"


def _hours(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / 3600:.1f}"


def _usd(usd: float | None) -> str:
    return "–" if usd is None else f"{usd:,.2f}"
