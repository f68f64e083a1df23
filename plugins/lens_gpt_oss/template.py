"""The conversation a prompt is wrapped in before it is encoded, and tokenizers for small encoders.

The published format (three turns, two fixed strings) is part of the weights: it must match to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lens_core.types import CheckpointError

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background."
)
THOUGHT = "Need to generate one image according to the description."
END = "<|return|>"
PAD = "<|endoftext|>"
CONTROLS = (
    PAD, "<|startoftext|>", END, "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|constrain|>", "<|call|>",
)  # fmt: skip
_MARK = "\ue000prompt\ue000"  # private-use characters: no template holds them

CHAT_TEMPLATE = """\
{{- "<|start|>system<|message|>You are a language model that reads descriptions of pictures.\\n" }}
{{- "Knowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort or "medium") + "\\n\\n" }}
{{- "# Valid channels: analysis, commentary, final.<|end|>" }}
{%- for message in messages %}
    {%- if message.role in ("system", "developer") %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {%- if message.thinking is defined %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- else %}
        {{- raise_exception("no role is called " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""
"""A conversation in the shape of GPT-OSS's, for the tokenizers of `train_tokenizer`."""

HARMONY = (
    CHAT_TEMPLATE.replace(
        "a language model that reads descriptions of pictures.", "ChatGPT, a large language model trained by OpenAI."
    )
    .replace("analysis, commentary, final.", "analysis, commentary, final. Channel must be included for every message.")
    .replace('# Instructions\\n\\n" + message.content + "', '# Instructions\\n\\n" + message.content + "\\n\\n')
)
"""GPT-OSS's own, as far as the conversation of a prompt goes: for single files, which bring a tokenizer without it."""


def conversation(prompt: str) -> list[dict[str, str]]:
    """The three turns that a prompt is encoded in."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": prompt},
        {"role": "assistant", "thinking": THOUGHT, "content": ""},
    ]


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)


def render(chat_template: str, messages: Sequence[dict[str, str]], date: str) -> str:
    """The text of `messages`, written on the day `date` (YYYY-MM-DD) whatever today is. Templates run in a sandbox."""
    day = datetime.fromisoformat(date)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals |= {"strftime_now": day.strftime, "raise_exception": _refuse}
    try:
        return jinja.from_string(chat_template).render(messages=messages, add_generation_prompt=False)
    except (TemplateError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the chat template cannot be rendered ({reason}); fetch the tokenizer again") from error


class Wrapper:
    """Turns prompts into token ids: `head`, the prompt, `tail`. Everything from the first `<|return|>` on is cut."""

    def __init__(self, tokenizer: Any, date: str) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise CheckpointError("the tokenizer has no chat template; fetch tokenizer/chat_template.jinja too")
        head, mark, rest = render(tokenizer.chat_template, conversation(_MARK), date).partition(_MARK)
        tail, end, _ = rest.partition(END)
        if not mark or not end or END in head or _MARK in tail:
            raise CheckpointError(f"the chat template must show the prompt once, and {END} after it")
        self.tokenizer = tokenizer
        self.head: list[int] = tokenizer(head, add_special_tokens=False)["input_ids"]
        self.tail: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"]

    def ids(self, prompts: Sequence[str], longest: int) -> tuple[list[list[int]], list[int]]:
        """Each prompt's ids, at most `longest` with head and tail whole, and how many of its tokens were cut.

        A prompt is plain text: control tokens spelled in it stay letters and open no turn.
        """
        room = longest - len(self.head) - len(self.tail)
        texts = self.tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rows = [[*self.head, *text[:room], *self.tail] for text in texts]
        return rows, [max(0, len(text) - room) for text in texts]


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of at most `vocab_size` tokens, made from captions wrapped as they will be encoded.

    Digits stand alone, so every date gives the head the same length. The same captions give the same tokenizer.
    """
    head, tail = render(CHAT_TEMPLATE, conversation(_MARK), "0001-01-01").split(_MARK)
    for control in CONTROLS:
        head, tail = head.replace(control, "\n"), tail.replace(control, "\n")

    def corpus() -> Iterator[str]:
        for caption in captions:
            yield from (head, caption, tail)  # the wrapping is as frequent as captions, so its words become tokens

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(CONTROLS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return wrap_tokenizer(tokenizer, CHAT_TEMPLATE)


def read_tokenizer(data: bytes, chat_template: str | None, where: str) -> PreTrainedTokenizerFast:
    """A `tokenizer.json` from within a single file, with `chat_template`, or HARMONY. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: its tokenizer_json cannot be read ({reason}); fetch it again") from error
    return wrap_tokenizer(tokenizer, chat_template or HARMONY)


def wrap_tokenizer(tokenizer: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """A bare tokenizer with the names that transformers and `Wrapper` look for."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
