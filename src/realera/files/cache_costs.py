"""What stands in the cache says what it cost: seconds, and passes of the U-Net. A run that finds it there is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from realera.files import checksums, finite
from realera.system.locks import turn

if TYPE_CHECKING:
    from torch import Tensor

    from realera.contracts import Backbone


@dataclass(frozen=True)
class Spent:
    """Seconds of wall time, and images that went through the U-Net in them."""

    seconds: float = 0.0
    passes: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.passes + other.passes)


@dataclass
class Ledger:
    """What the files of the cache cost that were there already; None where a file does not say."""

    files: dict[Path, Spent | None] = field(default_factory=dict)

    def total(self) -> Spent:
        return sum((spent for spent in self.files.values() if spent is not None), Spent())

    def unknown(self) -> int:
        """How many of the files do not say."""
        return sum(spent is None for spent in self.files.values())


_open: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Enters every `Cached` file that is read or made in here. Each file is counted once; a file that this run made
    is not counted as reused."""
    entries = Ledger()
    token = _open.set(entries)
    try:
        yield entries
    finally:
        _open.reset(token)


class Cached:
    """A file of the cache that says what it cost: the clock starts here, and `made` stops it.

    The note stands in the file's own safetensors metadata. A file that is made in several goes sums them.
    """

    def __init__(self, file: Path, backbone: Backbone) -> None:
        self.file = file
        self.backbone = backbone
        self.before: Spent | None = Spent()
        self.began, self.passes = time.perf_counter(), backbone.passes

    def read(self, metadata: Mapping[str, str] | None) -> None:
        """The file was found, with this metadata. One that says nothing is from before there were notes."""
        said = metadata or {}
        try:
            self.before = Spent(float(said["seconds"]), int(said["passes"]))
        except (KeyError, ValueError):
            self.before = None
        if self.before is not None and not 0 <= self.before.seconds < float("inf"):
            self.before = None
        self._enter(self.before)

    def made(self) -> dict[str, str]:
        """Metadata for the file as it is now. Goes on from an unknown beginning as unknown."""
        self._enter(Spent())
        if self.before is None:
            return {}
        now = self.before + Spent(time.perf_counter() - self.began, self.backbone.passes - self.passes)
        return {"seconds": f"{now.seconds:.3f}", "passes": str(now.passes)}

    def _enter(self, spent: Spent | None) -> None:
        if (entries := _open.get()) is not None:
            entries.files.setdefault(self.file, spent)


def kept(file: Path, name: str, backbone: Backbone, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of that name in a file of the cache, on the CPU: what `make` gives, computed once. A process that
    wants it meanwhile waits for it.

    A cache is never worth an error: a file that is torn, or holds NaN, is made again. Raises UserError where what is
    made holds NaN or infinity.
    """
    if file.is_file():
        return _kept(file, name, backbone, make)
    with turn(file):
        return _kept(file, name, backbone, make)


def _kept(file: Path, name: str, backbone: Backbone, make: Callable[[], Tensor]) -> Tensor:
    entry = Cached(file, backbone)
    if file.is_file():
        try:
            tensors, metadata = checksums.load(file)
            found = tensors[name]
            if finite.first_bad([(name, found)]) is None:
                entry.read(metadata)
                return found
        except (checksums.Torn, KeyError):
            checksums.made_again(file)
    made = make().cpu().contiguous()
    finite.refuse(
        [(name, made)], f"{file.name} is not kept, because", "set backbone.dtype=float32, or lower the guidance"
    )
    checksums.save(file, {name: made}, entry.made())
    return made
