"""Chooses the GPU of a sweep's worker: one GPU for each job.

A worker holds a lock file as long as it lives, so the workers of all launchers and sweeps on a machine spread over its
devices. If there are more workers than devices, they share the devices evenly. If a scheduler has already assigned a
device to the worker (SLURM, ray with num_gpus), that device is used.
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
    """The number of CUDA devices this process can see. It comes from the driver: importing torch takes seconds."""
    if _given() == []:  # all are hidden; the driver is not called, because it reads the variable only once
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
    """The devices that this process may use, as written in CUDA_VISIBLE_DEVICES."""
    given = _given()
    return [str(index) for index in range(number())] if given is None else given


def _given() -> list[str] | None:
    """The devices in CUDA_VISIBLE_DEVICES; None if it is not set. As in CUDA, the first negative number ends the list:
    "-1" hides all devices."""
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
    """Makes one of the `known` devices the only visible one and returns it; None if a device was already assigned.

    seen: the value of CUDA_VISIBLE_DEVICES when the sweep was started; another value now is a scheduler's choice. A
    process that already holds a lock keeps its device. place: folder of the lock files.
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
    """The owner of the lock files, as a user id: in a container the user may have no name."""
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "all")


def _locked(file: Path) -> IO[bytes] | None:
    """The file, open and locked until the process ends; None if another process holds the lock."""
    stream = file.open("ab")
    if locks.lock(stream.fileno()) is False:
        stream.close()
        return None
    return stream
