"""Explains disk errors in one sentence, and writes files completely or not at all. Temporary files are removed even if
a process is killed. Standard library only."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from realera import paths
from realera.contracts import UserError
from realera.system import interrupts, locks

log = logging.getLogger(__name__)

os.umask(_UMASK := os.umask(0))  # reading the umask means setting it, which is not safe with threads: once, at import
LEFT = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")  # the name of a folder in which a file is being written
SHORT = 40  # characters of the file's name in the folder's name
MINUTE, DAY = 60.0, 86400.0  # seconds
GOES_ON = "and run the same command again to continue"
REMEDIES = {  # for errors that concern the whole disk, not only one file
    errno.ENOSPC: f"free space there, {GOES_ON}",
    errno.EDQUOT: f"free some of the quota there, {GOES_ON}",
    errno.EFBIG: f"allow larger files (ulimit -f), {GOES_ON}",
    errno.EIO: f"check that disk, {GOES_ON}",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose a folder on another disk",
}
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # the others may also occur while reading
ELSE = "make the folder writable, or choose another one (for the cache: with REALERA_CACHE=FOLDER)"
_being_written: set[Path] = set()  # temporary folders of this process
_creating = threading.RLock()
_cleared: set[Path] = set()  # folders in which this process has already removed the files of killed processes


class Unwritten(UserError, OSError):
    """A file that could not be written. It is also an OSError, for callers that can do without the file."""


# --- refusals --------------------------------------------------------------------------------------------------------


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Creates the folder of `path`. A disk error inside this context is raised as `Unwritten` with the name of `path`,
    and the folder is removed again if it was created here."""
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if (sentence := error_sentence(error, path)) is None:
            raise
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise Unwritten(sentence) from error


def error_sentence(error: BaseException, path: Path | None = None) -> str | None:
    """One sentence about a disk error, in writing `path` or in general (None); None for any other error."""
    found = None if isinstance(error, UserError) else _of_disk(error)
    if found is None or (found.errno not in REMEDIES and (path is None or not _names(found, path))):
        return None
    file = found.filename if path is None else path
    done = "written" if path is not None or found.errno in OF_WRITING else "used"
    return f"{file or 'a file'} cannot be {done} ({found.strerror or found}): {REMEDIES.get(found.errno or 0, ELSE)}."


def _of_disk(error: BaseException) -> OSError | None:
    """The OSError behind an error: itself, or the cause of a library's own error. None if there is none."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None and re.search(r"\d+ requested and \d+ written", text):
        return OSError(errno.ENOSPC, "not everything was written")  # numpy reports the two numbers of bytes
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", text)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        cause = error.__context__
        return cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, "not everything was written")
    return None


def _names(error: OSError, path: Path) -> bool:
    """Whether an error is about `path`, its temporary folder or a folder above it."""
    places = {path.absolute(), *path.absolute().parents}
    for name in (error.filename, error.filename2):
        if isinstance(name, (str, os.PathLike)):
            file = Path(name).absolute()
            if file in places or any(LEFT.fullmatch(part) for part in file.parts):
                return True
    return False


def append(path: Path, text: str) -> None:
    """Appends lines to a file in one write, completely or not at all, so that several processes can append to the same
    file. If the file ends in an incomplete line, the new lines start on a line of their own.

    Raises:
        Unwritten: the lines could not be written.
    """
    with explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            os.lseek(handle, max(0, size - 1), os.SEEK_SET)
            data = (b"" if os.read(handle, 1) in (b"", b"\n") else b"\n") + text.encode()
            if (written := os.write(handle, data)) < len(data):
                if os.fstat(handle).st_size == size + written:  # no other process has appended anything since
                    os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


class Tolerance:
    """For a file that a run can do without: inside `with`, a disk error is logged and not raised. Further errors are
    not logged until the file has been written again."""

    def __init__(self) -> None:
        self._warned = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OSError):
            if not self._warned:
                log.warning("%s Until then the run continues without this file.", error)
            self._warned = True
        elif error is None:
            self._warned = False
        return isinstance(error, OSError)


# --- half-written files ----------------------------------------------------------------------------------------------


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A path with the name of `path` in a temporary folder beside it. The folder is locked, and removed at the end."""
    if path.absolute().parent not in _cleared:
        remove_stale(path.absolute().parent)
    folder, handle = path, None
    try:
        while handle is None:
            folder = path.absolute().with_name(f".{path.name[:SHORT]}.{secrets.token_hex(4)}.tmp")
            with _creating:
                _being_written.add(folder)
                folder.mkdir()
                handle = _locked(folder)
            if handle is None:
                _remove(folder)
        yield folder / path.name
    finally:
        _remove(folder)
        if handle is not None:
            os.close(handle)


def _locked(folder: Path) -> int | None:
    """The lock of a new temporary folder; None if another process has just removed the folder as a left-over."""
    handle = os.open(folder / paths.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(FileNotFoundError):
        if locks.lock(handle) is not False and os.path.samestat(os.fstat(handle), os.stat(folder / paths.LOCK)):
            return handle
    os.close(handle)
    return None


def _remove(folder: Path) -> None:
    if folder in _being_written:
        shutil.rmtree(folder, ignore_errors=True)
        _being_written.discard(folder)


def clean_up_before_exit() -> None:
    """For a process that ends without clean-up: removes its temporary files, and stops other threads from creating new
    ones."""
    _creating.acquire(timeout=1)
    drop_temporary()


interrupts.last_resort.append(clean_up_before_exit)


def drop_temporary() -> None:
    """Removes this process's temporary files. Other threads may still be writing to them."""
    for folder in list(_being_written):
        for _ in range(50):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.01)
        _being_written.discard(folder)


def remove_stale(folder: Path) -> None:
    """Removes the temporary files of killed processes from a folder, but not those of running processes."""
    _cleared.add(folder.absolute())
    with suppress(OSError):
        for name in os.listdir(folder):
            if LEFT.fullmatch(name):
                _clear(folder / name)


def _clear(folder: Path) -> None:
    """Removes a temporary folder if no process holds its lock; if it has no lock, when it is old enough."""
    handle, free, age = None, None, MINUTE
    with suppress(OSError):
        handle, age = os.open(folder / paths.LOCK, os.O_RDWR), DAY
        free = locks.lock(handle)
    with suppress(OSError):
        if free or (free is None and time.time() - folder.stat().st_mtime > age):
            shutil.rmtree(folder, ignore_errors=True)
    if handle is not None:
        os.close(handle)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. At the end it is renamed to `path`; after an exception it is removed.

    Raises:
        Unwritten: the disk is full or not writable, or the name is not valid on it.
    """
    with explained(path), temporary(path) as beside:
        yield beside
        if not beside.is_dir():
            beside.chmod(0o666 & ~_UMASK)
        elif path.is_dir():
            path.rmdir()  # an empty folder may be replaced
        beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, completely or not at all."""
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8")
