"""The reasoner `gpt_oss`: a model's own text encoder that writes, or that of another checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import field, frozen

from lens_core.types import Completion, ConfigError, LensError, Message
from lens_core.validators import integer, optional, text
from lens_reason.harmony import HarmonyError, final_text
from lens_reason.rewriting import Rewriter, RewritingConfig


class GptOssReasoner(Rewriter):
    """Rewrite prompts with the GPT-OSS text encoder of this or another checkpoint.

    Its weights are in memory once. On the published model this also reads its head, and any layers that encoding does
    not need, when the first request comes; the memory is then printed.
    """

    @frozen(kw_only=True)
    class Config(RewritingConfig):
        # A checkpoint whose text encoder writes (examples/recipes/tiny/reasoner.yaml makes one); None: that of the
        # model that draws.
        model: str | None = field(default=None, validator=optional(text()))
        max_new_tokens: int = field(default=1024, validator=integer(at_least=1, at_most=2**16))  # of an answer
        batch_size: int = field(default=32, validator=integer(at_least=1, at_most=1024))  # requests at a time

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = config.model or "the model's own text encoder"
        self._pipeline: Any = None

    def attach(self, pipeline: Any) -> None:
        """Write with the text encoder of `pipeline`, unless another checkpoint is named, which is read now."""
        if self._pipeline is not None and self.config.model is not None:
            return  # read before, for the same reasoner with another system prompt
        if self.config.model is None:
            self._pipeline = pipeline
            self.model = f"{pipeline.source or 'a model'} {pipeline.version}".strip()
            return
        from lens_core.inference.pipeline import LensPipeline

        self._pipeline = LensPipeline.from_pretrained(
            self.config.model, catalog=pipeline.catalog, parts=("text_encoder",), device=pipeline.device
        )
        self.model = f"{self.config.model} {self._pipeline.version}"

    def ask(self, chats: Sequence[tuple[Message, ...]]) -> list[str | LensError]:
        if self._pipeline is None:
            raise ConfigError("gpt_oss: no model is attached; give the reasoner to a pipeline")
        answers: list[str | LensError] = []
        for first in range(0, len(chats), self.config.batch_size):
            answers += self._batch(chats[first : first + self.config.batch_size])
        return answers

    def _batch(self, chats: Sequence[tuple[Message, ...]]) -> list[str | LensError]:
        try:
            return [_text(one) for one in self._pipeline.complete(chats, self.config.max_new_tokens)]
        except ConfigError:
            raise
        except LensError as error:
            if len(chats) == 1:
                return [error]
            # One request that is too long, say, must not cost the others their answers.
            return [answer for chat in chats for answer in self._batch([chat])]


def _text(completion: Completion) -> str | LensError:
    """The final text of what was written, or why there is none."""
    try:
        return final_text(completion.pieces, completion.finished)
    except HarmonyError as error:
        return error
