"""Makes printing safe. The console may have a limited encoding (ASCII, cp1252), be closed or full, or disappear; a run
continues in all these cases, and the exit status reports lost output.

Imports the standard library and nothing heavy.
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
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)  # reader or terminal is gone
PRINTING = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
SIGPIPE = 13
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def bars_hidden() -> bool:
    """Whether progress bars are switched off."""
    return _hidden.get()


@contextmanager
def without_bars(hidden: bool = True) -> Iterator[None]:
    """Hides progress bars inside this context, if `hidden`."""
    token = _hidden.set(hidden)
    try:
        yield
    finally:
        _hidden.reset(token)


def protect() -> None:
    """Replaces this process's standard output and error by streams to which writing never fails."""
    codecs.register_error("realera", to_ascii)
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
            setattr(
                sys, name, io.TextIOWrapper(io.BufferedWriter(SafeStream(_opened(handle), closed)), "utf-8", "realera")
            )
        elif stream is getattr(sys, f"__{name}__") and isinstance(_raw(stream), io.FileIO):
            with suppress(OSError):
                stream.flush()
            kept = SafeStream(stream.fileno())
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
    """The unbuffered stream under a text stream. With python -u there is no buffer in between."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoding: replaces characters that it lacks by ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    replaced = (PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(replaced), error.end


class OneLine(logging.Formatter):
    """Keeps every log message on one line, even if it contains text from a file. Tracebacks have several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def lost_output_error() -> OSError | None:
    """The error by which printed output was lost; None if all has arrived."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, SafeStream):
        return None
    sys.stdout.flush()
    return raw.lost


def status(arguments: Sequence[str]) -> int:
    """The exit status of a command that has finished its work. If its work was only to print, lost output is an error:
    2, or the status of SIGPIPE, as in other programs, if the reader has closed the pipe."""
    words = [word.partition("=")[0] if word.startswith("--") else word.lower() for word in arguments]
    if not ({*PRINTING, "dry_run=true"} & set(words)) or (error := lost_output_error()) is None:
        return 0
    if error.errno == errno.EPIPE:
        return 128 + SIGPIPE
    print(f"error: standard output cannot be written ({error.strerror}).", file=sys.stderr)
    return 2


class SafeStream(io.RawIOBase):
    """A stream to a file descriptor. Data that cannot be written is dropped; `lost` is the error."""

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
            if error.errno in GONE:  # libraries and child processes also write to this descriptor
                _opened(self._handle, over=True)
        return size


def _opened(handle: int, over: bool = False) -> int:
    """Opens the null device on a closed descriptor (over=True: also on an open one) and returns the descriptor.
    Otherwise the next opened file would get this number, and prints would go into that file."""
    if not over:
        with suppress(OSError):
            os.fstat(handle)
            return os.open(os.devnull, os.O_WRONLY)  # the number already belongs to another file
    null = os.open(os.devnull, os.O_WRONLY)
    if null != handle:
        os.dup2(null, handle)
        os.close(null)
    return handle
