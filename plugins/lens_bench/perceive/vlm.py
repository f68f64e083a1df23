"""The perceiver `vlm`: a language model that takes pictures reads them and answers questions about them.

Any `llm` serves that takes pictures; budgets, retries and the cache of its answers are the llm's own. The prompts are
those of OneIG and LongText-Bench, whose published numbers are Qwen2.5-VL-7B-Instruct's; vLLM and others serve it
through the protocol that the llm `openai` speaks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import evolve, field, fields_dict, frozen, has

from lens_bench.perceive import canary, pictures
from lens_core.catalog import Catalog
from lens_core.io import readers
from lens_core.recipe import ComponentSpec, build, unstructure
from lens_core.types import LensError, Message
from lens_core.validators import integer

if TYPE_CHECKING:
    from PIL.Image import Image

READ = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating previously mentioned "
    "content. If no text is recognized, please reply with 'No text recognized'."
)
ASK = "{question}. Please answer 'Yes' or 'No' only."
# Options of an llm that decide how an answer is fetched and what it costs, not what it says.
OPERATIONAL = (
    "cache", "concurrency", "image_tokens", "key_env", "max_calls", "max_usd", "patience", "price_in", "price_out",
    "retries", "timeout",
)  # fmt: skip


class Vlm:
    """A vision LLM answers questions about a picture.

    Question: a prompt, or {"text": prompt, "max_tokens": n} -> the model's answer, as it came.

    `max_tokens` counts instead of the llm's own limit, where the llm has an option of that name. A text that was cut
    off there is an answer, as it is to the benchmarks' authors, and so is a blank one, of a picture without text:
    where the llm has the option `as_is`, it is set.
    """

    perceives: ClassVar[str] = "answer"

    @frozen
    class Config:
        llm: ComponentSpec  # as in {use: openai, model: Qwen/Qwen2.5-VL-7B-Instruct, base_url: "http://localhost:8000/v1"}
        revision: str = ""  # of the model, if its server tells; part of what identifies an answer
        batch_size: int = field(default=32, validator=integer(at_least=1, at_most=4096))  # questions at once

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield "llm", "llm", self.llm

    def __init__(self, config: Config, llm: Any = None) -> None:
        """`llm`: one already built; None: the one that the config names."""
        self.config = config
        self.batch_size = config.batch_size
        self._built = llm
        self._llms: dict[int | None, Any] = {}

    def describe(self) -> dict[str, str]:
        options = getattr(self._llm(None), "config", None)
        plain = unstructure(options) if options is not None and has(type(options)) else dict(self.config.llm.options)
        # Hashed: the address of a server is nobody's business.
        deciding = {name: value for name, value in plain.items() if name not in OPERATIONAL}
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return {
            "model": str(plain.get("model", self.config.llm.use)),
            "revision": self.config.revision,
            "version": f"png-options-{digest}",
        }

    def check_requirements(self) -> None:
        """Raise LensError where the llm cannot be built, or lacks what it needs, such as a key."""
        llm = self._llm(None)
        if hasattr(llm, "check_requirements"):
            llm.check_requirements()

    def canary(self) -> str | None:
        return canary.sentence(self, READ) or canary.questions(self, ASK)

    @property
    def spend(self) -> dict[str, float]:
        """What the model has cost; empty where its llm does not count."""
        spend = getattr(self._llm(None), "spend", None)
        return {} if spend is None else {"calls": spend.calls, "cached": spend.cached, "usd": spend.usd}

    def estimate(self, calls: int, question: Any = READ) -> Any:
        """What so many calls cost at most (`calls`, `usd`, …); None where the llm cannot tell. Nothing is sent."""
        llm = self._llm(None)
        return (
            llm.estimate([Message("user", _text(question), (b"",))], None, calls) if hasattr(llm, "estimate") else None
        )

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[str | LensError]:
        def one(pair: tuple[Image, Any]) -> str | LensError:
            image, question = pair
            try:
                answer = self._llm(_limit(question)).chat([Message("user", _text(question), (pictures.png(image),))])
            except LensError as error:
                return error
            return answer if isinstance(answer, str) else LensError(f"the answer {readers.shown(answer)} is no text")

        for question in questions:  # built here, before threads ask for them
            self._llm(_limit(question))
        pairs = list(zip(images, questions, strict=True))
        llm = self._llm(None)
        return list(llm.map(one, pairs)) if hasattr(llm, "map") else [one(pair) for pair in pairs]

    def _llm(self, max_tokens: int | None) -> Any:
        """The llm whose answers have at most so many tokens. All of them spend from one budget."""
        if self._built is None:
            _, cls, config = build(Catalog.installed(), "llm", self.config.llm, "$.llm")
            self._built = cls(config)
        if max_tokens not in self._llms:
            options: Any = getattr(self._built, "config", None)
            kind: Any = type(options)
            known = fields_dict(kind) if has(kind) else {}
            changes = {"as_is": True, **({} if max_tokens is None else {"max_tokens": max_tokens})}
            changes = {name: value for name, value in changes.items() if name in known}
            made = type(self._built)(evolve(options, **changes)) if changes else self._built
            if hasattr(self._built, "budget"):
                made.budget = self._built.budget
            self._llms[max_tokens] = made
        return self._llms[max_tokens]


def _text(question: Any) -> str:
    return str(question["text"]) if isinstance(question, Mapping) else str(question)


def _limit(question: Any) -> int | None:
    return question.get("max_tokens") if isinstance(question, Mapping) else None
