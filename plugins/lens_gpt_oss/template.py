"""The conversation a prompt is wrapped in before it is encoded, and tokenizers for small encoders.

The published format (three turns, two fixed strings) is part of the weights: it must match to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lens_core.io import readers
from lens_core.io.readers import one_line, shown
from lens_core.types import CheckpointError, LensError
from lens_gpt_oss import sandbox

T = TypeVar("T")
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
LARGEST = 2**26  # bytes of a tokenizer.json; GPT-OSS's has 28 MB
MOST_VALUES = 5_000_000  # in it
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents")
SPLITTERS = ("Split", "Digits", "ByteLevel", "Whitespace", "WhitespaceSplit", "Punctuation")
"""What a tokenizer.json may do to a text: nothing here makes it more than a few times as long. A second ByteLevel would
double what the first one wrote."""
MOST_STEPS = 8
LETTERS = 256  # of a prompt for each token that may be kept; GPT-OSS's longest token has 128
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


def render(
    chat_template: str, messages: Sequence[dict[str, str]], date: str, variables: Mapping[str, Any] | None = None
) -> str:
    """The text of `messages`, written on the day `date` (YYYY-MM-DD) whatever today is; `variables` are more that the
    template reads, such as reasoning_effort.

    The two templates of this module are run here. Any other is untrusted code, and is run in a process of its
    own with little time and memory (`sandbox`). Raises CheckpointError."""
    try:
        known = chat_template in (CHAT_TEMPLATE, HARMONY)
        return (sandbox.render_here if known else sandbox.render)(chat_template, messages, date, variables)
    except ValueError as error:
        raise CheckpointError(f"the chat template cannot be rendered ({error}); fetch the tokenizer again") from error


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
        self.head: list[int] = guarded(lambda: tokenizer(head, add_special_tokens=False)["input_ids"])
        self.tail: list[int] = guarded(lambda: tokenizer(tail, add_special_tokens=False)["input_ids"])

    def ids(self, prompts: Sequence[str], longest: int) -> tuple[list[list[int]], list[int]]:
        """Each prompt's ids, at most `longest` with head and tail whole, and how many of its tokens were cut.

        A prompt is plain text: control tokens spelled in it stay letters and open no turn. Of a prompt of which not
        even a part could fit, only the beginning is tokenized, and what was cut is counted from there. Raises
        LensError for a prompt with half a surrogate pair.
        """
        room = longest - len(self.head) - len(self.tail)
        for place, prompt in enumerate(prompts):
            try:
                readers.check_text(prompt)
            except ValueError as error:
                raise LensError(f"prompt {place} {error}") from error
        heads = [prompt[: LETTERS * longest] for prompt in prompts]
        texts = guarded(lambda: self.tokenizer(heads, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        rows = [[*self.head, *text[:room], *self.tail] for text in texts]
        return rows, [max(0, len(text) - room) for text in texts]


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, *, lone_capitals: bool = False
) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE of at most `vocab_size` tokens, made from captions wrapped as they will be encoded.

    Digits stand alone, so every date gives the head the same length; so does each of A to Z with `lone_capitals`, for a
    model that has to copy words of capitals or spell them. The same captions give the same tokenizer.
    """
    head, tail = render(CHAT_TEMPLATE, conversation(_MARK), "0001-01-01").split(_MARK)
    for control in CONTROLS:
        head, tail = head.replace(control, "\n"), tail.replace(control, "\n")

    def corpus() -> Iterator[str]:
        for caption in captions:
            yield from (head, caption, tail)  # the wrapping is as frequent as captions, so its words become tokens

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            *([pre_tokenizers.Split(Regex("[A-Z]"), "isolated")] if lone_capitals else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
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
        check_tokenizer(data)
        tokenizer = guarded(lambda: Tokenizer.from_str(data.decode("utf-8")))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise CheckpointError(
            f"{where}: its tokenizer_json cannot be read ({one_line(error, 200)}); fetch it again"
        ) from error
    return wrap_tokenizer(tokenizer, chat_template or HARMONY)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers saved in `folder`. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again")
    try:
        check_tokenizer(readers.read_bytes(path, LARGEST, CheckpointError))
        for name in BESIDE:
            if (folder / name).is_file():
                readers.parse_json(
                    readers.read_bytes(folder / name, error=CheckpointError), finite=False, allow_duplicate_keys=True
                )
        for template in folder.rglob("*.jinja"):
            readers.read_text(template, sandbox.LARGEST, CheckpointError)
        tokenizer = guarded(lambda: PreTrainedTokenizerFast.from_pretrained(folder))
        if tokenizer.chat_template is None and not (folder / BESIDE[0]).is_file():
            return wrap_tokenizer(tokenizer.backend_tokenizer, HARMONY)  # a tokenizer.json alone, beside a single file
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exceptions, transformers whatever it meets
        name = "" if isinstance(error, LensError | ValueError) else f"{type(error).__name__}: "
        reason = one_line(f"{name}{error}", 200)
        raise CheckpointError(f"{folder}: holds no tokenizer that can be read ({reason}); fetch it again") from error


def guarded(call: Callable[[], T]) -> T:
    """What `call` returns. Whatever a tokenizer's files make its libraries raise becomes a CheckpointError, a panic of
    the one in Rust, which is no Exception, too."""
    try:
        return call()
    except LensError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise CheckpointError(f"the tokenizer failed ({reason}); fetch it again") from error


def check_tokenizer(data: bytes) -> None:
    """Raise ValueError, in one line, for a `tokenizer.json` that could make much of little text, or take long over it.

    GPT-OSS's has no normalizer, one regular expression and byte-level BPE.
    """
    if len(data) > LARGEST or sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it is larger than any tokenizer ({len(data)} bytes)")
    tokenizer = readers.parse_json(data, finite=False, allow_duplicate_keys=True)
    if not isinstance(tokenizer, dict):
        raise ValueError("it is no JSON object")
    for section, plural, known in (
        ("normalizer", "normalizers", NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", SPLITTERS),
    ):
        steps = list(_steps(tokenizer.get(section), section, plural))
        kinds = [step.get("type") for step in steps]
        for step, kind in zip(steps, kinds, strict=True):
            if kind not in known:
                raise ValueError(f"its {section} {shown(kind)} may multiply a text; {', '.join(known)} are read")
            if isinstance(step.get("pattern"), dict) and "Regex" in step["pattern"]:
                _check_regex(step["pattern"]["Regex"])
        if len(kinds) > MOST_STEPS or kinds.count("ByteLevel") > 1:
            raise ValueError(f"its {section} has too many steps: {shown(kinds)}")


def _steps(value: Any, section: str, plural: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"its {section} is {shown(value)}, which is no object")
    if value.get("type") != "Sequence":
        yield value
        return
    inner = value.get(plural)
    if not isinstance(inner, list):
        raise ValueError(f"its {section} is a sequence of {shown(inner)}, which is no list")
    for step in inner:
        yield from _steps(step or {}, section, plural)


def _check_regex(pattern: Any) -> None:
    """Raise ValueError for a regular expression that may take more than quadratic time: one with a repeated group, a
    repetition in a group, a reference back, or more than two repetitions in a row of alternatives' parts."""
    if not isinstance(pattern, str) or len(pattern) > 2000:
        raise ValueError(f"its pattern {shown(pattern)} is no short text")
    # Escapes and classes are single characters; what remains is structure.
    bare = re.sub(r"\\[pP]\{[^{}]*\}|\\[^1-9gkK]", "a", pattern)
    bare = re.sub(r"\[\^?\]?(?:[^\[\]]|\[:\^?\w+:\])*\]", "a", bare)
    bare = re.sub(r"\{\d(?:,\d)?\}", "?", bare)  # of a few characters
    bare = re.sub(r"([*+?])[+?]", r"\1", bare)  # possessive or lazy
    bare = re.sub(r"\((?:\?(?:[imx]*:|[=!]|<[=!]))?([^()*+{\\\[\]]*)\)(?![*+{])", "a", bare)
    if set(bare) & set("(){}[]\\") or any(part.count("*") + part.count("+") > 2 for part in bare.split("|")):
        raise ValueError(f"its pattern {shown(pattern)} may take very long; GPT-OSS's repeats no group")


def wrap_tokenizer(tokenizer: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """A bare tokenizer with the names that transformers and `Wrapper` need."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
