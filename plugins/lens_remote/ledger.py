"""What was sent to image APIs, what it cost and what came back: `ledger.sqlite` and `pictures/` in a folder.

A line is written and on the disk before its request is sent, and settled when the answer is there; a picture is on the
disk before its line says so. So whatever kills a run, the next one knows what was sent, and takes up the pictures that
had arrived. SQLite keeps the file whole, and lets several processes use one ledger and one budget.

States of a line: `sent` (no answer yet; after its deadline there will be none), `address` (drawn, to be fetched),
`drawn`, `refused`, `lost` (may have been drawn and billed, and cannot be had), `free` (failed, at no cost).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, fields, frozen

from lens_core.io import atomic_files, readers
from lens_core.types import LensError

FILE = "ledger.sqlite"
PICTURES = "pictures"
VERSION = 1
MICRO = 1_000_000  # of a dollar: sums of whole numbers are exact
BUSY = 60.0  # seconds to wait for another process
_TABLE = """CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,
    sent_at REAL NOT NULL,
    deadline REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('sent', 'address', 'drawn', 'refused', 'lost', 'free')),
    microdollars INTEGER NOT NULL,
    pictures INTEGER NOT NULL,
    seconds REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    place TEXT NOT NULL DEFAULT '',
    facts TEXT NOT NULL DEFAULT '{}'
) STRICT"""
_INDEX = "CREATE INDEX requests_key ON requests (key)"
_DECISIVE = ("drawn", "address", "refused", "sent", "lost")  # which line of a key counts: the first kind that it has


class LedgerError(LensError):
    """The ledger cannot be read or written; without it nothing is sent."""


class BudgetReached(LensError):
    """The next request could cross a ceiling, so it was not sent."""


class TooSoon(Exception):
    """By the rate of requests, the next may begin in so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"wait {seconds:.1f} s")
        self.seconds = seconds


@frozen
class Line:
    """One request. `microdollars` and `pictures` are what it counts for in the budget; `place` is the picture's file
    below the folder, or its address."""

    id: int
    key: str
    model: str
    prompt: str
    sent_at: float
    deadline: float
    state: str
    microdollars: int
    pictures: int
    seconds: float
    reason: str
    place: str
    facts: Mapping[str, Any] = field(factory=dict)

    @property
    def dollars(self) -> float:
        return self.microdollars / MICRO


@frozen
class Limits:
    """Ceilings on what a ledger may count, None is none; and the seconds between the beginnings of two requests."""

    dollars: float | None = None
    pictures: int | None = None
    spacing: float = 0.0


