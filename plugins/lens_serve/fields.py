"""The fields of OpenAI's image requests, validated: what to draw, and how to answer.

Fields of a form come as text. A field that OpenAI's API has and that means nothing here is accepted and ignored where a
client cannot do without it (`NO_EFFECT`), and refused otherwise; so is a field that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from attrs import evolve, frozen

from lens_core.inference.requests import GenerateRequest
from lens_core.io import readers
from lens_core.types import did_you_mean
from lens_serve.errors import ApiError, bad_request
from lens_serve.jobs import ImageRequest

MAX_PARTIAL_IMAGES = 3  # OpenAI's
SHOWN = 80
FORMATS = ("png", "jpeg", "webp")
NO_EFFECT: Mapping[str, tuple[str, ...]] = {
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "style": ("vivid", "natural"),
    "moderation": ("auto", "low"),
    "input_fidelity": ("low", "high"),
    "user": (),  # any text
    "safety_identifier": (),
}
"""Fields that change nothing, with their values."""
UNSUPPORTED = ("svg", "markup", "frame_count", "frame_duration_ms", "complexity", "effort", "reasoning")
"""Fields of OpenAI's API that are refused by name."""


@frozen(kw_only=True)
class AnswerOptions:
    """How the pictures are sent back."""

    url: bool = False  # an address in the outputs folder, not base64
    format: str = "png"
    compression: int | None = None  # 0 to 100, of jpeg and webp
    stream: bool = False
    partial_images: int = 0


@frozen(kw_only=True)
class Parsed:
    """A request's fields: `draw` without its pictures, and the answer. `size` is (height, width), None for `auto`."""

    draw: ImageRequest
    answer: AnswerOptions
    size: tuple[int, int] | None
    strength: float | None


Reader = Callable[[str, Any], Any]


def parse(fields: Mapping[str, Any], model: str, *, edit: bool = False) -> Parsed:
    """The fields of a request as JSON or a form has them. Raises ApiError for the first that is wrong.

    `model`: the name of the one that is served. `edit`: the request is a form, and has a picture.
    """
    present = {n: _from_text(n, v) if edit else v for n, v in fields.items() if v is not None}
    for name in present:
        _check_known(name, edit)
    values = {name: READERS[name](name, present[name]) for name in READERS if name in present}
    if "prompt" not in values:
        raise bad_request("the field 'prompt' is missing", "prompt", "missing_required_parameter")
    if values.get("model", model) not in (model, ""):
        named = readers.shown(values["model"], SHOWN)
        raise ApiError(404, f"the model {named} is not served here; this is {model!r}", "model_not_found", "model")
    for name, allowed in NO_EFFECT.items():
        if name in present:
            _choice(*allowed)(name, present[name]) if allowed else _text(name, present[name])
    return _assembled(values)


def _assembled(values: Mapping[str, Any]) -> Parsed:
    size = values.get("size")
    answer = AnswerOptions(
        url=values.get("response_format") == "url",
        format=values.get("output_format", "png"),
        compression=values.get("output_compression"),
        stream=values.get("stream", False),
        partial_images=values.get("partial_images", 0),
    )
    if answer.partial_images and not answer.stream:
        raise bad_request("partial_images has no effect without stream; set stream to true", "partial_images")
    if answer.url and answer.stream:  # OpenAI's events have no address, and its client reads none
        raise bad_request(
            "response_format url cannot be streamed; use b64_json, or leave stream out",
            "response_format", "unsupported_value",
        )  # fmt: skip
    if answer.compression is not None and answer.format == "png":
        raise bad_request("output_compression has no effect on png; set output_format", "output_compression")
    settings = GenerateRequest(
        negative_prompt=values.get("negative_prompt") or None, guidance_scale=values.get("guidance_scale")
    )
    settings = evolve(settings, height=size[0], width=size[1]) if size else settings
    draw = ImageRequest(
        prompt=values["prompt"],
        settings=evolve(settings, steps=values.get("steps")),
        num_images=values.get("n", 1),
        seed=values.get("seed"),
        sampler=values.get("sampler"),
        loras=tuple(values.get("loras", {}).items()),
        previews=answer.partial_images,
    )
    return Parsed(draw=draw, answer=answer, size=size, strength=values.get("strength"))


