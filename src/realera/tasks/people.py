"""What celebrities and artists share: protocols for people, RealEra's (arXiv 2410.09140) and MACE's (2403.06135).

realera: Acc_e one template with the name, Acc_g the phrase that the paper prints for the person and that does not name
them, Acc_s the hundred preserved people. mace: five templates, Acc_e and Acc_s alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realera.contracts import Split
from realera.setting_types import FirstSeed, Label, Template, Whole, Word
from realera.tasks.base import PROTOCOL, TABLES, Anchor, Names, ProtocolTask, Told, load

DATA = {**TABLES, "protocols": {...: {**PROTOCOL, "templates": list}}}


class PeopleTask(ProtocolTask):
    """Known people have an anchor; anything else can be erased once it is given one.

    concepts, anchor, first_seed, templates: as of every task. protocol: realera | mace. world: paper | miniature,
    whose people are known and preserved. images: per prompt and split, null = the protocol's. near, associated,
    unseen: a single concept's whole prompts, not the file's. told: of those preserved, which a method may be told
    to keep, and are not judged (`base.Told`). data: another file of people than the task's own, `people`.

    Raises UserError for a concept or anchor that cannot be used.
    """

    people: str

    def __init__(
        self,
        concepts: Names,
        anchor: Anchor = None,
        protocol: Label = "realera",
        world: Label = "paper",
        images: Mapping[Split, Whole | None] | None = None,
        first_seed: FirstSeed | None = None,
        templates: Sequence[Template] = (),
        near: Sequence[Word] | None = None,
        associated: Sequence[Word] | None = None,
        unseen: Sequence[Word] | None = None,
        told: Told = (),
        data: Label | None = None,
    ) -> None:
        super().__init__(
            concepts,
            anchor,
            raw=load(data or self.people, DATA),
            protocol=protocol,
            world=world,
            images=images,
            first_seed=first_seed,
            templates=templates,
            words={"near": near, "associated": associated, "unseen": unseen},
            told=told,
        )
