"""A benchmark run with a folder: `lens bench` as a function. Three stages, each of which goes on where it was stopped.

Writes run.json, manifest.jsonl and images/ (generate); perceptions.jsonl and cache/ (perceive); verdicts.jsonl,
table.md, result.json and sheet.png (decide).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.attribution import building, calling, headline_tasks_of, prompts_of, refuse
from lens_core.catalog import Catalog
from lens_core.config import decisive
from lens_core.evaluation import contracts, decision, generation, perception, run_report, stages
from lens_core.evaluation.decision import Decision
from lens_core.evaluation.manifest import Manifest
from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.evaluation.processes import Processes
from lens_core.evaluation.run import PICTURES_PER_SEED, ceiling_of
from lens_core.evaluation.stages import Plan
from lens_core.evaluation.statistics import cluster_of
from lens_core.inference import png_metadata
from lens_core.io import atomic_files, readers
from lens_core.io.locks import locked
from lens_core.recipe import ComponentSpec, build, parse_use
from lens_core.types import (
    ConfigError,
    LensError,
    NumericalError,
    PluginError,
    StopGeneration,
    SystemInfo,
    did_you_mean,
)
from lens_core.validators import PIXELS, SEED, each, integer, one_of, optional

MAX_PROMPTS = 1_000_000
CEILING = "ceiling.json"


@frozen
class BenchmarkRequest:
    """A benchmark, the generator to measure, and the stages to run."""

    benchmark: str  # a name, or as a recipe names it: '{use: shapes, split: train}'
    generator: ComponentSpec = field(factory=lambda: ComponentSpec("pipeline"))
    size: tuple[int, int] | None = field(default=None, validator=optional(each(PIXELS)))  # (height, width) px
    limit: int | None = field(default=None, validator=optional(integer(at_least=1, at_most=MAX_PROMPTS)))  # prompts
    images: int | None = field(default=None, validator=optional(contracts.IMAGES))  # of each prompt
    seed: int = field(default=0, validator=SEED)
    stages: tuple[str, ...] = field(default=stages.STAGES, validator=each(one_of(*stages.STAGES), at_least=1))
    options: Mapping[str, Any] = field(factory=dict)  # of the benchmark, beside those in its name

    def spec(self) -> ComponentSpec:
        """The benchmark with its options."""
        named = parse_use(self.benchmark)
        limit = {} if self.limit is None else {"prompts": self.limit}
        return ComponentSpec(named.use, {**named.options, **self.options, **limit})


@frozen
class BenchmarkReport:
    """A finished run: its folder, what was decided, and the settings under which it was measured."""

    folder: Path
    decision: Decision
    settings: Mapping[str, Any]
    text: str  # the table


def run_benchmark(
    request: BenchmarkRequest,
    folder: Path | None = None,
    *,
    catalog: Catalog | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> BenchmarkReport | None:
    """Measure a generator with a benchmark and write the results to `folder`; returns None where the stage decide is
    not asked for, and in all processes but the first. Without a folder it is runs/bench-NAME, or where that holds
    another run runs/bench-NAME-2 and so on.

    Raises LensError where a stage fails; what was finished until then stays, and is not done again. ConfigError where
    the folder holds another run.
    """
    catalog = catalog or Catalog.installed()
    name, cls, config = build_benchmark(request, catalog)
    generator = make_generator(request.generator, catalog) if "generate" in request.stages else None
    with building(name):
        benchmark = cls(config)
    base = Path("runs") / f"bench-{request.spec().use.replace(':', '-')}"
    if not ((folder or base) / stages.RUN).exists():  # else it may have all its pictures, and need nothing
        check_requirements(request, benchmark)
    plan = make_plan(request, name, benchmark, decisive(config))
    if isinstance(generator, PipelineGenerator):
        generator.planned_size = plan.size
    processes = Processes.from_environment()
    info = None if generator is None else contracts.describe(generator)
    folder = folder or (base if info is None else stages.default_folder(base, plan.facts(info)))
    processes.wait()  # until all have chosen the same folder
    with locked(folder, "benchmark run") if processes.rank == 0 else contextlib.nullcontext():
        if generator is not None and info is not None:
            _generate(folder, plan, benchmark, generator, info, processes, request)
        run = stages.read_run(folder)
        _check_same(folder, plan, run)
        manifest = Manifest(folder, run["system"], run["revision"], processes.rank)
        if "perceive" in request.stages:
            perception.perceive(folder, plan, benchmark, manifest, processes, log)
        if "decide" not in request.stages or processes.rank != 0:
            return None
        return _decide(folder, plan, benchmark, manifest, {**run, "label": request.benchmark})


def build_benchmark(request: BenchmarkRequest, catalog: Catalog) -> tuple[str, type[Any], Any]:
    """(qualified name, class, config) of the benchmark. Raises ConfigError, also for a file of prompts or a number of
    them where the benchmark takes none."""
    try:
        return build(catalog, "benchmark", request.spec(), "$")
    except ConfigError as error:
        flags = {"file": "file" in request.options and "--prompts-file", "prompts": request.limit and "--limit"}
        for name, flag in flags.items():
            if flag and any(line.startswith(f"$.{name}: unknown") for line in error.problems):
                raise ConfigError(f"the benchmark {request.spec().use} takes no {flag}; leave it out") from error
        raise


def check_requirements(request: BenchmarkRequest, benchmark: Any) -> None:
    """Raise ConfigError where pictures are to be drawn and then read, and what reads them is missing."""
    if not {"generate", "perceive"} <= set(request.stages):
        return
    try:
        contracts.check_requirements(benchmark)
    except ConfigError as error:
        *others, last = error.problems
        raise ConfigError([*others, f"{last}. To draw alone, give --stages generate"]) from error


def make_generator(spec: ComponentSpec, catalog: Catalog) -> Any:
    """The generator that a spec names. `pipeline` is the core's own unless a plugin offers one of that name."""
    if spec.use == "pipeline" and not any(entry.short == "pipeline" for entry in catalog.entries("generator")):
        from lens_core.config import structure

        return PipelineGenerator(structure(PipelineGenerator.Config, spec.options, "$.generator"), catalog)
    name, cls, config = build(catalog, "generator", spec, "$.generator")
    with building(name):
        return cls(config, catalog) if cls is PipelineGenerator else cls(config)


