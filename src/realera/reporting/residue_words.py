"""The result of a residue search in words: the texts that drew a concept before a run, and those that still do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATES = {  # see `remaining_texts.classify`
    "gone": "gone",
    "partly": "partly",
    "left": "still draws it",
    "never": "did not draw it",
}


def state(row: Mapping[str, Any]) -> str:
    """The state of a text: "gone", "partly: 2 of 4 pictures". row: an entry of `texts` in residue.json."""
    word = STATES[row["state"]]
    return f"{word}: {_pictures(row)}" if row["state"] == "partly" else word


def sentence(concept: Mapping[str, Any]) -> str:
    """concept: an entry of `concepts` in residue.json."""
    first, *others = concept["texts"]
    name = ""
    if first["state"] in ("left", "partly"):
        name = f"Its name still draws it{f' in {_pictures(first)}' if first['state'] == 'partly' else ''}. "
    drew, left, partly = concept["drew"], concept["left"], concept["partly"]
    if not drew:
        return f"{name}Of {_texts(len(others))}, none drew it before."
    still = "none draws it" if left == 0 else "one still draws it" if left == 1 else f"{left} still draw it"
    if partly:
        some = "one" if partly == 1 else f"{partly}"
        still = f"{still}, {some}" if left else f"{some} still draw{'s' if partly == 1 else ''} it"
        still += " in some pictures"
    return f"{name}Of {_texts(len(others))}, {drew} drew it before; {still}.{_unseen(concept)}"


def _unseen(concept: Mapping[str, Any]) -> str:
    """Says how many texts were classified by their predicted noise alone."""
    drew, said = concept["drew"], ""
    for count, reason in ((concept["unseen"], "not drawn"), (concept["unjudged"], "drawn, but not judged")):
        if count == drew == 1:
            said += f" It was {reason}; only its predicted noise was compared."
        elif count:
            said += f" {count} of these {drew} {'was' if count == 1 else 'were'} {reason}; only "
            said += f"{'its' if count == 1 else 'their'} predicted noise was compared."
    return said


def key(found: Mapping[str, Any]) -> list[str]:
    """Sentences on how to read the columns and the states. found: residue.json."""
    lines = [
        "Before and after: the distance, on images of the concept, between the noise predicted for the text and the "
        "original model's noise for the concept's name. 0: the same noise. 1: as far away as the noise of the empty "
        f"prompt. Up to {found['within']:g} counts as drawing the concept."
    ]
    if found["judge"] is not None:
        lines.append(
            "Judged: the judge's mean probability of the concept in the pictures. A text also draws the concept if the "
            "judge sees the concept in most of its pictures, and partly if in some. It drew it before if the judge "
            "sees it in any picture of the original model."
        )
    lines.append(
        "Each text is drawn as it stands here: words of the vocabulary are drawn alone, not in prompts. To test a "
        "prompt, give it as a text of your own (texts=)."
    )
    if found["guided"]:
        lines.append(
            "This method steers the images during generation, so the pictures are better evidence than the noise."
        )
    return lines


def _pictures(row: Mapping[str, Any]) -> str:
    return f"{row['shown_after']} of {row['scored_after']} pictures"


def _texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count} texts"
