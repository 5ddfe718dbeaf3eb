"""The changes on pipelines in memory (erasures and maps). Only the latest change on a denoiser can be undone: each
keeps the values of the weights that it found."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

from realera.contracts import UserError

# The numbers of the changes on each denoiser, the latest last. A change stays on it after its object is deleted.
_stacks: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
_numbers = count()


def push(denoiser: Any) -> int:
    """Registers a change and returns its number."""
    number = next(_numbers)
    _stacks.setdefault(denoiser, []).append(number)
    return number


def pop(denoiser: Any) -> None:
    """Forgets the latest change."""
    _stacks[denoiser].pop()


def has_any(denoiser: Any) -> bool:
    """Whether a change is on this denoiser."""
    return bool(_stacks.get(denoiser))


def refuse_under_later(denoiser: Any, number: int) -> None:
    """Raises UserError if the change with this number is not the latest one."""
    if _stacks[denoiser][-1] != number:
        raise UserError(
            "a later erasure is on this pipeline: undo that one first, or load the pipeline again if you no longer "
            "have its object."
        )
