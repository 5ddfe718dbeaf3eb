"""The console may be narrow (ASCII, cp1252), closed, full, or go away: no run ends for it, and the exit status tells.

The standard library, and nothing heavy of ours.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from realera.paths import printable

PLAIN = {"→": "->", "↓": "v", "↑": "^", "…": "...", "–": "-", "—": "-", "·": "-", "×": "x", "±": "+-", "’": "'"}
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)  # a reader or terminal that is no more
PRINTING = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
SIGPIPE = 13
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def bars_hidden() -> bool:
    """Whether progress bars are switched off here."""
    return _hidden.get()


@contextmanager
def without_bars(hidden: bool = True) -> Iterator[None]:
    """No progress bar is shown in here, if `hidden`."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


def protect() -> None:
    """Makes this process's own standard output and error such that writing to them never fails."""
    codecs.register_error("realera", plainly)
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(Kept(_opened(handle), closed)), "utf-8", "realera"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(_raw(stream), io.FileIO):
            with suppress(OSError):
                stream.flush()
            kept = Kept(stream.fileno())
            typed = ":" in os.environ.get("PYTHONIOENCODING", "")
            under: Any = kept if stream.write_through else io.BufferedWriter(kept)
            made = io.TextIOWrapper(
                under,
                stream.encoding,
                stream.errors if typed else "realera",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def _raw(stream: Any) -> Any:
    """What a text stream writes to in the end; nothing under it is buffered with python -u."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def plainly(error: UnicodeError) -> tuple[str, int]:
    """What an encoding has no letters for, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    said = (PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(said), error.end


class OneLine(logging.Formatter):
    """A log line is one line, whatever text of a file is in it; only a traceback has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def lost() -> OSError | None:
    """Why not all that was printed has arrived, if so."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, Kept):
        return None
    sys.stdout.flush()
    return raw.lost


def status(arguments: Sequence[str]) -> int:
    """The exit status of a command whose work was done: it counts as done where printing was all of it only if what was
    printed has arrived. As of other programs, that of SIGPIPE where the reader has left."""
    words = [word.partition("=")[0] if word.startswith("--") else word.lower() for word in arguments]
    if not ({*PRINTING, "dry_run=true"} & set(words)) or (error := lost()) is None:
        return 0
    if error.errno == errno.EPIPE:
        return 128 + SIGPIPE
    print(f"error: standard output cannot be written ({error.strerror}).", file=sys.stderr)
    return 2


class Kept(io.RawIOBase):
    """A file descriptor to write to. What it cannot take is left out; `lost` says why."""

    def __init__(self, handle: int, lost: OSError | None = None) -> None:
        super().__init__()
        self._handle = handle
        self.lost = lost

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                try:
                    left = left[os.write(self._handle, left) :]
                except BlockingIOError:
                    select.select([], [self._handle], [])
        except OSError as error:
            self.lost = self.lost or error
            if error.errno in GONE:  # libraries and helpers write there as well
                _opened(self._handle, over=True)
        return size


def _opened(handle: int, over: bool = False) -> int:
    """The descriptor, opened on nothing where it is closed (or `over` what it was): the next file that is opened would
    get its number, and be printed into."""
    if not over:
        with suppress(OSError):
            os.fstat(handle)
            return os.open(os.devnull, os.O_WRONLY)  # somebody has opened a file there already
    null = os.open(os.devnull, os.O_WRONLY)
    if null != handle:
        os.dup2(null, handle)
        os.close(null)
    return handle
