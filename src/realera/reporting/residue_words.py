"""Which texts drew a concept before a run and which still do, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATES = {"gone": "gone", "left": "still draws it", "never": "did not draw it"}  # `remains` says which a text is


def sentence(concept: Mapping[str, Any]) -> str:
    """What was found of one concept, in words."""
    drew, left, asked = concept["drew"], concept["left"], len(concept["texts"]) - 1
    name = "Its name still draws it. " if concept["name_left"] else ""
    if not drew:
        return f"{name}Of {asked} texts none drew it before."
    still = "none draws" if left == 0 else "one still draws" if left == 1 else f"{left} still draw"
    unseen = concept["unseen"]
    alone = f" {unseen} of them {'is' if unseen == 1 else 'are'} told by the noise alone." if unseen else ""
    return f"{name}Of {asked} texts {drew} drew it before; {still} it.{alone}"
