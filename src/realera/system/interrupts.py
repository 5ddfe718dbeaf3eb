"""Ctrl-C, SIGTERM and SIGHUP end a command alike, at any moment: `Interrupted` is raised in the main thread, temporary
files are removed, helpers end, and the exit status is 128 + the signal's number. A second signal ends the process at
once, and so does the first one where the main thread does not answer (it waits for another process, say).

A signal that was ignored when the process began (nohup) stays so. Standard library only: it comes before the rest.
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
GOES_ON = "interrupted: the same command goes on where this one stopped"
PATIENCE = 8.0  # seconds that the main thread is given to answer
BOUNCE = 0.5  # seconds in which a signal that comes again is the same one: `timeout` and schedulers send it twice
Handler = Callable[[int, FrameType | None], Any]

last_resort: list[Callable[[], Any]] = []  # done before the process is ended at once, the last one first


class Interrupted(KeyboardInterrupt):
    """A signal has come."""


class _Case:
    """The state of one command. number: the first signal. error: the exception it raised. over: it was caught."""

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
                del error  # which this frame, part of its traceback, would keep for ever


_case = _Case()


def caught() -> int:
    """Said by the command that has caught the interruption: the exit status."""
    _case.over = True
    return 128 + (_case.number or signal.SIGINT)


def was_caught() -> bool:
    """Whether `caught` was said: the user knows of the interruption."""
    return _case.over


def has_come() -> bool:
    """Whether this command was interrupted."""
    return bool(_case.number)


def begin() -> None:
    """For a command that has only begun to import: there is nothing yet to undo."""
    _set(lambda number, frame: end_at_once(number))


def done(status: int) -> None:
    """For a command whose work is done and which is about to end."""
    _set(lambda number, frame: os._exit(status))


def end_at_once(number: int) -> None:
    """Ends this process and its helpers without waiting for anything."""
    for step in (*reversed(last_resort), _say):
        with suppress(Exception):
            step()
    os._exit(128 + number)


@contextmanager
def answered() -> Iterator[None]:
    """In here a signal raises `Interrupted`; before and after, it does what it did."""
    global _case
    _case = case = _Case()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _set(case.answer)
    if os.name != "posix":  # no pipe there can be waited for, and no thread be signalled
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
    """Answers the signals with `handler`; returns the handlers that stood before."""
    known = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: old for number, old in known.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _watch(case: _Case, signals: int, main: int) -> None:
    """Looks after the main thread once a signal has come: it may not answer, or a library may swallow the answer."""
    first, own = 0.0, 0  # when the first came; how many of those to come are this thread's
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
    """Tells that the command was interrupted, unless another process tells it, or nobody reads."""
    ranks = (os.environ.get(name) for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))
    if next((rank for rank in ranks if rank), "0") == "0" and select.select([], [2], [], 0.2)[1]:
        os.write(2, f"\n{GOES_ON}\n".encode())


def _forget() -> None:
    """In a forked process: its signals are not this command's."""
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), _Case):
        signal.set_wakeup_fd(-1)
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
