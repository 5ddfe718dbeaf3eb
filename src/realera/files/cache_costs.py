"""Cached files record their cost, in seconds and passes, so that a run which reuses a file knows its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from realera.attack_contract import CountsTexts
from realera.files import checksums, finite
from realera.system.locks import exclusive

if TYPE_CHECKING:
    from torch import Tensor

    from realera.contracts import Backbone


@dataclass(frozen=True)
class Cost:
    seconds: float = 0.0  # wall time
    passes: int = 0  # images that went through the denoiser
    text_passes: int = 0  # texts that went through the text encoder

    def __add__(self, other: Cost) -> Cost:
        texts = self.text_passes + other.text_passes
        return Cost(self.seconds + other.seconds, self.passes + other.passes, texts)

    def __sub__(self, other: Cost) -> Cost:
        texts = self.text_passes - other.text_passes
        return Cost(self.seconds - other.seconds, self.passes - other.passes, texts)

    @classmethod
    def now(cls, backbone: Backbone) -> Cost:
        """The clock and the counters of a backbone; a difference of two is the cost of what happened between them."""
        texts = backbone.text_passes if isinstance(backbone, CountsTexts) else 0
        return cls(time.perf_counter(), backbone.passes, texts)


@dataclass
class ReusedCosts:
    """The costs of the cached files that were reused; None for a file without a record."""

    files: dict[Path, Cost | None] = field(default_factory=dict)

    def total(self) -> Cost:
        return sum((spent for spent in self.files.values() if spent is not None), Cost())

    def unknown(self) -> int:
        """The number of files without a record of their cost."""
        return sum(spent is None for spent in self.files.values())


_open: ContextVar[ReusedCosts | None] = ContextVar("reused_costs", default=None)


@contextmanager
def collect_costs() -> Iterator[ReusedCosts]:
    """Collects the costs of every `Cached` file that is read or made inside this context. Each file is counted once;
    files made by this run are not counted as reused."""
    entries = ReusedCosts()
    token = _open.set(entries)
    try:
        yield entries
    finally:
        _open.reset(token)


class Cached:
    """Measures the cost of making a cached file, from the constructor to `made`.

    The cost is stored in the file's safetensors metadata. For a file that is made in several runs, the costs add up.
    """

    def __init__(self, file: Path, backbone: Backbone) -> None:
        self.file = file
        self.backbone = backbone
        self.before: Cost | None = Cost()
        self.began = Cost.now(backbone)

    def read(self, metadata: Mapping[str, str] | None) -> None:
        """Call this if the file exists, with its metadata. Files of earlier versions have no cost in their metadata."""
        stored = metadata or {}
        try:
            texts = int(stored.get("text_passes", 0))  # not in files of earlier versions
            self.before = Cost(float(stored["seconds"]), int(stored["passes"]), texts)
        except (KeyError, ValueError):
            self.before = None
        if self.before is not None and not 0 <= self.before.seconds < float("inf"):
            self.before = None
        self._enter(self.before)

    def made(self) -> dict[str, str]:
        """The metadata to save with the file; {} if the cost of an earlier part is unknown."""
        self._enter(Cost())
        if self.before is None:
            return {}
        now = self.before + (Cost.now(self.backbone) - self.began)
        texts = {"text_passes": str(now.text_passes)} if now.text_passes else {}
        return {"seconds": f"{now.seconds:.3f}", "passes": str(now.passes), **texts}

    def _enter(self, spent: Cost | None) -> None:
        if (entries := _open.get()) is not None:
            entries.files.setdefault(self.file, spent)


def cached(file: Path, name: str, backbone: Backbone, make: Callable[[], Tensor]) -> Tensor:
    """The result of `make`, on the CPU: computed once and cached in a file, under this name. Other processes that need
    it wait until it is computed.

    A cached file that is torn or holds NaN is made again, without an error. Raises UserError if the result of `make`
    holds NaN or infinity.
    """
    if file.is_file():
        return _load_or_make(file, name, backbone, make)
    with exclusive(file):
        return _load_or_make(file, name, backbone, make)


def _load_or_make(file: Path, name: str, backbone: Backbone, make: Callable[[], Tensor]) -> Tensor:
    entry = Cached(file, backbone)
    if file.is_file():
        try:
            tensors, metadata = checksums.load(file)
            found = tensors[name]
            if finite.first_bad([(name, found)]) is None:
                entry.read(metadata)
                return found
        except (checksums.Torn, KeyError):
            checksums.log_torn(file)
    made = make().cpu().contiguous()
    finite.refuse(
        [(name, made)], f"{file.name} is not cached, because", "set backbone.dtype=float32, or lower the guidance"
    )
    checksums.save(file, {name: made}, entry.made())
    return made
