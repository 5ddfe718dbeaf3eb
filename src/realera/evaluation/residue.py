"""Which texts drew a concept before a run and which still do, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATES = {"gone": "gone", "left": "still draws it", "never": "did not draw it"}  # `remains` says which a text is


def sentence(concept: Mapping[str, Any]) -> str:
    """What was found of one concept, in words."""
    drew, left, asked = concept["drew"], concept["left"], len(concept["texts"]) - 1
    if not drew:
        return f"Of {asked} texts none but the name drew it."
    still = "none draws" if left == 0 else "one still draws" if left == 1 else f"{left} still draw"
    return f"Of {asked} texts {drew} drew it before; {still} it."
