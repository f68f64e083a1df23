"""Request bodies, read with a bound while they come in: JSON, and forms with pictures.

Memory: a JSON body is held whole, a form's files go to unnamed temporary files above 1 MiB. What is beyond the bound is
answered at once and never kept. An upload's own name is not used for anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from attrs import field, frozen
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lens_core.io import readers
from lens_core.validators import integer, real
from lens_serve.errors import ApiError, bad_request

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every byte of a stranger's broken form
FIELDS = 64  # of one form
FILES = 16


@frozen(kw_only=True)
class BodyLimits:
    """The most that is read of one request, and how many are read at once."""

    max_json: int = field(default=2**20, validator=integer(at_least=1024))  # bytes
    max_upload: int = field(default=32 * 2**20, validator=integer(at_least=1024))  # bytes of a form
    max_upload_pixels: int = field(default=4096 * 4096, validator=integer(at_least=1))  # of one picture
    seconds: float = field(default=60.0, validator=real(above=0))  # in which a body must have come
    uploads: int = field(default=16, validator=integer(at_least=1))  # forms that are read at once
    decoding: int = field(default=2, validator=integer(at_least=1))  # whose pictures are in memory at once


class BodyReader:
    """Reads the bodies of requests within limits."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self._uploads = asyncio.Semaphore(limits.uploads)
        self.decoding = asyncio.Semaphore(limits.decoding)  # held by whoever reads the files of a form

    async def json(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request. Raises ApiError."""
        _check_type(request, "application/json")
        body = bytearray()
        async with self._deadline():
            async for chunk in _bounded(request, self.limits.max_json):
                body += chunk
        try:
            data = readers.parse_json(bytes(body))
        except ValueError as error:
            raise bad_request(f"the body is not valid JSON: {readers.one_line(error)}", code="invalid_json") from error
        if not isinstance(data, dict):
            raise bad_request(f"the body must be a JSON object, not {readers.shown(data, 80)}", code="invalid_json")
        return data

    @contextlib.asynccontextmanager
    async def form(self, request: Request) -> AsyncIterator[tuple[dict[str, Any], dict[str, list[UploadFile]]]]:
        """(fields, files by field) of a multipart form; its files are gone when the context ends. Raises ApiError."""
        _check_type(request, "multipart/form-data")
        async with self._uploads:
            stream = _bounded(request, self.limits.max_upload)
            parser = MultiPartParser(
                request.headers, stream, max_files=FILES, max_fields=FIELDS, max_part_size=self.limits.max_json
            )
            try:
                async with self._deadline():
                    form = await parser.parse()
            except (MultiPartException, UnicodeDecodeError) as error:
                message = getattr(error, "message", None) or "a field is not text"
                raise bad_request(f"the form cannot be read: {message}", code="invalid_form") from error
            try:
                fields: dict[str, Any] = {}
                files: dict[str, list[UploadFile]] = {}
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        files.setdefault(name.removesuffix("[]"), []).append(value)
                    else:
                        _add_field(fields, name, value)
                yield fields, files
            finally:
                await form.close()

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {self.limits.seconds:g} s", "request_timeout") from error


def _add_field(fields: dict[str, Any], name: str, value: str) -> None:
    """Put a form's field where JSON would have it: `loras[name]` is an item of `loras`."""
    try:
        readers.check_text(value)
    except ValueError as error:
        raise bad_request(f"{name[:80]} {error}", name[:80]) from error
    outer, bracket, inner = name.partition("[")
    if bracket and inner.endswith("]") and isinstance(fields.get(outer, {}), dict):
        fields.setdefault(outer, {})[inner[:-1]] = value
    elif name in fields:
        raise bad_request(f"the field {readers.shown(name, 80)} stands twice", name[:80])
    else:
        fields[name] = value


def _check_type(request: Request, expected: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != expected:
        shown = readers.shown(kind, 80)
        raise ApiError(415, f"the body must be {expected}, not {shown}; set Content-Type", "unsupported_media_type")


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces. Raises ApiError as soon as it is known to have more than `most` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        yield chunk


def _too_large(most: int) -> ApiError:
    size = f"{most >> 20} MiB" if most >= 2**20 else f"{most >> 10} KiB"
    return ApiError(413, f"the body is larger than {size}, the most that this server reads", "request_too_large")
