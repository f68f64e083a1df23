"""A search as a YAML file: what is searched, with which model, judged by what, and how much of each may be spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, structure
from lens_core.inference.reasoner_files import MAX_PROMPT, read_prompt
from lens_core.io import readers
from lens_core.recipe import build, change_data
from lens_core.types import ConfigError
from lens_core.validators import GUIDANCE, PIXELS, SEED, STEPS, each, integer, one_of, optional, real, text

CONTROLS = ("none", "random", "shuffled")


@frozen
class Budget:
    """What a search may spend, resumed runs included."""

    pictures: int = field(validator=integer(at_least=1))  # drawn, those of the held-out prompts included
    # Requests to language models: to the reflecting one, and to the reasoner's, where it counts its requests.
    calls: int = field(default=10_000, validator=integer(at_least=1))
    usd: float | None = field(default=None, validator=optional(real(above=0)))


@frozen
class Search:
    """One search for the system prompt of a reasoner."""

    reasoner: ComponentSpec  # whose system prompt is searched; one that it names itself is ignored
    benchmark: ComponentSpec
    dev: dict[str, Any]  # options of the benchmark for the prompts that choose, as in {split: select}
    heldout: dict[str, Any]  # and for those that tell how good the choice is, as in {split: test}
    reflector: ComponentSpec  # the llm that proposes prompts
    budget: Budget
    model: str = field(default="tiny:", validator=text())
    start: str | None = field(default=None, validator=optional(text()))  # system prompt; None: the published rules
    start_file: str | None = field(default=None, validator=optional(text()))
    seed: int = field(default=0, validator=SEED)
    minibatch: int = field(
        default=8, validator=integer(at_least=1, at_most=1000)
    )  # prompts that a proposal is tried on
    # When a proposal goes on to all dev prompts: better on its minibatch than its parent, or as good.
    acceptance: str = field(
        default="strict_improvement", validator=one_of("strict_improvement", "improvement_or_equal")
    )
    selection: str = field(default="pareto", validator=one_of("pareto", "current_best"))  # of the candidate to change
    steps: int | None = field(default=None, validator=optional(STEPS))  # of the sampler
    guidance_scale: float | None = field(default=None, validator=optional(GUIDANCE))
    size: tuple[int, int] | None = field(default=None, validator=optional(each(PIXELS, at_least=2)))  # height, width
    batch_size: int = field(default=32, validator=integer(at_least=1, at_most=10_000))  # pictures drawn at once
    # A control instead of a search: edits without scores, of which the best is kept; or scores of other pictures.
    control: str = field(default="none", validator=one_of(*CONTROLS))

    def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
        """What is checked with a search: (path, kind, use)."""
        yield "reasoner", "reasoner", self.reasoner
        yield "benchmark", "benchmark", self.part("dev")
        yield "reflector", "llm", self.reflector

    def part(self, name: str) -> ComponentSpec:
        """The benchmark with the options of `dev` or `heldout`."""
        return ComponentSpec(self.benchmark.use, {**self.benchmark.options, **getattr(self, name)})


def read_search(path: Path, catalog: Catalog, changes: Sequence[str] = ()) -> Search:
    """The search in a YAML file, with `changes` as in budget.pictures=500, checked whole. Raises ConfigError with every
    problem at once."""
    data, problems = readers.read_yaml(path, missing="there is no such recipe")
    for change in changes:
        problems = [*problems, *change_data(data, change)]
    if isinstance(data, dict) and "heldout" not in data and "benchmark" in data:
        problems = [
            *problems,
            "$.heldout: missing; name the options of the benchmark's held-out part, {split: test} say",
        ]
        data = {**data, "heldout": {}}
    search: Search | None = None
    try:
        search = structure(Search, data)
    except ConfigError as error:
        problems += error.problems
    if search is not None:
        problems += list(_flaws(search, catalog))
    if problems or search is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return search


def _flaws(search: Search, catalog: Catalog) -> Iterator[str]:
    flaws: list[str] = []
    for place, kind, use in [*search.uses(), ("benchmark", "benchmark", search.part("heldout"))]:
        try:
            build(catalog, kind, use, f"$.{place}")
        except ConfigError as error:
            flaws += error.problems
    yield from dict.fromkeys(flaws)  # what is wrong with both parts of the benchmark is said once
    if search.start is not None and search.start_file is not None:
        yield "$: start and start_file are both given; keep one"
    if search.start is not None and len(search.start.encode("utf-8", "replace")) > MAX_PROMPT:
        yield f"$.start: has more than {MAX_PROMPT} bytes; shorten it"


def start_of(search: Search, usual: str) -> str:
    """The system prompt that a search starts from; `usual` where it names none. Raises ConfigError."""
    if search.start_file is not None:
        _, words, problems = read_prompt(Path(search.start_file).expanduser())
        if problems:
            raise ConfigError([f"{search.start_file}: {problem}" for problem in problems])
        return words
    return (search.start or usual).strip()
