"""One writer a folder: a lock file that names its owner, and frees itself when the owner has died.

The kernel's file locks are not used: network file systems refuse them, or hold them within one machine alone. A lock is
a small file that appears whole (by a hard link) or not at all; its owner renews its time while it works.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_core.io.atomic_files import writing
from lens_core.types import LensError

NAME = ".lens.lock"
"""The lock's file in the folder that it locks."""
RENEW = 20.0  # seconds between two signs of life
STALE = 120.0  # seconds without one, after which an owner on another machine counts as dead
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_LARGEST = 4096  # bytes of a lock that are read


class LockedError(LensError):
    """Somebody else writes there."""


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Be the only one who writes to `folder`, which is made if it is not there; `what` it is, for the message.

    Raises LockedError, which names the owner's process and machine, where another works there; WriteError where the
    disk takes no file. A lock whose owner has died is taken over: on this machine at once, also if another process
    has its number by now; from another machine after `STALE` seconds without a sign of life.
    """
    path = folder / NAME
    mine = {**_self(), "token": uuid.uuid4().hex}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, mine, what)
    stop = threading.Event()
    keeper = threading.Thread(target=_renew, args=(path, mine["token"], stop), name="lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _read(path).get("token") == mine["token"]:
            with contextlib.suppress(OSError):  # a disk that has gone read-only; the lock frees itself
                path.unlink()


def _take(path: Path, mine: dict[str, Any], what: str) -> None:
    draft = path.with_name(f"{NAME}.{mine['token']}")
    try:
        draft.write_text(json.dumps(mine), encoding="utf-8")
        for _ in range(10):  # several may take over the lock of a dead one at once
            if _link(draft, path):
                return
            owner, age = _read(path), _age(path, draft)
            if age is None:
                continue  # gone meanwhile
            if _alive(owner, age):
                raise LockedError(_message(path, owner, age, what))
            _remove(path, owner)
    finally:
        draft.unlink(missing_ok=True)
    raise LockedError(f"{path.parent}: several processes want to write to this {what}; start one of them again")


def _link(draft: Path, path: Path) -> bool:
    """Make the lock out of its draft; False if there is one."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:  # a file system without hard links: for a moment the lock is there and empty, which counts as alive
        with path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))
        return True
    except FileExistsError:
        return False


def _remove(path: Path, owner: dict[str, Any]) -> None:
    """Remove the lock of a dead owner, but not one that somebody else has made meanwhile."""
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != owner:  # taken over by another in this instant: put it back
        _link(aside, path)
    aside.unlink(missing_ok=True)


def _renew(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(RENEW):
        with contextlib.suppress(OSError):  # tried again soon
            if _read(path).get("token") == token:
                os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    """The owner; empty where the file is gone, or says nothing that can be read."""
    try:
        with path.open("rb") as file:
            owner = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _age(path: Path, draft: Path) -> float | None:
    """Seconds since the owner's last sign of life, by the disk's own clock; None if the lock is gone."""
    try:
        os.utime(draft)
        return max(0.0, draft.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def _alive(owner: dict[str, Any], age: float) -> bool:
    pid, machine = owner.get("pid"), _self()["machine"]
    if isinstance(pid, int) and machine and owner.get("machine") == machine:
        started = _started(pid)
        return started is not None and started == owner.get("started")
    return age < STALE


def _message(path: Path, owner: dict[str, Any], age: float, what: str) -> str:
    folder, host = path.parent, owner.get("host")
    if not owner:
        return f"{folder}: this {what} is locked by {path.name}, which names no owner; delete it if nobody works there"
    who = f"process {owner.get('pid')} on {host}"
    if owner.get("machine") == _self()["machine"]:
        return f"{folder}: {who} is writing to this {what}; wait until it has ended, or choose another"
    return (
        f"{folder}: {who} is writing to this {what} (last sign of life {age:.0f} s ago); wait until it has ended, or "
        f"choose another. If it is dead, its lock counts no more after {STALE:.0f} s"
    )


def _self() -> dict[str, Any]:
    """This process: its number, when it started, and where that number means something."""
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(), "machine": _machine()}


def _machine() -> str:
    """Where process numbers are the same: one boot of one machine, and in it one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _started(pid: int) -> str | None:
    """When the process of this number started, as a text; None if there is none, or it has ended."""
    try:
        # The name, in brackets, may hold anything; the state and 19 more fields stand between it and the time.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil  # of accelerate; other systems have no /proc

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.1f}"
    except psutil.Error:
        return None
