"""NaN and infinity, found in one pass over a tensor and refused by its name.

Torch is not imported here: whoever has a tensor has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from realera.contracts import UserError

if TYPE_CHECKING:
    from torch import Tensor


class NotFinite(UserError):
    """A number that is NaN or infinite where a run cannot go on with it."""


def first_bad(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are finite.

    Smallest and largest value of each: NaN is passed on by both. 100 million float32 numbers take 0.02 s of one core,
    and a GPU is waited for once, however many tensors there are.
    """
    names, marks = [], []
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.detach().aminmax()
            names.append(name)
            marks.append((low * 0 + high * 0).float())  # 0, or NaN: the difference of two large numbers may overflow
    if not marks:
        return None
    bad = sys.modules["torch"].stack([mark.to(marks[0].device) for mark in marks]).isnan()
    return names[int(bad.int().argmax())] if bool(bad.any()) else None


def refuse(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], whose: str, remedy: str) -> None:
    """UserError "`whose` `name` holds NaN or infinity: `remedy`." for the first tensor that does."""
    if (name := first_bad(tensors)) is not None:
        raise NotFinite(f"{whose} {name} holds NaN or infinity: {remedy}.")
