"""An answer without what models put around it: thoughts, fences, quotes, preambles, labels, second versions."""

from __future__ import annotations

import json
import re

_THOUGHT = re.compile(r"(?is)<(think|thinking|reasoning|analysis|thought)>.*?</\1>")
_OPEN_THOUGHT = re.compile(r"(?is)<(think|thinking|reasoning|analysis|thought)>.*\Z")
_CLOSED_THOUGHT = re.compile(r"(?is)\A.*</(?:think|thinking|reasoning|analysis|thought)>")
_FENCE = re.compile(r"(?s)```[^\n`]*\n(.*?)\n?[ \t]*```")
_TAGS = re.compile(r"(?is)\A\s*<(request|prompt|answer|output|result|description)>(.*?)</\1>\s*\Z")
_LABEL = (
    r"(?:(?:final|refined|rewritten|revised|improved|detailed|enhanced|image|new)\s+)*"
    r"(?:prompt|description|caption|answer|output|version|rewrite)(?:\s+(?:a|1|one|#1))?"
)
_PREAMBLES = tuple(
    re.compile(pattern)
    for pattern in (
        # "Sure! Here is the refined prompt:", "Voici une description :", "Hier ist die Beschreibung:", "Aquí tienes …:"
        r"(?i)\A\s*(?:(?:sure|certainly|of course|absolutely|okay|ok|great|yes)\b[^\n:]{0,40}?[!,.:]\s*)?"
        r"(?:here(?:'s| is| are| you go)|below is|this is)\b[^\n:]{0,80}:\s*",
        r"(?i)\A\s*(?:bien sûr|d'accord)?[!,. ]*voici\b[^\n:]{0,80}:\s*",
        r"(?i)\A\s*(?:gerne|natürlich)?[!,. ]*hier (?:ist|sind|kommt)\b[^\n:]{0,80}:\s*",
        r"(?i)\A\s*(?:claro|por supuesto)?[!,. ]*aquí (?:está|tienes|va)\b[^\n:]{0,80}:\s*",
        r"(?i)\A\s*(?:sure|certainly|of course|absolutely)\s*[!,.:]\s*",
        rf"(?i)\A\s*(?:[#*_>]+\s*)*{_LABEL}\s*(?:\*\*|__)?\s*:\s*(?:\*\*|__)?\s*",
    )
)
_AFTERWORDS = re.compile(
    r"(?is)\n\s*(?:[-*_]{3,}\s*\n.*|(?:let me know|i hope|feel free|would you like|note\b|explanation\b|"
    r"if you(?:'d| would) like|do you want|this (?:prompt|description) (?:is|keeps|captures))\b.*)\Z"
)
_SECOND = re.compile(
    r"(?is)\n\s*(?:[#*_>-]+\s*)*(?:or|alternatively|alternative(?:\s+\w+)?|another (?:option|version)|"
    r"(?:option|version|prompt|variant|variation)\s*(?:b|2|two|#2)|2[.)])\s*(?:\*\*|__)?\s*(?::|\n|\s).*\Z"
)
_FIRST = re.compile(r"(?i)\A\s*(?:[#*_>-]+\s*)*(?:(?:option|version|prompt|variant|variation)\s*(?:a|1|one|#1)|1[.)])"
                    r"\s*(?:\*\*|__)?\s*[:.)]?\s*(?:\*\*|__)?\s*")  # fmt: skip
_QUOTES = ('""', "''", "“”", "„“", "«»", "‘’", "``", "「」", "『』")
_KEYS = ("prompt", "refined_prompt", "description", "caption", "output", "answer", "text")


def clean(answer: str) -> str:
    """The prompt in an answer, as one paragraph."""
    text = _THOUGHT.sub("", answer)
    text = _OPEN_THOUGHT.sub("", _CLOSED_THOUGHT.sub("", text))
    for _ in range(4):  # a label in a fence in quotes: each layer hides the next
        before, text = text, _peeled(text.strip())
        if text == before:
            break
    return " ".join(text.replace("**", "").split())


def _peeled(text: str) -> str:
    fence = _FENCE.search(text)
    if fence is not None and fence.group(1).strip():
        text = fence.group(1)
    tags = _TAGS.match(text)
    text = tags.group(2) if tags is not None else text
    text = _of_json(text)
    for preamble in _PREAMBLES:
        text = preamble.sub("", text, count=1)
    second = _SECOND.search(text)
    if second is not None and text[: second.start()].strip():
        text = text[: second.start()]
        text = _FIRST.sub("", text, count=1)
    elif _FIRST.match(text) and text.lstrip()[:1] != "1":
        text = _FIRST.sub("", text, count=1)
    shorter = _AFTERWORDS.sub("", text)
    return _unquoted((shorter if shorter.strip() else text).strip())


def _of_json(text: str) -> str:
    """The one text in a small JSON object, under a name that says that it is the prompt."""
    if not text.lstrip().startswith("{") or len(text) > 100_000:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    texts = [value[key] for key in _KEYS if isinstance(value, dict) and isinstance(value.get(key), str)]
    return texts[0] if len(texts) == 1 else text


def _unquoted(text: str) -> str:
    """Without a pair of quotation marks around all of it; those of words inside stay."""
    for left, right in _QUOTES:
        if len(text) > 2 and text.startswith(left) and text.endswith(right):
            inner = text[1:-1]
            if left not in inner and right not in inner:
                return inner if " " in inner.strip() else text  # "CAT" alone is a word to be drawn
            before, _, _ = inner.partition(left)
            # The first mark inside opens another pair: `"a sign that says "OPEN""`, and not `"CAT" above "DOG"`.
            if right not in before.replace(left, "") and before[-1:] in ("", " ", "(", ":"):
                return inner
    return text
