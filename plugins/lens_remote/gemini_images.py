"""The generator `gemini_images`: models of Google's that answer with pictures (Nano Banana), by `generateContent`.

Refusals come with status 200 in several forms: a reason why the prompt was blocked, a reason why the model stopped, or
words instead of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from attrs import field, frozen

from lens_core.config import SECRET
from lens_core.io.api_keys import A_NAME
from lens_core.types import PictureRequest
from lens_core.validators import matching, one_of, optional
from lens_remote.answers import Codes, Drawn, Failure, after_error, failure_of_error, lost, whole_numbers
from lens_remote.config import RemoteConfig
from lens_remote.generator import RemoteGenerator
from lens_remote.protocol import Call, error_object, with_request

REFUSED = frozenset({
    "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION", "NO_IMAGE",
})  # fmt: skip
"""Reasons to stop that are refusals."""
ENDED = frozenset({"", "STOP", "FINISH_REASON_UNSPECIFIED"})
SEEDS = 2**31  # the API's seeds are int32
ASPECT_RATIO = matching(r"[1-9][0-9]?:[1-9][0-9]?", "WIDTH:HEIGHT, as in 16:9")


class GeminiImages(RemoteGenerator):
    """Draw with Google's Gemini image API.

    Pictures by POST {base_url}/models/{model}:generateContent, one a request. The size of a picture's request is not
    used: the API takes an aspect ratio and a class of sizes.
    """

    @frozen(kw_only=True)
    class Config(RemoteConfig):
        key_env: str = field(default="GEMINI_API_KEY", metadata={SECRET: A_NAME})  # the NAME of the key's variable
        aspect_ratio: str = field(default="1:1", validator=ASPECT_RATIO)  # width:height
        # The class of sizes; None for models that take none.
        image_size: str | None = field(default="1K", validator=optional(one_of("1K", "2K", "4K")))
        send_seed: bool = True  # the seed of a picture's request, modulo 2^31

    base_url = "https://generativelanguage.googleapis.com/v1beta"
    seeded = True
    codes = Codes(
        refusal=r"^(IMAGE_)?(SAFETY|PROHIBITED_CONTENT)$",
        fatal=r"API_KEY|UNAUTHENTICATED|PERMISSION_DENIED|NOT_FOUND|FAILED_PRECONDITION|BILLING|CONSUMER_|DISABLED"
        r"|ACCESS_TOKEN|QUOTA_OF_A_DAY|QUOTA_IS_ZERO",
        retry=r"RESOURCE_EXHAUSTED|RATE_LIMIT|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|CANCELLED|^UNKNOWN$",
        bad_request=r"INVALID_ARGUMENT|OUT_OF_RANGE|UNIMPLEMENTED",
    )

    def call(self, config: Config, request: PictureRequest) -> Call:
        image = {"aspectRatio": config.aspect_ratio} | ({"imageSize": config.image_size} if config.image_size else {})
        seed = request.seed % SEEDS if config.send_seed else None
        settings = {"responseModalities": ["IMAGE"], "imageConfig": image}
        body = {
            "contents": [{"role": "user", "parts": [{"text": request.prompt}]}],
            "generationConfig": settings | ({} if seed is None else {"seed": seed}),
        }
        model = quote(config.model.removeprefix("models/"), safe="/@:")
        return Call(f"/models/{model}:generateContent", with_request(body, config), seed)

    def headers(self, key: str) -> Mapping[str, str]:
        return {"x-goog-api-key": key}

    def error(self, data: Any) -> Mapping[str, Any]:
        """The error object, its code replaced by the reason in its details: a wrong key comes as INVALID_ARGUMENT, the
        quota of a day as RESOURCE_EXHAUSTED with a delay of seconds."""
        error = dict(error_object(data))
        details = error.get("details")
        for detail in details if isinstance(details, list) else ():
            if not isinstance(detail, dict):
                continue
            if isinstance(detail.get("reason"), str):
                error["code"] = detail["reason"]
            delay = re.fullmatch(r"([0-9]{1,9}(\.[0-9]+)?)s", str(detail.get("retryDelay", "")))
            if delay:
                error["wait"] = float(delay[1])
        for violation in _violations(details):
            if "PerDay" in str(violation.get("quotaId", "")):
                error["code"] = "QUOTA_OF_A_DAY"
            if str(violation.get("quotaValue")) == "0":
                error["code"] = "QUOTA_IS_ZERO"
        return error

    def read(self, data: Any) -> Drawn | Failure:
        if isinstance(data, list) and len(data) == 1:
            data = data[0]
        if not isinstance(data, dict):
            return lost("no_picture", "the answer is no JSON object; check base_url")
        usage = whole_numbers(data.get("usageMetadata"))
        failure = failure_of_error(self.error(data), self.codes) if data.get("error") else None
        if failure is not None:
            return after_error(failure, False, usage)
        feedback = data["promptFeedback"] if isinstance(data.get("promptFeedback"), dict) else {}
        blocked = feedback.get("blockReason")
        if isinstance(blocked, str) and blocked not in ("", "BLOCK_REASON_UNSPECIFIED"):
            words = str(feedback.get("blockReasonMessage") or "the prompt was blocked")
            return Failure("refusal", blocked[:80], words, usage=usage)
        candidates = _dicts(data.get("candidates"))
        parts = [p for c in candidates for p in _parts(c)]
        pictures = [p for p in map(_picture, parts) if p]
        if pictures:
            revision = data["modelVersion"] if isinstance(data.get("modelVersion"), str) else ""
            return Drawn(pictures[0], count=len(pictures), usage=usage, revision=revision)
        return _without_picture(candidates, parts, usage)


def _without_picture(
    candidates: list[dict[str, Any]], parts: list[dict[str, Any]], usage: Mapping[str, int]
) -> Failure:
    """Why an answer has no picture. It costs like one where the model has written tokens, or may have."""
    billed = bool(usage.get("candidatesTokenCount", 0)) if usage else True
    stops = [str(c.get("finishReason") or "") for c in candidates]
    message = next((m for c in candidates if isinstance(m := c.get("finishMessage"), str) and m), "")
    text = " ".join(p["text"] for p in parts if isinstance(p.get("text"), str)).strip()
    refused = next((s for s in stops if s in REFUSED), None)
    if refused is not None:
        return Failure("refusal", refused, message or text or "no picture", billed, usage=usage)
    other = next((s for s in stops if s not in ENDED), None)
    if other is not None:
        return lost(re.sub(r"\s+", "_", other)[:80], message or text or "the model stopped without a picture", usage)
    if text:
        return Failure("refusal", "text_instead_of_a_picture", text, billed, usage=usage)
    return lost("no_picture", "the answer has no picture", usage)


def _violations(details: Any) -> Iterator[dict[str, Any]]:
    for detail in _dicts(details):
        yield from _dicts(detail.get("violations"))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _parts(candidate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a candidate that are its answer; a model's thoughts may hold pictures too."""
    content = candidate.get("content")
    parts = _dicts(content.get("parts")) if isinstance(content, dict) else []
    return [p for p in parts if p.get("thought") is not True]


def _picture(part: Mapping[str, Any]) -> str:
    """The base64 of a part, "" where it has none."""
    data = part.get("inlineData") or part.get("inline_data")
    coded = data.get("data") if isinstance(data, dict) else None
    return coded if isinstance(coded, str) else ""
