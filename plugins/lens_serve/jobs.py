"""Image requests and what becomes of them: a request, its job, and the events of the job.

A job is safe to use from any thread. Its events are `Queued`, `Step` (any number), and one of `Done`, `Failed` and
`Cancelled`, which is the last.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lens_core.inference.requests import GenerateRequest
from lens_core.types import ConfigError, LensError
from lens_core.validators import integer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lens_core.inference.call_arguments import GenerationSettings

UNREAD_STEPS = 4
"""Step events that wait for a slow reader; others are dropped, those without a preview first."""


class Busy(LensError):
    """The queue is full, or the engine is stopping. `retry_after`: seconds until another attempt is worth it."""

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class Stopping(Busy):
    """The engine takes no more requests."""


class JobCancelled(LensError):
    """The job was cancelled before its pictures were finished."""


@frozen(kw_only=True)
class ImageRequest:
    """One request: `num_images` pictures of one prompt, picture i with the seed `seed` + i.

    Sizes, steps, guidance, negative prompt, init image and mask are in `settings`. `loras` are (name, weight), by the
    names that the engine offers. `previews`: at how many of the steps an unfinished picture is wanted.
    """

    prompt: str
    settings: GenerateRequest = field(factory=GenerateRequest)
    num_images: int = 1
    seed: int | None = None  # random if None
    sampler: str | None = None  # the model's if None
    loras: tuple[tuple[str, float], ...] = ()
    previews: int = 0


@frozen(kw_only=True)
class Limits:
    """The most that one request may ask for, and the most that the engine holds."""

    max_pixels: int = field(default=1440 * 1440, validator=integer(at_least=1))  # height times width of one picture
    max_steps: int = field(default=100, validator=integer(at_least=1))
    max_images: int = field(default=10, validator=integer(at_least=1))  # pictures of one request
    max_prompt: int = field(default=32_000, validator=integer(at_least=1))  # characters, of the negative prompt too
    max_previews: int = field(default=100, validator=integer(at_least=0))
    max_queue: int = field(default=64, validator=integer(at_least=1))  # requests that wait
    max_batch: int = field(default=4, validator=integer(at_least=1))  # pictures that are drawn together


# ---- events -------------------------------------------------------------------------------------------------------


@frozen
class Queued:
    """The request is accepted; `ahead` requests are drawn or wait before it."""

    ahead: int


@frozen(eq=False)
class Step:
    """A step is done, `step` of `steps` (from 1), of the pictures `indices` of the request, which are drawn together.

    Where a preview was due, `latents` [len(indices),C,h,w] float32 on the host are the finished latents as they look
    now, and `images` are pictures of them in the size of the request's.
    """

    step: int
    steps: int
    indices: tuple[int, ...]
    latents: Tensor | None = None
    images: tuple[Image, ...] = ()


@frozen(eq=False)
class DrawnImage:
    """A finished picture: RGB, its seed, and the facts that draw it again, as `png_metadata.save` writes them."""

    image: Image
    seed: int
    facts: Mapping[str, Any]


@frozen(eq=False)
class Done:
    """All pictures are finished, in the order of their seeds."""

    images: tuple[DrawnImage, ...]


@frozen
class Failed:
    """The request failed: `message` is one line. `error` is a ConfigError where the request itself was at fault."""

    message: str
    error: Exception

    @property
    def bad_request(self) -> bool:
        return isinstance(self.error, ConfigError)


@frozen
class Cancelled:
    """The job was cancelled, and nothing more is drawn of it."""


Event = Queued | Step | Done | Failed | Cancelled
LAST = (Done, Failed, Cancelled)


class Job:
    """An accepted request. Made by `Engine.submit`, read by `events`, `take` or `result`, stopped by `cancel`."""

    def __init__(
        self,
        request: ImageRequest,
        settings: GenerationSettings,
        seeds: tuple[int, ...],
        key: Any,
        on_cancel: Callable[[Job], None],
    ) -> None:
        self.id = uuid.uuid4().hex
        self.request, self.settings, self.seeds, self.key = request, settings, seeds, key
        self.created = time.monotonic()
        self.steps = _steps(request, settings)  # that are run for each picture
        self.pending = list(range(len(seeds)))  # pictures that no batch has taken yet; the engine's
        self.started = False
        self.final: Event | None = None  # Done, Failed or Cancelled, once it is known
        self._images: dict[int, DrawnImage] = {}
        self._unread: list[Event] = []
        self._change = threading.Condition()
        self._listener: Callable[[], None] | None = None
        self._on_cancel = on_cancel
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called; the event follows within a step."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        return self.final is not None

    def cancel(self) -> None:
        """Stop: a job that waits ends at once, one that is drawn within a step. A finished one stays as it is."""
        self._cancelled = True
        self._on_cancel(self)

    def take(self) -> list[Event]:
        """The events since the last call, without waiting. Each event is handed out once, to whoever takes it first."""
        with self._change:
            unread, self._unread = self._unread, []
            return unread

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """The events as they come, up to the last one. Raises TimeoutError after `timeout` seconds without one."""
        while True:
            with self._change:
                if not self._change.wait_for(lambda: self._unread, timeout):
                    raise TimeoutError(f"no event of the job for {timeout:g} s")
                event = self._unread.pop(0)
            yield event
            if isinstance(event, LAST):
                return

    def result(self, timeout: float | None = None) -> tuple[DrawnImage, ...]:
        """The finished pictures; waits for them. Takes no events away. Raises the error of a job that failed,
        JobCancelled, or TimeoutError after `timeout` seconds."""
        with self._change:
            if not self._change.wait_for(lambda: self.final is not None, timeout):
                raise TimeoutError(f"the job is not finished after {timeout:g} s")
            final = self.final
        if isinstance(final, Failed):
            raise final.error
        if isinstance(final, Done):
            return final.images
        raise JobCancelled("the job was cancelled")

    def listen(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each event from now on, and once now, in the thread that made the event. It must
        return at once, as `loop.call_soon_threadsafe` does."""
        self._listener = callback
        callback()

    # ---- for the engine -----------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Add an event; nothing follows a last one."""
        with self._change:
            if self.final is not None:
                return
            if isinstance(event, LAST):
                self.final = event
            if isinstance(event, Step):
                self._forget_step()
            self._unread.append(event)
            self._change.notify_all()
            listener = self._listener
        if listener is not None:
            listener()

    def _forget_step(self) -> None:
        """Make room for another step: drop the oldest without a preview, or the oldest of all."""
        steps = [i for i, one in enumerate(self._unread) if isinstance(one, Step)]
        if len(steps) >= UNREAD_STEPS:
            plain = [i for i in steps if not self._unread[i].images]  # type: ignore[union-attr]
            del self._unread[(plain or steps)[0]]

    def add_image(self, index: int, drawn: DrawnImage) -> Done | None:
        """A picture is finished -> with the last one, how the job ends."""
        self._images[index] = drawn
        if len(self._images) < len(self.seeds):
            return None
        return Done(tuple(self._images[i] for i in range(len(self.seeds))))


def _steps(request: ImageRequest, settings: GenerationSettings) -> int:
    """The steps that are run: from an init image on, a share of them (`InitImage.start`)."""
    wanted = request.settings
    if wanted.image is None:
        return settings.steps
    strength = wanted.strength if wanted.strength is not None else 1.0 if wanted.mask is not None else 0.6
    return max(1, round(strength * settings.steps))