def _check_known(name: str, edit: bool) -> None:
    known = [*READERS, *NO_EFFECT]
    if name in UNSUPPORTED:
        raise bad_request(
            f"the field '{name}' is not supported by this server; leave it out", name, "unsupported_parameter"
        )
    if name not in known:
        hint = did_you_mean(name[:SHOWN], known)
        hint = hint if hint.startswith(" Did") else ""
        raise bad_request(f"unknown field: {readers.shown(name, SHOWN)}.{hint}", name[:SHOWN], "unknown_parameter")
    if name == "strength" and not edit:
        raise bad_request("strength needs a picture; use /v1/images/edits", name)


def _from_text(name: str, value: Any) -> Any:
    """A form's text as JSON would have it, where the field is no text; what cannot be is left to the field's reader."""
    if isinstance(value, dict):
        return {key: _from_text(name, item) for key, item in value.items()}
    if name in ("stream",):
        return {"true": True, "false": False}.get(value.lower(), value)
    if name in ("n", "seed", "steps", "partial_images", "output_compression") and re.fullmatch(r"-?[0-9]{1,19}", value):
        return int(value)
    if name in ("guidance_scale", "strength", "loras") and re.fullmatch(r"[-+0-9.eE]{1,32}", value):
        with suppress(ValueError):
            return float(value)
    return value


# ---- readers ------------------------------------------------------------------------------------------------------


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_request(f"{name} must be a text, not {readers.shown(value, SHOWN)}", name, "invalid_type")
    return value


def _whole(low: int, high: int) -> Reader:
    return _number((int,), "a whole number", (low, high), f"{low} to {high}")


def _real(low: float, high: float) -> Reader:
    read = _number((int, float), "a number", (low, high), f"{low:g} to {high:g}")
    return lambda name, value: float(read(name, value))


def _number(types: tuple[type[int] | type[float], ...], kind: str, bounds: tuple[float, float], wording: str) -> Reader:
    def read(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, types):
            raise bad_request(f"{name} must be {kind}, not {readers.shown(value, SHOWN)}", name, "invalid_type")
        if not bounds[0] <= value <= bounds[1]:  # false of NaN as well
            raise bad_request(f"{name} must be {wording}, not {readers.shown(value, SHOWN)}", name)
        return value

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false, not {readers.shown(value, SHOWN)}", name, "invalid_type")
    return value


def _choice(*words: str) -> Reader:
    def read(name: str, value: Any) -> str:
        if value not in words:
            what = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
            raise bad_request(f"{name} must be {what}, not {readers.shown(value, SHOWN)}", name)
        return str(value)

    return read


def _size(name: str, value: Any) -> tuple[int, int] | None:
    """WIDTHxHEIGHT -> (height, width); `auto` -> None."""
    if value == "auto":
        return None
    parts = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value) if isinstance(value, str) else None
    if parts is None:
        shown = readers.shown(value, SHOWN)
        raise bad_request(f"size must be WIDTHxHEIGHT in px, as in 1024x768, or auto, not {shown}", name)
    return int(parts[2]), int(parts[1])


def _loras(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 16:
        raise bad_request('loras must be an object of at most 16 names and weights, as in {"name": 0.8}', name)
    return {key: _real(-100, 100)(f"loras.{key[:SHOWN]}", weight) for key, weight in value.items()}


READERS: Mapping[str, Reader] = {
    "model": _text,
    "prompt": _text,
    "n": _whole(1, 2**31 - 1),
    "size": _size,
    "response_format": _choice("b64_json", "url"),
    "output_format": _choice(*FORMATS),
    "output_compression": _whole(0, 100),
    "background": _choice("auto", "opaque"),
    "stream": _flag,
    "partial_images": _whole(0, MAX_PARTIAL_IMAGES),
    # not OpenAI's:
    "negative_prompt": _text,
    "steps": _whole(1, 2**16),
    "guidance_scale": _real(-(2**16), 2**16),
    "seed": _whole(0, 2**63 - 1),
    "sampler": _text,
    "strength": _real(0, 1),
    "loras": _loras,
}
