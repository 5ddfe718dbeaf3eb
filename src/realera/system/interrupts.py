"""Ctrl-C, SIGTERM and SIGHUP end a command in the same way, at any moment: `Interrupted` is raised in the main thread,
temporary files are removed, child processes end, and the exit status is 128 + the signal's number. A second signal ends
the process at once. So does the first one if the main thread does not react, for example because it waits for another
process.

A signal that was ignored when the process started (nohup) stays ignored. Standard library only, because this module is
imported before all others.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GOES_ON = "interrupted: run the same command again to continue"
PATIENCE = 8.0  # seconds that the main thread has to react
BOUNCE = 0.5  # a signal repeated within these seconds counts once: `timeout` and schedulers send it twice
Handler = Callable[[int, FrameType | None], Any]

last_resort: list[Callable[[], Any]] = []  # called before the process is ended at once, the last one first


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread when a signal has arrived."""


class _Case:
    """The state of one command. number: the first signal. error: the exception raised for it. over: it was caught."""

    def __init__(self) -> None:
        self.number = 0
        self.error: Callable[[], Interrupted | None] = lambda: None
        self.over = False

    def answer(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.error() is None and not self.over:
            error = Interrupted()
            self.error = weakref.ref(error)
            try:
                raise error
            finally:
                del error  # this frame is part of the traceback and would keep the exception alive


_case = _Case()


def exit_status() -> int:
    """Call this after catching the interruption. Returns the exit status."""
    _case.over = True
    return 128 + (_case.number or signal.SIGINT)


def was_caught() -> bool:
    """Whether `caught` was called: the user has been told of the interruption."""
    return _case.over


def was_interrupted() -> bool:
    """Whether a signal has arrived."""
    return bool(_case.number)


def begin() -> None:
    """For a command that is still importing: a signal ends it at once, because there is nothing to clean up."""
    _set(lambda number, frame: end_at_once(number))


def done(status: int) -> None:
    """For a command that has finished its work and is about to exit: a signal ends it with `status`."""
    _set(lambda number, frame: os._exit(status))


def end_at_once(number: int) -> None:
    """Ends this process and its child processes without waiting for anything."""
    for step in (*reversed(last_resort), _say):
        with suppress(Exception):
            step()
    os._exit(128 + number)


@contextmanager
def handling() -> Iterator[None]:
    """Inside this context a signal raises `Interrupted`. At the end the previous handlers are restored."""
    global _case
    _case = case = _Case()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _set(case.answer)
    if os.name != "posix":  # no select on pipes and no signals to threads there
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    wakes = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(case, ours, threading.get_ident()), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(theirs)
        watch.join(1)


def _set(handler: Handler) -> dict[int, Any]:
    """Sets `handler` for the signals that are not ignored; returns their previous handlers."""
    known = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: old for number, old in known.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _watch(case: _Case, signals: int, main: int) -> None:
    """Watches the main thread after a signal: it may not react, or a library may swallow the exception."""
    first, own = 0.0, 0  # time of the first signal; number of expected signals that this thread has sent itself
    while True:
        ready = select.select([signals], [], [], 0.2 if first else None)[0]
        read = os.read(signals, 64) if ready else b""
        if ready and not read:
            os.close(signals)
            return
        came = [number for number in read if number in NUMBERS]
        now = time.monotonic()
        if came and own:
            came, own = came[own:], max(0, own - len(came))
        if came and first and now - first > BOUNCE:
            end_at_once(case.number or came[0])
        if came and not first:
            first, number = now, came[0]
        if first and not case.number and now - first > PATIENCE:
            end_at_once(number)
        if case.number and case.error() is None and not case.over:
            own += 1
            signal.pthread_kill(main, case.number)


def _say() -> None:
    """Prints that the command was interrupted, unless another process does so, or stderr cannot be written."""
    ranks = (os.environ.get(name) for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))
    if next((rank for rank in ranks if rank), "0") == "0" and select.select([], [2], [], 0.2)[1]:
        os.write(2, f"\n{GOES_ON}\n".encode())


def _forget() -> None:
    """In a forked process: restores the default handlers, because its signals are not for this command."""
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), _Case):
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
