"""JSON as language models write it: found in an answer, without half characters, and compared with a schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lens_core.io.redaction import replace_surrogates


def clean(value: Any) -> Any:
    """What JSON can hold, with `replace_surrogates` of its strings."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, dict):
        return {replace_surrogates(k): clean(v) for k, v in value.items()}
    return value


def parse(text: str) -> Any:
    """JSON, and nothing that only Python takes for it. ValueError where it is none, or nested too deeply."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(text: str) -> Any:
    """The JSON in a model's answer: all of it, or what stands after its thoughts, in a fence, or between braces."""
    try:
        return parse(text.strip().removeprefix("\ufeff"))
    except ValueError as error:
        first = error
    said = text.rpartition("</think>")[2]  # some templates open the thoughts themselves, so the answer only ends them
    fences = said.split("```")[1::2]
    inner = [f.partition("\n")[2] if "\n" in f else f for f in reversed(fences)]
    bare = [said[said.index("{") : said.rindex("}") + 1]] if "{" in said and "}" in said else []
    for part in (said, *inner[:8], *bare):
        try:
            return parse(part.strip())
        except ValueError:
            continue
    raise first


_KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)
}  # fmt: skip


def unfit(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """The first place where `value` does not fit `schema`, or None. Knows type, enum, properties, required,
    additionalProperties: false, and items: what strict answers are made of."""
    kind = schema.get("type")
    if kind is not None:
        wrong = not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            return f"{path} must be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{path}.{name} is missing"
        for name, inner in value.items():
            if name in known:
                flaw = unfit(inner, known[name], f"{path}.{name}")
                if flaw:
                    return flaw
            elif schema.get("additionalProperties") is False:
                return f"{path} has the unknown field {json.dumps(name[:60])}"
    if isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            flaw = unfit(inner, schema["items"], f"{path}[{index}]")
            if flaw:
                return flaw
    return None
