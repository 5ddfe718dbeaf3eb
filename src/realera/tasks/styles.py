"""Artists' styles: Acc_e with "An artwork by {name}" (MACE: five templates). The metrics are CLIP scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from realera.contracts import Mode
from realera.tasks.base import Anchor, Names, option
from realera.tasks.people import PeopleTask
from realera.tasks.prompts import fill


class StyleTask(PeopleTask):
    """The anchor of known artists is "art", as in MACE. Any other style can be erased with an anchor.

    acc_g_text: the text that is compared with images of phrases without the artist's name. "artist": "An artwork by
    {name}"; "associated": the phrase itself. The paper does not say which. The other settings are those of
    `PeopleTask`. Raises UserError for an invalid concept or anchor.
    """

    name = "style"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "score")
    example, anchors, known_as = "Van Gogh", ("art", "a painting"), "artists this task knows"
    people = "artists.yaml"

    def __init__(
        self,
        concepts: Names,
        anchor: Anchor = None,
        *,
        acc_g_text: Literal["artist", "associated"] = "artist",
        **settings: Any,
    ) -> None:
        self.acc_g_text = acc_g_text
        self.by_artist: bool = option({"artist": True, "associated": False}, acc_g_text, "acc_g_text")
        super().__init__(concepts, anchor, **settings)

    def caption(self, phrase: str, concept: str) -> str | None:
        return fill(self.templates[0], concept).text if self.by_artist else None

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "acc_g_text": self.acc_g_text}
