"""The processes of one run: the rank of this process, and functions to exchange data with the others.

A run with a single process (`ONE_PROCESS`) has rank 0 in a world of 1, and these functions then cost nothing. The
processes are started in `runs.processes`. Torch is imported only when processes communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from realera.contracts import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`; each machine has `local_world` of them. group: the torch.distributed
    group for communication, on the CPU and with a long time limit (`patient_group`); None for a single process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and messages."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a list that all processes have: every `world`-th item. Each item is in one part."""
        return items[self.rank :: self.world]

    def from_first(self, value: Callable[[], T]) -> T:
        """Calls `value` in the first process only, and returns its result in all of them. The others wait for it."""
        if self.group is None:
            return value()
        from torch.distributed import broadcast_object_list

        box = [value() if self.first else None]
        with _peers_alive():
            broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; every process gets this list."""
        if self.group is None:
            return [value]
        from torch.distributed import all_gather_object

        box: list[Any] = [None] * self.world
        with _peers_alive():
            all_gather_object(box, value, group=self.group)
        return box

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self.gather(None)


ONE_PROCESS = Ranks()


def patient_group() -> Any:
    """A group of all processes, on the CPU, with a time limit of a day, because generating images takes hours. If a
    process ends, the others notice at once."""
    from torch.distributed import new_group

    return new_group(backend="gloo", timeout=timedelta(days=1))


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Raises UserError if another process has ended, which closes its connections."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this run has ended (its error, if it printed one, is above): run the same command "
            "again to continue, with any number of processes."
        ) from error
