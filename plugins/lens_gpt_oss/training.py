"""The method `language_model`: trains a `gpt_oss` encoder to predict captions in the conversation that encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lens_core.protocols import BaseMethod
from lens_core.types import Batch, ConfigError, Loss
from lens_core.validators import WEIGHT, integer
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.template import train_tokenizer, wrap_tokenizer

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


class LanguageModel(BaseMethod):
    """Train the text encoder to predict captions, token by token (cross entropy).

    loss = cross entropy of the tokens after the head, in nats a token, + balance * the experts' imbalance.

    Of a dataset of conversations (`Batch.chats`) the tokens of the last turns count, and no others.

    A step that is divided weighs its parts by their tokens: its cross entropy is that of all tokens alike. The
    imbalance is measured in each part by itself.
    """

    headline = ("text_encoder/nll", "text_encoder/imbalance", "text_encoder/grad_norm")

    @frozen
    class Config:
        # Batches whose captions make the tokenizer, if the encoder has none yet.
        tokenizer_batches: int = field(default=50, validator=integer(at_least=1))
        # Weighs the imbalance, which is 1 when every expert gets an equal share.
        balance: float = field(default=0.01, validator=WEIGHT)
        # Capitals are tokens of their own in the tokenizer that is made: words of capitals can then be copied.
        lone_capitals: bool = False

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        encoder: Any = pipeline.text_encoder
        if not isinstance(encoder, GptOssEncoder):
            raise ConfigError(
                f"language_model: trains a gpt_oss text encoder, not a {type(encoder).__name__}; name it in the recipe"
            )
        self.config = config
        self.encoder = encoder

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return {"text_encoder": self.encoder}

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Batch]]:
        """One batch a step. The first batches make the tokenizer if there is none, and are not learned from, so that
        a run resumed after any step goes on with the batch it would have had."""
        if self.encoder.tokenizer is None:
            texts = [t for batch in islice(batches, self.config.tokenizer_batches) for t in _texts(batch)]
            size, alone = self.encoder.config.vocab_size, self.config.lone_capitals
            tokenizer = train_tokenizer(texts, size, lone_capitals=alone)
            self.load_state_dict(_first_rank(_state(tokenizer)))
        for batch in batches:
            yield (batch,)

    def update_order(self, step: int) -> Sequence[str]:
        return ("text_encoder",)

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Batch, rng: torch.Generator) -> Loss:
        ids, mask, learned = self._tokens(batch)
        first = int(learned.any(0).int().argmax())  # the first token that any row learns
        # What all conversations begin with, the system prompt most of all, is computed once.
        alike = int((ids == ids[:1]).all(0).int().cumprod(0).sum())
        shared = min(alike, first - 1) if batch.chats and len(ids) > 1 else 0
        logits, routes = modules[module_name](ids[:, :-1], first - 1, shared)
        counts = learned[:, first:]
        nll = cross_entropy(logits[counts].float(), ids[:, first:][counts])
        used = mask[:, shared:-1].flatten()
        uneven = imbalance(routes.flatten(1, 2)[:, used], self.encoder.config.num_experts_per_tok)
        parts = {"nll": nll.detach(), "imbalance": uneven.detach()}
        return Loss(nll + self.config.balance * uneven, parts, weight=float(counts.sum()))

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, learned), [B,S] each, of the captions in the conversation that encodes them, or of the batch's
        own conversations, of which the last turn alone is learned."""
        if not batch.chats:
            ids, mask = self.encoder.tokens(batch.captions)
            after = torch.arange(ids.shape[1], device=ids.device) >= self.encoder.head_length
            return ids, mask, mask & after
        return self.encoder.chat_tokens(batch.chats)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.encoder.tokenizer is None else _state(self.encoder.tokenizer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.encoder.tokenizer = wrap_tokenizer(Tokenizer.from_str(state["tokenizer"]), state["chat_template"])


def imbalance(routes: Tensor, top: int) -> Tensor:
    """Router logits [N,tokens,E] -> E sum_e share_e probability_e, a mean over the layers N: 1 is even, E is collapse.

    share is the part of the `top` choices a token that expert e gets (Switch Transformer, equations 4 to 6).
    """
    experts = routes.shape[-1]
    probability = routes.float().softmax(-1).mean(1)
    share = one_hot(routes.topk(top).indices, experts).float().mean((1, 2))
    return experts * (share * probability).sum(-1).mean()


def _texts(batch: Batch) -> Sequence[str]:
    """What the tokenizer is made of: the captions, or the turns of the conversations."""
    return [turn.text for turns in batch.chats for turn in turns] or batch.captions


def _state(tokenizer: Any) -> dict[str, Any]:
    return {"tokenizer": tokenizer.backend_tokenizer.to_str(), "chat_template": tokenizer.chat_template}


def _first_rank(state: dict[str, Any]) -> dict[str, Any]:
    """The state of rank 0: every process saw other captions, and all must speak one vocabulary."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        box = [state]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return state
