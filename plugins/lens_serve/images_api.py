"""OpenAI's image API over the engine: generations, edits, and their streams of partial pictures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lens_core.types import ConfigError, LensError, RefusedError
from lens_serve import pictures
from lens_serve.bodies import BodyReader
from lens_serve.engine import Engine
from lens_serve.errors import ApiError, bad_request
from lens_serve.fields import READERS, AnswerOptions, Parsed, parse
from lens_serve.jobs import LAST, Busy, Done, DrawnImage, Event, Failed, ImageRequest, Job, Step, Stopping
from lens_serve.metrics import Metrics
from lens_serve.outputs import Outputs

KEEP_ALIVE = 15.0  # seconds after which a stream without an event sends a comment
CLIENT_GONE = 499  # nginx's; nobody reads it but the metrics
RENAMED = {"num_images": "n", "num_inference_steps": "steps"}  # our words -> the API's
FIELD_OF = {"height": "size", "width": "size", "a picture of": "size", "no sampler": "sampler", "no LoRA": "loras"}
"""How a message of the engine begins -> the API's field that it is about, where it does not begin with that."""


class ImagesApi:
    """The routes below /v1."""

    def __init__(self, engine: Engine, bodies: BodyReader, outputs: Outputs | None, metrics: Metrics) -> None:
        self._engine, self._bodies, self._outputs, self._metrics = engine, bodies, outputs, metrics
        self._created = int(time.time())

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._engine.name:
            raise ApiError(404, f"the model {name[:80]!r} is not served here", "model_not_found", "model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._engine.name, "object": "model", "created": self._created, "owned_by": "lens"}

    async def generations(self, request: Request) -> Response:
        parsed = self._parsed(await self._bodies.json(request))
        return await self._answer(request, parsed.draw, parsed.answer, "image_generation")

    async def edits(self, request: Request) -> Response:
        async with self._bodies.form(request) as (fields, uploads):
            parsed = self._parsed(fields, edit=True)
            async with self._bodies.decoding:
                files = {name: [await upload.read() for upload in some] for name, some in uploads.items()}
                most = self._bodies.limits.max_upload_pixels
                draw = await asyncio.to_thread(pictures.edit_request, parsed, files, self._engine.grid, most)
        return await self._answer(request, draw, parsed.answer, "image_edit")

    def _parsed(self, fields: Mapping[str, Any], *, edit: bool = False) -> Parsed:
        parsed = parse(fields, self._engine.name, edit=edit)
        if parsed.answer.url and self._outputs is None:
            raise bad_request(
                "response_format url needs an outputs folder, which this server was started without; use b64_json",
                "response_format", "unsupported_value",
            )  # fmt: skip
        return parsed

    async def _answer(self, request: Request, draw: ImageRequest, answer: AnswerOptions, kind: str) -> Response:
        """The pictures of a request, at once or as a stream. When the client leaves, the job is cancelled."""
        job = await self._submit(draw)
        if answer.stream:
            return JobStream(job, self._stream(job, answer, kind))
        final = asyncio.ensure_future(_last(job))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({final, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not final.done():
                return Response(status_code=CLIENT_GONE)
            images = _images(final.result())
        finally:
            final.cancel()
            gone.cancel()
            job.cancel()  # unless it is finished
        self._metrics.observe(time.monotonic() - job.created)
        base = str(request.base_url)
        body = await asyncio.to_thread(lambda: json.dumps(self._body(job, images, answer, base)).encode())
        return Response(body, media_type="application/json", headers={"x-request-id": job.id})

    async def _submit(self, draw: ImageRequest) -> Job:
        try:
            # In a thread: an init image is resized to check it, which takes milliseconds.
            return await asyncio.to_thread(self._engine.submit, draw)
        except Stopping as error:
            raise ApiError(503, str(error), "server_stopping", retry_after=error.retry_after) from error
        except Busy as error:
            raise ApiError(429, str(error), "rate_limit_exceeded", retry_after=error.retry_after) from error
        except ConfigError as error:
            raise _refusal(error) from error

    # ---- answers ------------------------------------------------------------------------------------------------

    def _body(self, job: Job, images: tuple[DrawnImage, ...], answer: AnswerOptions, base: str) -> dict[str, Any]:
        return {
            "created": int(time.time()),
            "data": [self._item(job, index, drawn, answer, base) for index, drawn in enumerate(images)],
            **_about(job, answer),
            "usage": _usage(job, len(images)),
        }

    def _item(self, job: Job, index: int, drawn: DrawnImage, answer: AnswerOptions, base: str = "") -> dict[str, Any]:
        """One picture of an answer; it is written into the outputs folder, where there is one. `base`: the address of
        this server, for an answer that is no stream."""
        item: dict[str, Any] = {"seed": drawn.seed}
        if "requested_prompt" in drawn.facts:
            item["revised_prompt"] = drawn.facts["prompt"]
        name = self._outputs.save(drawn.image, job.id, index, drawn.facts) if self._outputs is not None else ""
        if not answer.url:
            item["b64_json"] = pictures.as_base64(pictures.encoded(drawn.image, answer, drawn.facts))
            return item
        assert self._outputs is not None  # or `_parsed` had refused the request
        if answer.format != "png":
            name = self._outputs.add(name, answer.format, pictures.encoded(drawn.image, answer))
        item["url"] = f"{base}outputs/{name}"
        return item

    async def _stream(self, job: Job, answer: AnswerOptions, kind: str) -> AsyncIterator[str]:
        """Server-sent events, as OpenAI's client reads them."""
        sent = dict.fromkeys(range(len(job.seeds)), 0)
        async for event in _events(job):
            if event is None:
                yield ": drawing\n\n"
            elif isinstance(event, Step):
                for index, image in zip(event.indices, event.images, strict=False):
                    data = await asyncio.to_thread(pictures.encoded, image, answer)
                    partial = {"b64_json": pictures.as_base64(data), "partial_image_index": sent[index]}
                    sent[index] += 1
                    yield _sse(f"{kind}.partial_image", partial | _about_event(job, index, answer))
            elif isinstance(event, Done):
                self._metrics.observe(time.monotonic() - job.created)
                for index, drawn in enumerate(event.images):
                    try:
                        item = await asyncio.to_thread(self._item, job, index, drawn, answer)
                    except LensError as error:  # a full disk, say
                        yield _sse("error", ApiError(500, str(error), "internal_error").body())
                        return
                    item |= _about_event(job, index, answer) | {"usage": _usage(job, 1)}
                    yield _sse(f"{kind}.completed", item)
            elif isinstance(event, LAST):
                yield _sse("error", _error(event).body())


class JobStream(StreamingResponse):
    """A stream of a job's events. However it ends, the job ends with it."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "x-request-id": job.id}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


# ---- jobs and the event loop --------------------------------------------------------------------------------------


async def _events(job: Job) -> AsyncIterator[Event | None]:
    """The events of a job up to the last; None after each `KEEP_ALIVE` seconds without one."""
    loop, wake = asyncio.get_running_loop(), asyncio.Event()

    def awaken() -> None:  # in the drawing thread
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake.set)

    job.listen(awaken)
    while True:
        try:
            await asyncio.wait_for(wake.wait(), KEEP_ALIVE)
        except TimeoutError:
            yield None
        wake.clear()
        for event in job.take():
            yield event
            if isinstance(event, LAST):
                return


async def _last(job: Job) -> Event:
    async for event in _events(job):
        if isinstance(event, LAST):
            return event
    raise AssertionError("a job ends with a last event")


async def _disconnected(request: Request) -> None:
    """Wait until the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _images(final: Event) -> tuple[DrawnImage, ...]:
    if isinstance(final, Done):
        return final.images
    raise _error(final)


def _error(final: Event) -> ApiError:
    if isinstance(final, Failed):
        if isinstance(final.error, RefusedError):  # not 5xx: clients would send it again
            return bad_request(final.message, "prompt", "moderation_blocked")
        if final.bad_request:
            return _refusal(final.error)
        return ApiError(500, final.message, "generation_failed")
    return ApiError(
        503, "the request was cancelled, for the server is stopping; send it again", "cancelled", retry_after=5
    )


def _refusal(error: Exception) -> ApiError:
    """What the engine says about a request, in the API's words, with the field that it begins with."""
    message = str(error)
    for ours, theirs in RENAMED.items():
        message = message.replace(ours, theirs)
    first = message.removeprefix("the ").partition(" ")[0]
    about = next((name for begin, name in FIELD_OF.items() if message.startswith(begin)), None)
    return bad_request(message, first if first in READERS else about)


def _about(job: Job, answer: AnswerOptions) -> dict[str, Any]:
    height, width = job.settings.size
    return {
        "size": f"{width}x{height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": answer.format,
    }


def _about_event(job: Job, index: int, answer: AnswerOptions) -> dict[str, Any]:
    return {"created_at": int(time.time()), "image_index": index, **_about(job, answer)}


def _usage(job: Job, count: int) -> dict[str, Any]:
    """OpenAI's count of tokens. Of a picture they are the cells of its latents; those of the text are not counted."""
    height, width = job.settings.latent_size
    cells = height * width * count
    return {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": cells,
        "total_tokens": cells,
    }


def _sse(name: str, data: Mapping[str, Any]) -> str:
    body = dict(data) if name == "error" else {"type": name, **data}
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
