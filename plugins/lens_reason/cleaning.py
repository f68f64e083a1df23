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
_OBEYING = r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|yes)\b[^\n:]{0,40}?[!,.:]\s*)?"
_END = r"[^\n:]{0,40}:\s*"
_PARAGRAPH = r"[^\n:]{0,80}:[ \t]*\n\s*\n\s*"  # whatever is introduced, it stands apart
# A preamble says what follows it: a prompt, a description. "This is a sign that reads: …" is the picture itself.
_PREAMBLES = tuple(
    re.compile(rf"(?i)\A\s*{pattern}")
    for pattern in (
        # "Sure! Here is the refined prompt:", "Voici une description :", "Hier ist die Beschreibung:", "Aquí tienes:"
        rf"{_OBEYING}(?:here(?:['’]s| is| are)|below is)\s+(?:[\w-]+\s+){{0,4}}"
        rf"(?:prompts?|descriptions?|captions?|versions?|rewrite|request|text|result)\b{_END}",
        rf"{_OBEYING}this is\s+(?:[\w-]+\s+){{0,4}}(?:prompt|description|caption|rewrite)\b{_END}",
        rf"{_OBEYING}here (?:you go|it is)\b{_END}",
        rf"{_OBEYING}(?:here(?:['’]s| is| are)|below is)\b{_PARAGRAPH}",
        rf"(?:bien sûr|d'accord)?[!,. ]*voici\s+(?:[\w'-]+\s+){{0,3}}"
        rf"(?:prompt|description|invite|version|légende|texte|résultat)\b{_END}",
        rf"(?:bien sûr|d'accord)?[!,. ]*voici(?:\s*:\s*|\b{_PARAGRAPH})",
        rf"(?:gerne|natürlich)?[!,. ]*hier (?:ist|sind|kommt)\s+(?:[\w-]+\s+){{0,3}}"
        rf"(?:prompt|(?:bild)?beschreibung|fassung|version|text)\b{_END}",
        rf"(?:gerne|natürlich)?[!,. ]*hier (?:ist|sind|kommt)\b{_PARAGRAPH}",
        rf"(?:claro|por supuesto)?[!,. ]*aquí (?:está|tienes|va)\s+(?:[\w-]+\s+){{0,3}}"
        rf"(?:prompt|descripción|versión|texto)\b{_END}",
        rf"(?:claro|por supuesto)?[!,. ]*aquí (?:está|tienes|va)(?:\s*:\s*|\b{_PARAGRAPH})",
        r"(?:sure|certainly|of course|absolutely)\s*[!,.:]\s*",
        rf"(?:[#*_>]+\s*)*{_LABEL}\s*(?:\*\*|__)?\s*:\s*(?:\*\*|__)?\s*",
    )
)
_TO_THE_USER = (
    r"(?:[#*_>]+\s*)*(?:let me know|i hope|feel free|would you like|do you want|if you(?:'d| would) like|note that\b|"
    r"(?:notes?|explanation(?: of [\w ]{1,30})?|rationale|why this works|(?:key |main )?changes(?: made)?)\s*[*_]*\s*:|"
    r"this (?:prompt|description) (?:is|keeps|captures)\b)"
)
_AFTERWORDS = re.compile(rf"(?i)(\n\s*(?:[-*_]{{3,}}\s*\n\s*)?){_TO_THE_USER}")
_ONE_LINE = re.compile(r"[^\n]*(?:\n\s*(?:[-*•]|\d+[.)])[^\n]*)*\s*")  # and a list under it
_RULE = re.compile(r"(?m)^[ \t]*[-*_]{3,}[ \t]*$")  # a line that only divides
_SECOND = re.compile(
    r"(?is)(\n\s*)(?:[#*_>-]+\s*)*(?:or\s*:|(?:or(?=\s*\n)|alternatively|alternative(?:\s+\w+)?|"
    r"another (?:option|version)|(?:option|version|prompt|variant|variation)\s*(?:b|2|two|#2))"
    r"\s*(?:\*\*|__)?\s*(?::|\n|\s)).*\Z"
)
_NUMBERED = re.compile(r"(?s)\A\s*(?:[#*_>-]+\s*)*1[.)]\s*(.+?)\n\s*(?:[#*_>-]+\s*)*2[.)]\s")
LONG = 25
"""Words of the first item of a numbered list from which on the items are taken for versions of the prompt. Shorter ones
are things in one picture, as the panels of a comic are."""
_PANEL = re.compile(r"(?i)\bpanels?\b")
_FIRST = re.compile(r"(?i)\A\s*(?:[#*_>-]+\s*)*(?:(?:option|version|prompt|variant|variation)\s*(?:a|1|one|#1)|1[.)])"
                    r"\s*(?:\*\*|__)?\s*[:.)]?\s*(?:\*\*|__)?\s*")  # fmt: skip
_ENDS = ".!?…。！？)]\"'”’»」*_`"
"""What a sentence ends with."""
_QUOTES = [(pair[0], pair[1]) for pair in ('""', "''", "“”", "„“", "«»", "‘’", "``", "「」", "『』")]
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
        before, after = text[: fence.start()].rstrip(), text[fence.end() :].lstrip()
        part = (before and before[-1] not in f"{_ENDS}:") or after[:1].islower()  # of a sentence: a screen's text
        text = _FENCE.sub(r"\1", text) if part else fence.group(1)
    tags = _TAGS.match(text)
    text = tags.group(2) if tags is not None else text
    text = _of_json(text)
    for preamble in _PREAMBLES:
        text = preamble.sub("", text, count=1)
    numbered = _NUMBERED.match(text)
    if numbered is not None and len(numbered.group(1).split()) >= LONG and not _PANEL.search(numbered.group(1)):
        text = numbered.group(1)
    second, first = _SECOND.search(text), _FIRST.match(text)
    if second is not None and text[: second.start()].strip() and (first or _is_apart(text, second)):
        text = text[: second.start()]
        text = _FIRST.sub("", text, count=1)
    elif first and text.lstrip()[:1] != "1":
        text = _FIRST.sub("", text, count=1)
    return _unquoted(_RULE.sub("", _without_afterwords(text)).strip())


def _is_apart(text: str, mark: re.Match[str]) -> bool:
    """Whether what is above a mark is complete, so that no word of the picture is cut off: a sentence or, before an
    empty line, whatever does not lead on to it."""
    before = text[: mark.start()].rstrip()
    return before[-1:] not in (",", ":") if mark[1].count("\n") > 1 else before[-1:] in tuple(_ENDS)


def _without_afterwords(text: str) -> str:
    """Without what is said to the user below the prompt. A line like it within the prompt is an inscription."""
    for mark in _AFTERWORDS.finditer(text):
        paragraph = mark[1].count("\n") > 1
        below = text[mark.end(1) :]
        if text[: mark.start()].strip() and _is_apart(text, mark) and (paragraph or _ONE_LINE.fullmatch(below)):
            return text[: mark.start()]
    return text


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
