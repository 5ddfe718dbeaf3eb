"""The processes of one run, as all parts see them: which one this is, and how they agree.

A run alone (`ALONE`) is the process of rank 0 in a world of 1, and nothing here then costs anything. Starting and
joining several is the commands' work (`processes`). Torch is imported where processes talk, and not before.
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
    """This process among `world`, `local_world` of them on each machine. `group`: the torch.distributed group they talk
    in, which is on the CPU and patient; None where there is nobody to talk to."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what the run has one of, and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a list that is the same in all: dealt out like cards, so every item falls to one."""
        return items[self.rank :: self.world]

    def from_first(self, value: Callable[[], T]) -> T:
        """What the first process finds, in all of them. They wait for it; the others do not look themselves."""
        if self.group is None:
            return value()
        from torch.distributed import broadcast_object_list

        box = [value() if self.first else None]
        with _heard():
            broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every process's value by rank, in all of them."""
        if self.group is None:
            return [value]
        from torch.distributed import all_gather_object

        box: list[Any] = [None] * self.world
        with _heard():
            all_gather_object(box, value, group=self.group)
        return box

    def wait(self) -> None:
        """Until all have come as far."""
        self.gather(None)


ALONE = Ranks()


def patient_group() -> Any:
    """A group of all processes, on the CPU, in which one may be waited for a day: drawing takes hours. One that has
    ended is heard of at once."""
    from torch.distributed import new_group

    return new_group(backend="gloo", timeout=timedelta(days=1))


@contextmanager
def _heard() -> Iterator[None]:
    """A process that has ended closes its connections, which the others hear here."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this run has ended (if it said why, that stands above): the same command goes on where "
            "this one stopped, with as many processes as you like."
        ) from error
