"""Artists' styles, by the protocols of RealEra (arXiv 2410.09140) and MACE (arXiv 2403.06135).

realera: Acc_e "An artwork by {name}", Acc_g the phrase that the paper prints for the artist and that does not name
them, Acc_s the hundred preserved artists. mace: five templates, Acc_e and Acc_s alone. CLIP scores stand in place of
accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realera.contracts import Mode
from realera.tasks.base import Names, ProtocolTask, load, option
from realera.tasks.prompts import fill


class StyleTask(ProtocolTask):
    """Known artists are mapped to "art", as MACE maps them; any other style can be erased once it has an anchor.

    acc_g_text: what the images of phrases that do not name the artist are compared with. "artist": "An artwork by
    {name}"; "associated": the phrase itself (the paper does not say which). The other settings are CelebrityTask's.

    Raises UserError for a concept or anchor that cannot be used.
    """

    name = "style"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "score")
    example, anchors, known_as = "Van Gogh", ("art", "a painting"), "artists this task knows"

    def __init__(
        self,
        concepts: Names,
        anchor: str | Sequence[str | None] | None = None,
        protocol: str = "realera",
        world: str = "paper",
        acc_g_text: str = "artist",
        images: Mapping[str, int | None] | None = None,
        first_seed: int | None = None,
        templates: Sequence[str] = (),
        near: Sequence[str] | None = None,
        associated: Sequence[str] | None = None,
        unseen: Sequence[str] | None = None,
        data: str = "artists.yaml",
    ) -> None:
        self.acc_g_text = acc_g_text
        self.by_artist: bool = option({"artist": True, "associated": False}, acc_g_text, "acc_g_text")
        super().__init__(
            concepts,
            anchor,
            raw=load(data),
            protocol=protocol,
            world=world,
            images=images,
            first_seed=first_seed,
            templates=templates,
            words={"near": near, "associated": associated, "unseen": unseen},
        )

    def caption(self, phrase: str, concept: str) -> str | None:
        return fill(self.templates[0], concept) if self.by_artist else None

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "acc_g_text": self.acc_g_text}
