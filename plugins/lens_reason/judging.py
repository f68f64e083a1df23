"""A candidate's scores: its prompts are refined, drawn and judged, each once, within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from lens_core.attribution import calling, checked_scores, name_of
from lens_core.evaluation.run import picture_seed
from lens_core.types import ConfigError, LensError, Prompt
from lens_reason.recipe import Budget, Search
from lens_reason.state import Judgement, SearchFiles, name_of_prompt


class BudgetReached(LensError):
    """The next step would cost more than the budget leaves."""


@frozen
class Part:
    """A part of a benchmark: its name, the component, and its prompts."""

    name: str
    benchmark: Any
    prompts: Sequence[Prompt]


class Purse:
    """What may still be spent. `held` pictures are kept back for the end."""

    def __init__(self, budget: Budget, files: SearchFiles, models: Sequence[Any]) -> None:
        self.budget, self.files, self.held = budget, files, 0
        self.ending = False  # the comparison at the end is made whatever calls and dollars are left
        self._models = list({id(m): m for m in models if getattr(m, "spend", None) is not None}.values())
        self._seen = [(0.0, 0.0)] * len(self._models)

    def counts(self, model: Any) -> bool:
        """Whether the calls of a model are counted."""
        return any(model is one for one in self._models)

    def settle(self) -> None:
        """Write down what the models have cost since the last time."""
        now = [(float(m.spend.calls), float(m.spend.usd)) for m in self._models]
        calls = sum(a[0] - b[0] for a, b in zip(now, self._seen, strict=True))
        usd = sum(a[1] - b[1] for a, b in zip(now, self._seen, strict=True))
        self._seen = now
        self.files.spend(calls, usd)

    def require(self, pictures: int = 0, calls: int = 0) -> None:
        """Raise BudgetReached where so much more is not left."""
        left = self.budget.pictures - self.held - self.files.pictures
        if pictures > left:
            raise BudgetReached(f"{pictures} pictures are needed, and {max(0, left)} are left")
        if self.ending:
            return
        if self.files.spent["calls"] + calls > self.budget.calls:
            raise BudgetReached(f"all {self.budget.calls} calls are made")
        if self.budget.usd is not None and self.files.spent["usd"] >= self.budget.usd:
            raise BudgetReached(f"all of ${self.budget.usd:g} is spent")


class Judge:
    """Draws and scores a candidate's pictures. Picture i of a part has the same seed for every candidate."""

    def __init__(self, search: Search, pipeline: Any, reasoner: Any, purse: Purse, log: Callable[[str], None]) -> None:
        if not hasattr(reasoner, "with_system"):
            raise ConfigError(f"{name_of(reasoner)} has no system prompt that could be searched; use chat or gpt_oss")
        self.search, self.pipeline, self.reasoner = search, pipeline, reasoner
        self.purse, self.files, self.log = purse, purse.files, log

    def judge(self, system: str, part: Part, indices: Sequence[int]) -> list[Judgement]:
        """The judgements of some prompts of a part, in their order. Raises BudgetReached before the first picture that
        the budget does not pay for: pictures before anything is drawn, calls and dollars before each batch."""
        candidate = name_of_prompt(system)
        missing = [i for i in dict.fromkeys(indices) if self.files.judged(candidate, part.name, i) is None]
        if missing:
            self.purse.require(pictures=len(missing))
            self.pipeline.use_reasoner(self.reasoner.with_system(system))
        for first in range(0, len(missing), self.search.batch_size):
            batch = missing[first : first + self.search.batch_size]
            self.purse.require(calls=len(batch) if self.purse.counts(getattr(self.reasoner, "llm", None)) else 0)
            self._batch(candidate, part, batch)
            self.log(f"{candidate} {part.name}: {self.files.pictures} of {self.purse.budget.pictures} pictures")
        return [one for i in indices if (one := self.files.judged(candidate, part.name, i)) is not None]

    def _batch(self, candidate: str, part: Part, indices: Sequence[int]) -> None:
        prompts = [part.prompts[i] for i in indices]
        height, width = self.search.size or (None, None)
        try:
            result = self.pipeline(
                [p.text for p in prompts], seed=[picture_seed(self.search.seed, i) for i in indices],
                num_inference_steps=self.search.steps, guidance_scale=self.search.guidance_scale, height=height,
                width=width, output_type="pt",
            )  # fmt: skip
        finally:
            self.purse.settle()
        with calling(part.benchmark, "score"):
            scores = part.benchmark.score(result.images, prompts)
        scores = checked_scores(part.benchmark, scores, len(prompts))
        for index, refinement, score in zip(indices, result.prompts, scores, strict=True):
            self.files.add_judgement(Judgement(candidate, part.name, index, refinement, score))
