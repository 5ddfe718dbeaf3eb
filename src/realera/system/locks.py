"""File locks of the operating system. A lock ends with its process, even if the process is killed.

Standard library only. On file systems and platforms without locks, this process continues as if it were the only one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from realera.contracts import UserError

log = logging.getLogger(__name__)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a folder from somebody else may contain links to files of this machine


def lock(handle: int, wait: bool = False) -> bool | None:
    """Locks an open file. True if locked, False if another process holds the lock, None without support for locks."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a network file system that is mounted without locks
        return None
    return True


@contextmanager
def run_lock(file: Path, what: str, remedy: str) -> Iterator[None]:
    """Holds the lock `file` while `what` is made. The file names the process that holds it, and is deleted at the end.

    Raises:
        UserError: another process holds the lock. The sentence ends with `remedy`.
    """
    taken = _taken(file)
    if taken is None:
        raise UserError(f"{what} is being made by {_holder(file)}: {remedy}.")
    try:
        yield
    finally:
        taken.release()


@contextmanager
def exclusive(file: Path, wait: bool = True) -> Iterator[bool]:
    """Lets only one process at a time make `file`; a later process waits and then finds the file. Yields whether this
    process has the lock. wait=False: yields False at once if another process has it."""
    place = file.with_name(f".{file.name}.lock")
    taken = _taken(place)
    if taken is None and wait:
        log.warning("%s is being made by %s: waiting for it", file, _holder(place))
        taken = _taken(place, wait=True)
    try:
        yield taken is not None
    finally:
        if taken is not None:
            taken.release()


@dataclass(frozen=True)
class _Taken:
    """A lock file held by this process. handle: None if the file could not be created. made: folders created for it."""

    file: Path
    handle: int | None = None
    made: tuple[Path, ...] = ()

    def release(self) -> None:
        if self.handle is None:
            return
        with suppress(OSError):
            self.file.unlink()
        os.close(self.handle)
        with suppress(OSError):
            for folder in self.made:  # only if it is empty
                folder.rmdir()


def _taken(file: Path, wait: bool = False) -> _Taken | None:
    """The lock file, open and locked; None if another process holds the lock."""
    made = tuple(folder for folder in file.parents if not os.path.exists(folder))
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        except FileNotFoundError:  # its folder has just been removed
            continue
        except OSError:  # not writable: the error is reported when a file is written
            return _Taken(file)
        if lock(handle, wait) is False:
            os.close(handle)
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                break
        os.close(handle)  # the previous process has deleted the file in the meantime
    said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    with suppress(OSError):  # the disk is full: the lock is held all the same
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(said).encode())
    return _Taken(file, handle, made)


def _holder(file: Path) -> str:
    """ "process 123 on node7 since 10:02"."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        pid, host, since = int(said["pid"]), str(said["host"])[:80], time.localtime(float(said["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"
    today = since[:3] == time.localtime()[:3]
    return f"process {pid} on {host!r} since {time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', since)}"
