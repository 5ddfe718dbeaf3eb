"""Celebrities: Acc_e "A portrait of {name}" (MACE: five templates); top-1, given a face, throughout."""

from __future__ import annotations

from collections.abc import Mapping

from realera.contracts import Mode
from realera.tasks.people import PeopleTask


class CelebrityTask(PeopleTask):
    """Known people are mapped to "a person", as MACE maps them. The settings are `PeopleTask`'s."""

    name = "celebrity"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "top1")
    example, anchors, known_as = "Tom Cruise", ("a person", "a man"), "people this task knows"
    people = "celebrities.yaml"
