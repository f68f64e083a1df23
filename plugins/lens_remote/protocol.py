"""What one API's protocol says for itself: where a request goes, what it holds, and what its answers mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from attrs import evolve, frozen

from lens_core.io.http import Answer
from lens_core.types import PictureRequest
from lens_remote import answers
from lens_remote.answers import Codes, Drawn, Failure
from lens_remote.config import RemoteConfig


@frozen
class Call:
    """A request without its key. The same call means the same picture, so it is what the ledger knows it by."""

    path: str  # below base_url
    body: Mapping[str, Any]
    seed: int | None  # that is in the body; None where the API takes none


class ImageProtocol(Protocol):
    """Implemented by the three generators' modules."""

    base_url: str  # the vendor's own
    codes: Codes

    def call(self, config: Any, request: PictureRequest) -> Call: ...

    def headers(self, key: str) -> Mapping[str, str]: ...

    def read(self, data: Any) -> Drawn | Failure:
        """The JSON of an answer with a status of 2xx."""

    def error(self, data: Any) -> Mapping[str, Any]:
        """The error object in the JSON of another answer; empty where there is none."""

    def hint(self, model: str) -> str:
        """What else to say where a model cannot be used; may be empty."""


def understand(answer: Answer, protocol: ImageProtocol) -> Drawn | Failure:
    """What an answer is: pictures, or a failure. Whatever a server sends, the worst is a failure of this request."""
    good = 200 <= answer.status < 300
    try:
        data = answers.parse(answer)
    except ValueError as error:
        if not good:
            return answers.failure_of_status(answer, {}, protocol.codes)
        if "html" in answer.content_type or answer.body.lstrip()[:1] == b"<":
            return Failure("fatal", "not_an_api", "a page instead of JSON; check base_url")
        return answers.lost("unreadable", f"the answer is not JSON ({error})")
    if not good:
        return answers.failure_of_status(answer, protocol.error(data), protocol.codes)
    result = protocol.read(data)
    if isinstance(result, Failure) and result.kind == "retry":
        return evolve(result, wait=max(result.wait, answers.wait_of(answer)))
    return result


def error_object(data: Any) -> Mapping[str, Any]:
    """{"error": {…}}, {"error": "words"} or the error itself."""
    if isinstance(data, list) and data:
        data = data[0]
    if not isinstance(data, dict):
        return {}
    items = data.get("data")
    if isinstance(items, list) and items and isinstance(items[0], dict) and "error" in items[0]:  # a stream's
        data = items[0]
    error = data.get("error", data)
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else {}


def with_request(body: Mapping[str, Any], config: RemoteConfig) -> dict[str, Any]:
    """The body with the config's further fields; null leaves a field out."""
    whole = {**body, **config.request}
    return {name: value for name, value in whole.items() if value is not None}
