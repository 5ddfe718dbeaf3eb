"""The changes on pipelines in memory (erasures and maps). Only the latest change on a denoiser can be undone: each
keeps the values of the weights that it found."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import count
from typing import Any

from realera.contracts import UserError

# (number, digests of its maps) of the changes on each denoiser, the latest last. A change stays on it after its object
# is deleted.
_stacks: weakref.WeakKeyDictionary[Any, list[tuple[int, frozenset[str]]]] = weakref.WeakKeyDictionary()
_numbers = count()


def push(denoiser: Any, maps: Iterable[str] = ()) -> int:
    """Registers a change and returns its number. maps: the digests of the maps that it applied."""
    number = next(_numbers)
    _stacks.setdefault(denoiser, []).append((number, frozenset(maps)))
    return number


def pop(denoiser: Any) -> None:
    """Forgets the latest change."""
    _stacks[denoiser].pop()


def has_any(denoiser: Any) -> bool:
    """Whether a change is on this denoiser."""
    return bool(_stacks.get(denoiser))


def maps_on(denoiser: Any) -> set[str]:
    """The digests of the maps of all changes on this denoiser."""
    return {digest for _, maps in _stacks.get(denoiser, ()) for digest in maps}


def refuse_under_later(denoiser: Any, number: int) -> None:
    """Raises UserError if the change with this number is not the latest one."""
    if _stacks[denoiser][-1][0] != number:
        raise UserError(
            "a later erasure is on this pipeline: undo that one first, or load the pipeline again if you no longer "
            "have its object."
        )