def make_plan(request: BenchmarkRequest, name: str, benchmark: Any, options: Mapping[str, Any]) -> Plan:
    """Every picture that a request asks for. Raises ConfigError for none, or too many."""
    contracts.check_methods(benchmark)
    prompts = prompts_of(benchmark)
    generation.check_prompts(prompts)
    images = request.images or contracts.images_of(benchmark)
    if len(prompts) * images > PICTURES_PER_SEED:
        raise ConfigError(
            f"a run may have {PICTURES_PER_SEED:,} pictures at most, not {len(prompts) * images:,}; ask for fewer"
        )
    plan = Plan(name, options, prompts, images, request.size or contracts.size_of(benchmark), request.seed)
    try:
        plan.prompts_sha256  # noqa: B018  # by which the run is recognised; needed at every start
    except (TypeError, ValueError):
        must = "in a benchmark run it must be what JSON has: texts, numbers, lists, mappings"
        refuse(benchmark, "prompts", prompts[0].data, must, verb="gave, as data,")
    return plan


# ---- stages -------------------------------------------------------------------------------------------------------


def _generate(
    folder: Path, plan: Plan, benchmark: Any, generator: Any, info: SystemInfo, processes: Processes,
    request: BenchmarkRequest,
) -> None:  # fmt: skip
    if processes.rank == 0:
        more = {"options": dict(plan.options), "versions": png_metadata.versions()}
        stages.begin(folder, plan.facts(info), more)
    processes.wait()
    manifest = Manifest(folder, info.name, info.revision, processes.rank)
    requests = plan.requests()
    missing = manifest.missing(_texts_to_draw(plan, benchmark), plan.images)
    if missing:
        check_requirements(request, benchmark)
    processes.wait()  # before anything is written that another process would read as done
    try:
        if hasattr(generator, "open"):
            with calling(generator, "open"):
                generator.open(folder)
        share = processes.share(missing)
        generation.generate(generator, requests, share, manifest, seeded=info.seeded)
    except LensError as error:
        kind = next(k for k in (StopGeneration, PluginError, NumericalError, LensError) if isinstance(error, k))
        raise kind(f"{error}; what was drawn is kept in {folder}, start again to go on") from error
    finally:
        if hasattr(generator, "close"):
            with calling(generator, "close"):
                generator.close()
    if processes.rank == 0 and isinstance(generator, PipelineGenerator):
        _write_ceiling(folder, plan, benchmark, generator)
    processes.wait()


def _texts_to_draw(plan: Plan, benchmark: Any) -> Mapping[str, str]:
    """Prompt id -> text, of the prompts whose pictures count for something that is scored; of all where none does, as
    in a run that only draws. The others keep their ids and seeds, so that a later run can draw them too."""
    if not hasattr(benchmark, "perceive"):
        return plan.texts
    scored = {name: prompt.text for name, prompt in plan.by_id.items() if perception.counts(benchmark, prompt)}
    return scored or plan.texts


