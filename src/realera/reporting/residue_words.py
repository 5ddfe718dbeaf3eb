"""The result of a residue search in words: the texts that drew a concept before a run, and those that still do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATES = {"gone": "gone", "left": "still draws it", "never": "did not draw it"}  # see `remaining_texts.classify`


def sentence(concept: Mapping[str, Any]) -> str:
    """concept: an entry of `concepts` in residue.json."""
    drew, left, asked = concept["drew"], concept["left"], len(concept["texts"]) - 1
    name = "Its name still draws it. " if concept["name_left"] else ""
    if not drew:
        return f"{name}Of {asked} texts, none drew it before."
    still = "none draws" if left == 0 else "one still draws" if left == 1 else f"{left} still draw"
    unseen = concept["unseen"]
    alone = f" {unseen} of these {'was' if unseen == 1 else 'were'} classified by noise alone." if unseen else ""
    return f"{name}Of {asked} texts, {drew} drew it before; {still} it.{alone}"
