"""Pictures from a list of URLs. Nothing is fetched unless a recipe names this source.

A page that forbids its use for training by an X-Robots-Tag header (noai, noimageai, noindex, noimageindex) is not used.
Each picture is fetched once and kept in a folder, from which every later reading takes it. Addresses of this machine
and of private networks are refused, for a list may come from a stranger.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from attrs import field, frozen

from lens_core.io import http, readers
from lens_core.io.atomic_files import WriteError, write_atomic
from lens_core.io.sources import CAPTION_KEYS, LARGEST_PICTURE, LARGEST_TEXT, SourceItem
from lens_core.types import ConfigError
from lens_core.validators import integer, matching, real, text
from lens_curate.parts import Part

if TYPE_CHECKING:
    from lens_core.catalog import Catalog
AT_ONCE = 32  # addresses of a part
FAILURES = 6  # runs in which an address fails, after which it counts as gone
REDIRECTS = 5
FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
_KEPT = (403, 404, 410, 451)  # answers that another attempt would not change
_PICTURES = {"Accept": "image/*"}


class Urls:
    """Pictures at the addresses in a file: one on a line, or JSON lines `{"url": …, "caption": …}`."""

    @frozen
    class Config:
        path: str = field(validator=text())  # the list
        downloads: str = field(validator=text())  # folder that keeps what was fetched
        timeout: float = field(default=20.0, validator=real(above=0, at_most=3600))  # seconds for a picture
        # Bytes of a picture.
        max_bytes: int = field(default=32 << 20, validator=integer(at_least=1, at_most=LARGEST_PICTURE))
        concurrency: int = field(default=16, validator=integer(at_least=1, at_most=AT_ONCE))  # requests at a time
        per_host: int = field(default=2, validator=integer(at_least=1, at_most=AT_ONCE))  # of these, to one host
        retries: int = field(default=1, validator=integer(at_least=0, at_most=10))
        user_agent: str = field(default="lens-curate", validator=matching(r"[ -~]{1,200}", "text of ASCII, one line"))
        private_hosts: bool = False  # fetch from this machine and from private networks too

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self.config = config
        self._hosts: dict[str, threading.Semaphore] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        if not Path(self.config.path).expanduser().is_file():
            raise ConfigError(f"{self.config.path}: there is no such list of addresses; check the path")

    def parts(self) -> Iterator[Part]:
        held: list[dict[str, Any]] = []
        for entry in self._listed():
            if "fault" in entry:
                yield Part(entry["url"], fault=entry["fault"])
                continue
            held.append(entry)
            if len(held) == AT_ONCE:
                yield _part(held)
                held = []
        if held:
            yield _part(held)

    def _listed(self) -> Iterator[dict[str, Any]]:
        with Path(self.config.path).expanduser().open("rb") as file:
            number = 0
            while line := file.readline(LARGEST_TEXT):
                number += 1
                if line.strip():
                    yield _entry(line, f"line {number}")

    def read(self, part: Part) -> Iterator[SourceItem]:
        entries = part.payload["urls"]
        with ThreadPoolExecutor(min(self.config.concurrency, len(entries))) as pool:
            fetched = pool.map(lambda entry: self._picture(entry["url"], part.run), entries)
            for entry, (answer, final) in zip(entries, fetched, strict=True):
                name, captions = entry["url"], (entry["captions"],)
                if isinstance(answer, bytes):
                    yield SourceItem(name, answer, captions)
                else:
                    yield SourceItem(name, fault=answer, retry=not final)

    def _picture(self, url: str, run: str) -> tuple[bytes | str, bool]:
        """(a picture, from the folder or the net, or why there is none; whether the next run would have the same).
        `run`: as in `Part`."""
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        place = Path(self.config.downloads).expanduser() / name[:2] / name
        fault, failures = place.with_suffix(".fault"), place.with_suffix(".failures")
        if place.is_file():
            return readers.read_bytes(place, LARGEST_PICTURE), True
        if fault.is_file():
            return readers.read_text(fault), True
        before = readers.read_bytes(failures, LARGEST_TEXT) if failures.is_file() else b""
        if run and before.lstrip(b"\0") == run.encode():
            return "not fetched", False
        for _ in range(self.config.retries + 1):
            answer, final = self._fetch(url)
            if final:
                break
        count = 0 if final else 1 + before.count(b"\0")  # a byte for each run in which it failed, then the last one
        final = final or count >= FAILURES
        if isinstance(answer, bytes):
            _keep(place, answer)
        else:
            with suppress(WriteError):  # a failure that cannot be noted is one, and is found again
                _keep(fault if final else failures, answer.encode() if final else bytes(count) + run.encode())
        if final:
            with suppress(OSError):
                failures.unlink(missing_ok=True)
        return answer, final

    def _fetch(self, url: str) -> tuple[bytes | str, bool]:
        """(the picture or why there is none, whether another attempt would end in the same way)."""
        headers = {**_PICTURES, "User-Agent": self.config.user_agent}
        for _ in range(REDIRECTS + 1):
            flaw = http.check_url(url) or self._foreign(url)
            if flaw is not None:
                return f"address {flaw}", True
            try:
                with self._of_host(url):
                    answer = http.get(url, headers, self.config.timeout, self.config.max_bytes)
            except http.TooLarge:
                return f"larger than max_bytes ({self.config.max_bytes})", True
            except (OSError, ValueError) as error:
                return f"not fetched: {readers.one_line(error, 100)}", False
            if forbids(answer.headers.get("x-robots-tag", "").lower()):
                return "forbidden by X-Robots-Tag", True
            if answer.status in (301, 302, 303, 307, 308) and answer.location:
                url = urljoin(url, answer.location)
                continue
            if answer.status != 200:
                return f"not fetched: HTTP {answer.status}", answer.status in _KEPT
            return answer.body, True
        return f"redirected more than {REDIRECTS} times", True

    def _of_host(self, url: str) -> threading.Semaphore:
        host = urlsplit(url).hostname or ""
        with self._lock:
            return self._hosts.setdefault(host, threading.Semaphore(self.config.per_host))

    def _foreign(self, url: str) -> str | None:
        """Why the host of `url` is not asked, or None."""
        if self.config.private_hosts:
            return None
        parts = urlsplit(url)
        try:
            addresses = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
            public = all(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_global for place in addresses)
        except (OSError, UnicodeError, ValueError):
            return None  # the request will say what is wrong
        return None if public else "is of this machine or of a private network; private_hosts: true allows it"


def _keep(place: Path, data: bytes) -> None:
    write_atomic(place, lambda path: path.write_bytes(data))


def forbids(robots: str) -> bool:
    """Whether X-Robots-Tag headers, in lower case, forbid the use of a picture, to anybody."""
    return not FORBIDDING.isdisjoint(re.split(r"[\s,:;]+", robots))


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """A line of a list: its address and captions, or `fault`."""
    try:
        words = readers.decode(line).strip()
        facts = readers.parse_json(words) if words.startswith("{") else {"url": words}
    except ValueError as error:
        return {"url": where, "fault": f"damaged line in the list: {readers.one_line(error, 60)}"}
    if not isinstance(facts, Mapping) or not isinstance(facts.get("url"), str):
        return {"url": where, "fault": "line without a url"}
    return {"url": facts["url"], "captions": {k: facts[k] for k in CAPTION_KEYS if isinstance(facts.get(k), str)}}


def _part(entries: list[dict[str, Any]]) -> Part:
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return Part(digest, digest, len(entries), {"urls": entries})
