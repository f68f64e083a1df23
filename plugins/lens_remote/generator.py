"""The base of the three remote generators: describe, estimate and generate, over one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from lens_core.io.api_keys import required_key
from lens_core.types import (
    GenerationEstimate,
    LensError,
    PictureOutcome,
    PictureRequest,
    StopGeneration,
    SystemInfo,
)
from lens_remote.answers import Codes, Drawn, Failure
from lens_remote.config import RemoteConfig
from lens_remote.drawing import Drawing
from lens_remote.ledger import Ledger
from lens_remote.protocol import Call


class RemoteGenerator:
    """Pictures of a model behind an HTTP API. Building it sends nothing and needs no key.

    A subclass speaks one protocol (`lens_remote.protocol.ImageProtocol`). `sleep` and `clock` replace the waits and
    the time that they are measured by, for tests.
    """

    base_url: str
    seeded: bool
    codes: Codes
    most_failures = None  # in a row: `stop_after` counts them, and only those that were sent

    def __init__(
        self,
        config: Any,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config: RemoteConfig = config
        self.batch_size = 16 * config.concurrency  # a call's last requests leave few of its threads idle
        self._folder = Path(config.ledger).expanduser() if config.ledger else None
        self._ledger: Ledger | None = None
        self._sleep, self._clock = sleep, clock

    # ---- what a protocol says for itself ------------------------------------------------------------------------

    def call(self, config: Any, request: PictureRequest) -> Call:
        raise NotImplementedError

    def headers(self, key: str) -> Mapping[str, str]:
        raise NotImplementedError

    def read(self, data: Any) -> Drawn | Failure:
        raise NotImplementedError

    def error(self, data: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def hint(self, model: str) -> str:
        return ""

    # ---- what a generator offers --------------------------------------------------------------------------------

    def describe(self) -> SystemInfo:
        """The model's id and the settings of a request. Raises LensError where there is no key."""
        self._key()
        body = self.call(self.config, PictureRequest("")).body
        shown = {k: v for k, v in body.items() if k not in ("model", "prompt", "contents", "n")}
        settings = {"base_url": self._url(), **shown}
        if "generationConfig" in settings:  # its seed is the picture's
            settings["generationConfig"] = {k: v for k, v in settings["generationConfig"].items() if k != "seed"}
        return SystemInfo(self.config.model, settings=settings, seeded=self.seeded)

    def estimate(self, count: int, size: tuple[int, int] | None = None) -> GenerationEstimate:
        """What `count` pictures cost: a request each, without retries; seconds at least. Sends nothing."""
        c = self.config
        usd = count * c.dollars_per_picture if c.dollars_per_picture else None
        seconds = count * 60 / c.pictures_per_minute if c.pictures_per_minute else None
        return GenerationEstimate(count, usd, seconds)

    def open(self, folder: Path) -> None:
        """Keep the ledger in the folder of a run, unless the config names another."""
        self._folder = self._folder or folder / "ledger"

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        """Outcomes as they come, `concurrency` requests at a time.

        When the run is stopped, or the caller stops listening, no further request begins, and those under way are
        waited for: they may be paid for already, and the ledger keeps what they bring. Raises StopGeneration.
        """
        if self._ledger is None:
            if self._folder is None:
                raise LensError(f"{self.config.model}: set ledger, the folder that keeps account of what is paid for")
            self._ledger = Ledger(self._folder, self._clock)
        drawing = Drawing(self, self.config, self._ledger, self._key(), self._url(), self._sleep)
        waiting = iter(requests)
        running: set[Future[PictureOutcome | None]] = set()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    while len(running) < self.config.concurrency and not drawing.stopped.is_set():
                        request = next(waiting, None)
                        if request is None:
                            break
                        running.add(pool.submit(drawing.draw, request))
                    if not running:
                        break
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from filter(None, (future.result() for future in done))
            finally:
                drawing.stopped.set()
        if drawing.reason is not None:
            raise StopGeneration(drawing.reason)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _key(self) -> str:
        return required_key(self.config.key_env, self.config.model)

    def _url(self) -> str:
        return self.config.base_url or self.base_url
