"""Celebrities, by the protocols of RealEra (arXiv 2410.09140) and MACE (arXiv 2403.06135).

realera: Acc_e "A portrait of {name}", Acc_g the phrase that the paper prints for the person and that does not name
them, Acc_s the hundred preserved people. mace: five templates, Acc_e and Acc_s alone. Top-1, given a face, throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realera.contracts import Mode
from realera.tasks.base import Names, ProtocolTask, load


class CelebrityTask(ProtocolTask):
    """Known people are mapped to "a person", as MACE maps them; anything else can be erased once it has an anchor.

    concepts, anchor, first_seed, templates: as of every task. protocol: realera | mace. world: paper | miniature, whose
    people are known and preserved. images: per prompt and split, null = the protocol's. near, associated, unseen: a
    single concept's whole prompts, not the file's.

    Raises UserError for a concept or anchor that cannot be used.
    """

    name = "celebrity"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "top1")
    example, anchors, known_as = "Tom Cruise", ("a person", "a man"), "people this task knows"

    def __init__(
        self,
        concepts: Names,
        anchor: str | Sequence[str | None] | None = None,
        protocol: str = "realera",
        world: str = "paper",
        images: Mapping[str, int | None] | None = None,
        first_seed: int | None = None,
        templates: Sequence[str] = (),
        near: Sequence[str] | None = None,
        associated: Sequence[str] | None = None,
        unseen: Sequence[str] | None = None,
        data: str = "celebrities.yaml",
    ) -> None:
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
