"""The base class of celebrities and artists, with the protocols of RealEra (arXiv 2410.09140) and MACE (2403.06135).

realera: Acc_e with one template and the name, Acc_g with the paper's phrase that evokes the person without the name,
Acc_s on the hundred preserved people. mace: five templates, and only Acc_e and Acc_s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realera.contracts import Split
from realera.setting_types import FirstSeed, Label, Template, Whole, Word
from realera.tasks.base import PROTOCOL, TABLES, Anchor, Names, ProtocolTask, ToldNames, load

DATA = {**TABLES, "protocols": {...: {**PROTOCOL, "templates": list}}}


class PeopleTask(ProtocolTask):
    """Erases any concept. The data file has an anchor for known people; any other concept needs an anchor.

    concepts, anchor, first_seed, templates: as in `ObjectTask`. protocol: realera | mace. world: paper | miniature; its
    people are known and preserved. images: per prompt and split; None = the protocol's. near, associated, unseen:
    replace the data file's whole prompts of a single concept. told: preserved people that a method may be told; they
    are not judged (`base.ToldNames`). data: a data file that replaces the task's own, `people`.

    Raises UserError for an invalid concept or anchor.
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
        told: ToldNames = (),
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
