"""Keep a key out of every text that leaves the process, in whatever spelling an endpoint or a library repeats it."""

from __future__ import annotations

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

MARK = "[key]"
LEAST = 8  # characters in a row that betray a part of a key; a shorter key is a placeholder, not a secret

# ASCII alone changes case here, so that a text keeps its length.
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_DOTS = re.compile(r"[*•·…]+|\.{3,}")  # what stands for the rest of a key: sk-ab****yz, sk-ab...yz
_ENDS = re.compile(r"""[\s"'<>()\[\]{},;*•·….]""")  # where a part beside it ends
REACH = 64  # characters beside dots that are looked at


def redact(text: str, secret: str | None) -> str:
    """`text` with the key, its encodings and every part of either that has 8 characters or more replaced by [key].

    Known are the key itself, quoted as Python or JSON write it, percent-encoded, as HTML, in hexadecimal and in base64
    at any offset, as in Basic authorization, in either case. A part that is shown beside dots or asterisks counts from
    3 characters on. A key of fewer than 8 characters is replaced where it stands as a whole word.
    """
    if not secret:
        return text
    if len(secret) < LEAST:
        return re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", MARK, text)
    pieces: list[str] = []
    kept = 0
    for start, end in _merged(sorted([*_parts(text, secret), *_shortened(text, secret)])):
        pieces += [text[kept:start], MARK]
        kept = end
    return "".join([*pieces, text[kept:]])


def redact_all(value: Any, secret: str | None) -> Any:
    """`redact` of every string in what JSON can hold. Only keys of 8 characters or more: an answer must stay whole."""
    if not secret or len(secret) < LEAST:
        return value
    if isinstance(value, str):
        return redact(value, secret)
    if isinstance(value, list):
        return [redact_all(v, secret) for v in value]
    if isinstance(value, dict):
        return {redact(k, secret): redact_all(v, secret) for k, v in value.items()}
    return value


def holds(text: str, secret: str) -> bool:
    """Whether a part of a key of 8 characters or more stands in `text`, in any spelling that `redact` knows."""
    return len(secret) >= LEAST and redact(text, secret) != text


def replace_surrogates(text: str) -> str:
    """Text in which half characters (lone surrogates), which no file can hold, are replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def redacted_line(words: str, secret: str | None, most: int = 300) -> str:
    """What a server says as one line of at most `most` characters, without the key."""
    line = " ".join(redact(replace_surrogates(words[:4000]), secret).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _parts(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Where 8 characters of a form of the key stand."""
    parts = {form[i : i + LEAST] for form in _forms(secret) for i in range(len(form) - LEAST + 1)}
    lower = text.translate(_LOWER)
    return ((i, i + LEAST) for i in range(len(lower) - LEAST + 1) if lower[i : i + LEAST] in parts)


def _shortened(text: str, secret: str) -> Iterator[tuple[int, int]]:
    """Where the key stands with dots for a part of it."""
    for dots in _DOTS.finditer(text):
        head = _ENDS.split(text[max(0, dots.start() - REACH) : dots.start()])[-1]
        tail = _ENDS.split(text[dots.end() : dots.end() + REACH])[0]
        before = len(head) >= 3 and head[-3:] in secret
        after = len(tail) >= 3 and secret.endswith(tail)
        if before or after:
            yield dots.start() - len(head) * before, dots.end() + len(tail) * (after or tail in secret)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _forms(secret: str) -> Iterator[str]:
    raw = secret.encode()
    plain = [
        secret,
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
        html.escape(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        "".join(f"%{b:02x}" for b in raw),
        "".join(f"\\u{b:04x}" for b in raw),
        "".join(f"\\x{b:02x}" for b in raw),
        raw.hex(),
    ]
    for shift in range(3):  # three bytes are four characters: the key's place in what was encoded shifts them
        coded = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
        inner = coded[(0, 2, 3)[shift] : len(coded) - bool((len(raw) + shift) % 3)]  # without what neighbours decide
        plain += [inner, inner.replace("+", "-").replace("/", "_")]
    for form in plain:
        yield form.translate(_LOWER)