def _write_ceiling(folder: Path, plan: Plan, benchmark: Any, generator: PipelineGenerator) -> None:
    """What flawless pictures score after the checkpoint's VAE, where the benchmark can make them."""
    if not hasattr(benchmark, "ceiling") or (folder / CEILING).exists():
        return
    height, width = generator.pipeline.size(*(plan.size or (None, None)))
    scores = ceiling_of(generator.pipeline, benchmark, plan.prompts, (height, width))
    atomic_files.write_json(folder / CEILING, scores)


def _check_same(folder: Path, plan: Plan, run: Mapping[str, Any]) -> None:
    """A later stage alone: the run must be of this benchmark and these prompts."""
    now = plan.facts(SystemInfo(""))
    for name in ("benchmark", "prompts_sha256", "images_per_prompt", "seed"):
        if run.get(name) != now[name]:
            raise ConfigError(
                f"{folder}: is a run with {name} {readers.shown(run.get(name))}, not {readers.shown(now[name])}; give "
                "the options with which it was started"
            )


@contextlib.contextmanager
def _naming_first_failure(plan: Plan, manifest: Manifest) -> Iterator[None]:
    """Where there is no score because there is no picture: why there is not, of the first one."""
    try:
        yield
    except ConfigError:
        raise
    except LensError as error:
        entries = [manifest.entries[key] for key in plan.requests() if key in manifest.entries]
        if not entries or any(entry.status == "ok" for entry in entries):
            raise
        first = f"{entries[0].prompt_id}_{entries[0].index} ({entries[0].status}): {entries[0].reason}"
        raise LensError(f"{error}: there are no pictures; the first, {first}") from error


def _decide(folder: Path, plan: Plan, benchmark: Any, manifest: Manifest, run: dict[str, Any]) -> BenchmarkReport:
    lines = perception.read_lines(folder, plan, benchmark, manifest)
    perceivers: Any = {}
    with _naming_first_failure(plan, manifest):
        if hasattr(benchmark, "decide"):
            for line in lines:  # are they of these pictures?
                perceivers = perceivers or line.get("perceiver", {})
            decided = decision.decided_by(benchmark, folder / stages.PERCEPTIONS, plan.by_id)
        else:
            tasks = {name: prompt.task for name, prompt in plan.by_id.items()}
            clusters = {name: cluster_of(prompt) for name, prompt in plan.by_id.items()}
            decided = decision.decide_scores(lines, tasks, clusters, headline_tasks_of(benchmark))
    if not sum(decided.statuses.values()):
        raise LensError(f"{folder}: no picture was perceived; there is nothing to report")
    stored = atomic_files.read_json(folder / CEILING) if (folder / CEILING).is_file() else {}
    ceiling = {name: value for name, value in stored.items() if isinstance(value, int | float)}
    settings = {**run_report.settings(run, plan, manifest), "perceivers": perceivers}
    measured = run_report.Measured(plan, manifest, decided, settings, ceiling)
    run_report.write(measured)
    return BenchmarkReport(folder, decided, measured.settings, measured.text)


def benchmark_line(text: str) -> str:
    """A benchmark as a command line names it, in one line. One in a YAML file is written out, because results record
    this line."""
    if not _is_yaml_file(text):
        return text
    import yaml

    spec = named_component(text)
    data = {"use": spec.use, **spec.options}
    line: str = yaml.safe_dump(data, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return line.strip()


def _is_yaml_file(text: str) -> bool:
    return Path(text).suffix.lower() in (".yaml", ".yml")


def named_component(text: str) -> ComponentSpec:
    """A component as a command line names it: its name, one line of YAML, or a YAML file."""
    path = Path(text)
    if _is_yaml_file(text):
        data, problems = readers.read_yaml(path, missing="there is no such file")
        if problems:
            raise ConfigError([f"{path}: {problem}" for problem in problems])
        if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
            raise ConfigError(f"{path}: must be a mapping with `use`, the component's name, and its options")
        return ComponentSpec(data["use"], {k: v for k, v in data.items() if k != "use"})
    return parse_use(text)


def parse_stages(text: str) -> tuple[str, ...]:
    """Stages separated by commas, in the order in which they run."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in stages.STAGES:
            raise ConfigError(f"no stage is called {name!r}.{did_you_mean(name, stages.STAGES)}")
    if not names:
        raise ConfigError(f"name a stage: {', '.join(stages.STAGES)}")
    return tuple(name for name in stages.STAGES if name in names)


def generator_spec(text: str, settings: Mapping[str, Any]) -> ComponentSpec:
    """The generator that a command line names, or `pipeline` with those `settings` that are not None where it is ""."""
    options = {name: value for name, value in settings.items() if value is not None}
    if not text:
        return ComponentSpec("pipeline", options)
    if options:
        names = ", ".join(f"--{'lora' if name == 'loras' else name.replace('_', '-')}" for name in options)
        raise ConfigError(f"{names}: for --model alone; with --generator put options into '{{use: NAME, …}}'")
    return named_component(text)
