"""The reasoner `chat`: any llm by name, such as an OpenAI-compatible endpoint or a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attrs import field, frozen

from lens_core.attribution import building
from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build
from lens_core.types import LensError, Message
from lens_core.validators import integer
from lens_reason.harmony import final_text, pieces_of
from lens_reason.rewriting import Rewriter, RewritingConfig


def usual_llm() -> ComponentSpec:
    """GPT-5.5 at OpenAI, which takes no temperature, and calls the length of an answer by its newer name."""
    fit = {"rename": {"max_tokens": "max_completion_tokens"}, "request": {"temperature": None}, "max_tokens": 4096}
    return ComponentSpec("openai", {"model": "gpt-5.5", **fit})


class ChatReasoner(Rewriter):
    """Rewrite prompts with a chat model, asked concurrently."""

    @frozen(kw_only=True)
    class Config(RewritingConfig):
        llm: ComponentSpec = field(factory=usual_llm)  # as in {use: openai, model: gpt-4.1, base_url: "http://…"}
        # Requests at a time, for an llm that has no `map` of its own.
        concurrency: int = field(default=8, validator=integer(at_least=1, at_most=1000))

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            yield "llm", "llm", self.llm

    def __init__(self, config: Config, llm: Any = None) -> None:
        """`llm`: one already built; None: the one that the config names."""
        super().__init__(config)
        name, cls, options = build(Catalog.installed(), "llm", config.llm, "reasoner.llm")
        if llm is None:
            with building(name):
                llm = cls(options)
        self.llm = llm
        place = getattr(options, "base_url", None)
        self.model = f"{getattr(options, 'model', name)}{f' at {place}' if place else ''}"

    @property
    def spend(self) -> Any:
        """What the llm has cost so far, where it counts: see `lens_llm.budget.Spend`."""
        return getattr(self.llm, "spend", None)

    def ask(self, chats: Sequence[tuple[Message, ...]]) -> list[str | LensError]:
        def one(chat: tuple[Message, ...]) -> str | LensError:
            try:
                # A server that runs GPT-OSS without parsing its channels hands them on as text.
                return final_text(pieces_of(str(self.llm.chat(chat))))
            except LensError as error:
                return error

        if hasattr(self.llm, "map"):
            return list(self.llm.map(one, chats))
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(one, chats))