class Ledger:
    """The ledger in `folder`, which is made if it is not there. Safe to use from several threads and processes.

    Raises LedgerError where the file is damaged, is no ledger, or is one of a later version.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.now = clock
        self.path = folder / FILE
        self._lock = threading.Lock()
        with self._errors():
            (folder / PICTURES).mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, BUSY, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._connection.execute("PRAGMA trusted_schema = OFF")
                self._connection.execute("PRAGMA synchronous = EXTRA")
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def _prepare(self) -> None:
        """Make the table, or check that it is the one that this version makes, and nothing beside it."""
        with self._transaction() as run:
            schema = run("SELECT type, name, sql FROM sqlite_master").fetchall()
            if not schema:
                run(_TABLE)
                run(_INDEX)
                run(f"PRAGMA user_version = {VERSION}")
                return
            version = run("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise LedgerError(f"{self.path}: is of a later version of Lens ({version}); use that one")
            if sorted(schema) != sorted([("table", "requests", _TABLE), ("index", "requests_key", _INDEX)]):
                raise LedgerError(f"{self.path}: is not a ledger of Lens; choose another folder")
            if run("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise LedgerError(f"{self.path}: is damaged; restore it from a copy, or choose another folder")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise LedgerError(f"{self.path}: cannot be used ({why}); nothing is sent without a ledger") from error

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """`execute`, within a transaction that has the file for itself; it is on the disk when this ends."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def find(self, key: str) -> Line | None:
        """The line that decides what is to be done about a picture; None where nothing of it was ever sent, or all
        that was failed at no cost."""
        with self._transaction() as run:
            return _deciding(run, key)

    def begin(
        self, key: str, model: str, prompt: str, price: float, timeout: float, limits: Limits, again: bool
    ) -> tuple[Line, bool]:
        """Write that a request is about to be sent: (its line, True), or (the line that stands against it, False).

        Lost requests do not stand against it where `again` is true; one that may still be under way does. Raises
        BudgetReached and TooSoon; both count what other processes have sent.
        """
        now = self.now()
        with self._transaction() as run:
            before = _deciding(run, key)
            if before is not None and not (again and _is_over(before, now)):
                return before, False
            if before is not None and before.state == "sent":
                run("UPDATE requests SET state = 'lost', reason = 'no_answer: none came' WHERE id = ?", (before.id,))
            micro = round(price * MICRO)
            sums = "SELECT COALESCE(SUM(microdollars), 0), COALESCE(SUM(pictures), 0) FROM requests"
            dollars, pictures = run(sums).fetchone()
            self._check_budget(limits, dollars, pictures, micro)
            last = run("SELECT MAX(sent_at) FROM requests WHERE sent_at <= ?", (now,)).fetchone()[0]
            if last is not None and now < last + limits.spacing:
                raise TooSoon(last + limits.spacing - now)
            run(
                "INSERT INTO requests (key, model, prompt, sent_at, deadline, state, microdollars, pictures) "
                "VALUES (?, ?, ?, ?, ?, 'sent', ?, 1)",
                (key, model, prompt, now, now + timeout, micro),
            )
            row = run("SELECT * FROM requests WHERE id = last_insert_rowid()").fetchone()
        return _line(row), True

    def _check_budget(self, limits: Limits, micro: int, pictures: int, next_micro: int) -> None:
        if limits.pictures is not None and pictures + 1 > limits.pictures:
            raise BudgetReached(
                f"budget_pictures ({limits.pictures}) is reached: {self.path} counts {pictures}; raise it to go on"
            )
        if limits.dollars is not None and micro + next_micro > round(limits.dollars * MICRO):
            raise BudgetReached(
                f"budget_dollars (${limits.dollars:.2f}) is reached: {self.path} counts ${micro / MICRO:.2f}, and the "
                f"next picture costs ${next_micro / MICRO:.3f}; raise it to go on"
            )

    def settle(
        self, line: Line, state: str, *, pictures: int, seconds: float, reason: str = "", place: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write what became of a request; `pictures`: how many of the price of one it counts for, 0 at no cost."""
        price = line.microdollars // max(1, line.pictures)
        values = (state, price * pictures, pictures, seconds, reason, place, json.dumps(facts or {}), line.id)
        with self._transaction() as run:
            run(
                "UPDATE requests SET state = ?, microdollars = ?, pictures = ?, seconds = ?, reason = ?, place = ?, "
                "facts = ? WHERE id = ?",
                values,
            )

    def keep(self, data: bytes, suffix: str) -> str:
        """Write a picture's file, named by its hash; returns its place below the folder."""
        place = f"{PICTURES}/{hashlib.sha256(data).hexdigest()}.{suffix}"
        atomic_files.write_atomic(self.folder / place, lambda path: path.write_bytes(data))
        return place

    def picture(self, line: Line) -> bytes | None:
        """The file of a line that is `drawn`, None where it is gone or changed."""
        name = Path(line.place).name
        try:
            data = (self.folder / PICTURES / name).read_bytes()
        except (OSError, ValueError):
            return None
        return data if hashlib.sha256(data).hexdigest() == name.partition(".")[0] else None

    def lines(self) -> list[Line]:
        """All of them, in the order in which they were sent."""
        with self._transaction() as run:
            return [_line(row) for row in run("SELECT * FROM requests ORDER BY id").fetchall()]


def _line(row: tuple[Any, ...]) -> Line:
    values: dict[str, Any] = dict(zip((a.name for a in fields(Line)), row, strict=True))
    try:
        facts = readers.parse_json(values["facts"], finite=False)
    except ValueError:
        facts = {}  # they are for people
    return Line(**{**values, "facts": facts if isinstance(facts, dict) else {}})


def _deciding(run: Any, key: str) -> Line | None:
    lines = [_line(row) for row in run("SELECT * FROM requests WHERE key = ? ORDER BY id DESC", (key,)).fetchall()]
    return next((line for state in _DECISIVE for line in lines if line.state == state), None)


def _is_over(line: Line, now: float) -> bool:
    """Whether a request is lost: it is said to be, or no answer can come any more."""
    return line.state == "lost" or (line.state == "sent" and now > line.deadline)


def read_lines(folder: Path) -> list[Line]:
    """The lines of the ledger in a folder, or in the folder of a run. Raises LedgerError where there is none."""
    place = next((p for p in (folder, folder / "ledger") if (p / FILE).is_file()), None)
    if place is None:
        raise LedgerError(f"{folder}: holds no {FILE}; give the folder of a ledger, or of a run with a remote system")
    ledger = Ledger(place)
    try:
        return ledger.lines()
    finally:
        ledger.close()


def table(lines: list[Line]) -> str:
    """Requests, pictures and dollars by model and state, as Markdown."""
    rows = ["| model | state | requests | pictures counted | dollars counted |", "|---|---|---|---|---|"]
    for model in dict.fromkeys(line.model for line in lines):
        for state in ("drawn", "address", "refused", "lost", "sent", "free"):
            some = [line for line in lines if line.model == model and line.state == state]
            if some:
                dollars = sum(line.microdollars for line in some) / MICRO
                counted = sum(line.pictures for line in some)
                rows.append(f"| {model} | {state} | {len(some)} | {counted} | {dollars:.3f} |")
    dollars = sum(line.microdollars for line in lines) / MICRO
    return "\n".join([*rows, f"| all | | {len(lines)} | {sum(line.pictures for line in lines)} | {dollars:.3f} |"])
