"""Text from the weights that encode prompts: a GPT-OSS that writes, the likeliest token at each place.

Letters: B conversations, S tokens of the longest of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.types import Completion, LensError, Message, move
from lens_gpt_oss.chat import ChatRenderer
from lens_gpt_oss.rest import read_rest
from lens_gpt_oss.template import CONTROLS, END, Wrapper

Unread = tuple[dict[str, LazyTensor], Path, torch.dtype | None]
"""Weights that were left in their file: tensors, the file, and the dtype of the others."""


class WritesText:
    """What makes a text encoder a language model that writes: mixed into `GptOssEncoder`."""

    config: Any
    model: Any
    lm_head: nn.Linear | None
    _wrap: Callable[[], Wrapper]
    _chat: ChatRenderer | None
    _unread: Unread | None  # what encoding does not need

    def chat_tokens(self, chats: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor, Tensor]:
        """`chat_batch` with this tokenizer."""
        return chat_batch(self._renderer(), chats, self.config.max_length, self.model.embed_tokens.weight.device)

    def complete(self, chats: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Completion]:
        """What the model says next in each conversation; reads the layers and the head that encoding does not need, if
        they have not been read. Raises LensError where its file has none."""
        self._read_rest()
        return complete(self, self._renderer(), chats, max_new_tokens)

    def excess_tokens(self, prompt: str) -> int:
        """How many tokens of a prompt do not fit into `max_length`."""
        return self._wrap().ids([prompt], self.config.max_length)[1][0]

    def _renderer(self) -> ChatRenderer:
        if self._chat is None:
            self._chat = ChatRenderer(self._wrap().tokenizer, self.config.date)
        return self._chat

    def _read_rest(self) -> None:
        """Read what was left in the file: the layers after the last selected one, and the head."""
        if self._unread is None:
            if self.lm_head is None:
                raise LensError(
                    "gpt_oss: this text encoder has no lm_head, so it cannot write; load a checkpoint that has one"
                )
            return
        before = note_of(self)
        read_rest(self, *self._unread)
        self._unread = None
        warnings.warn(
            f"gpt_oss: the reasoner needs the whole text encoder: {note_of(self)}, before {before}", stacklevel=4
        )


STOPS = (END, "<|call|>")
"""The tokens at which a turn is over."""


def chat_batch(
    renderer: ChatRenderer, chats: Sequence[Sequence[Message]], longest: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole conversations -> ids [B,S] padded on the right, their mask, and where their last turns stand, on `device`.
    Raises LensError for one of more than `longest` tokens."""
    rows, starts = [], []
    for *before, last in chats:
        row = renderer.ids(before, longest)
        starts.append(len(row))
        rows.append([*row, *renderer.answer(last.text)])
    ids, mask = padded(rows)
    renderer.check_length(ids.shape[1], longest)
    learned = mask & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
    return move(ids, device), move(mask, device), move(learned, device)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B,S] padded on the right with 0, and their mask."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


@torch.no_grad()
def complete(
    encoder: Any, renderer: ChatRenderer, chats: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[Completion]:
    """What the model says next in each conversation, with a cache of keys and values. A row ends at its stop token, at
    `max_new_tokens`, or where the encoder's `max_length` is full. Raises LensError for a conversation that is too long.
    """
    longest = encoder.config.max_length
    rows = [renderer.ids(chat, longest) for chat in chats]
    tokenizer = renderer.tokenizer
    stops = torch.tensor(sorted(set(tokenizer.convert_tokens_to_ids(list(STOPS)))))
    written: list[list[int]] = [[] for _ in rows]
    # Rows of one length run together: no row is padded, so none depends on those beside it.
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(place)
    with _all_on_one_device(encoder):
        for length, places in sorted(by_length.items()):
            most = min(max_new_tokens, longest - length)
            _generate(encoder, torch.tensor([rows[p] for p in places]), most, stops, [written[p] for p in places])
    return [_completion(tokenizer, ids, set(stops.tolist())) for ids in written]


def _generate(encoder: Any, ids: Tensor, most: int, stops: Tensor, written: list[list[int]]) -> None:
    """Append to `written`, a list for each row of ids [B,S], at most `most` tokens each."""
    assert encoder.lm_head is not None
    device = encoder.model.embed_tokens.weight.device
    cache, step = DynamicCache(), move(ids, device)
    alive = list(range(len(ids)))
    for _ in range(most):
        out = encoder.model(input_ids=step, past_key_values=cache, use_cache=True)
        # The winner is chosen in float32: in bfloat16 many of the best tie.
        best = encoder.lm_head(out.last_hidden_state[:, -1]).float().argmax(-1).cpu()
        going = ~torch.isin(best, stops)
        for row, token in zip(alive, best.tolist(), strict=True):
            written[row].append(token)
        if not going.any():
            return
        if not going.all():
            kept = going.nonzero()[:, 0]
            cache.batch_select_indices(kept.to(device))
            alive = [alive[k] for k in kept.tolist()]
        step = move(best[going][:, None], device)


@contextmanager
def _all_on_one_device(encoder: Any) -> Iterator[None]:
    """The time in which the modules that encoding does not use are where the others are: a plan of offloading leaves
    them behind."""
    device = encoder.model.embed_tokens.weight.device
    behind = [
        (module, first.device)
        for module in encoder.unused_modules()
        if (first := next(module.parameters(), None)) is not None and first.device != device
    ]
    try:
        for module, _ in behind:
            module.to(device)
        yield
    finally:
        for module, home in behind:
            module.to(home)


def _completion(tokenizer: Any, ids: Sequence[int], stops: set[int]) -> Completion:
    """Token ids as control tokens and the texts between them."""
    names = {tokenizer.convert_tokens_to_ids(name): name for name in CONTROLS}
    pieces: list[tuple[bool, str]] = []
    text: list[int] = []
    for token in (*ids, None):
        if token is None or token in names:
            if text:
                pieces.append((False, str(tokenizer.decode(text, skip_special_tokens=False))))
            text = []
            if token is not None:
                pieces.append((True, names[token]))
        else:
            text.append(token)
    return Completion(tuple(pieces), bool(ids) and ids[-1] in stops, len(ids))


def note_of(encoder: Any) -> str:
    """The memory that the weights of an encoder take, in a line."""
    held = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    return f"{held / 1e9:.1f} GB" if held >= 1e8 else f"{held / 1e6:.1f} MB"
