"""One job, one GPU: which device a worker of a sweep works on.

A worker holds a lock file for as long as it lives, so that workers of all launchers and sweeps on one machine spread
alike; where there are more workers than devices, they share evenly. A scheduler that has already given the worker a
device of its own (SLURM, ray with num_gpus) is left to it.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import MutableMapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import IO

from realera.system import locks

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[IO[bytes]] = []  # the lock of this process


def number() -> int:
    """How many CUDA devices the driver shows this process; asked of the driver, for importing torch takes seconds."""
    if _given() == []:  # nor need a driver be asked, which reads the variable once
        return 0
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
            found = ctypes.c_int(0)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0:
                return found.value
        except (OSError, AttributeError):  # no such library, or not a CUDA driver
            continue
    return 0


def visible() -> list[str]:
    """The devices that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    given = _given()
    return [str(index) for index in range(number())] if given is None else given


def _given() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names, None where it is not set. As for CUDA, the first number that is no device's ends
    the list: "-1" hides them all."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    return list(takewhile(lambda name: not name.startswith("-"), names))


def take(
    known: Sequence[str],
    seen: str | None,
    environ: MutableMapping[str, str] = os.environ,
    place: Path | None = None,
    held: list[IO[bytes]] = _held,
) -> str | None:
    """Makes one of the `known` devices the only one of this process, if none was chosen for it, and returns it.

    seen: CUDA_VISIBLE_DEVICES where the sweep was started; another value here is a scheduler's choice. A process that
    holds one keeps it. place: folder of the lock files.
    """
    assigned = environ.get(VISIBLE)
    if held or not known or (assigned not in (seen, "") and assigned is not None):
        return None
    place = place or Path(tempfile.gettempdir()) / f"realera-gpus-{_user()}"
    place.mkdir(parents=True, exist_ok=True)
    for layer in count():
        for name in known:
            if (lock := _locked(place / f"{name.replace('/', '_')}.{layer}")) is not None:
                held.append(lock)
                environ[VISIBLE] = name
                return name
    return None  # pragma: no cover


def _user() -> str:
    """Whose lock files they are. Not by name: in a container the user may have none."""
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "all")


def _locked(file: Path) -> IO[bytes] | None:
    """The file, open and locked until the process ends; None where another process has it."""
    stream = file.open("ab")
    if locks.lock(stream.fileno()) is False:
        stream.close()
        return None
    return stream
