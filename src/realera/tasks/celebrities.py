"""Celebrities: Acc_e with "A portrait of {name}" (MACE: five templates). All metrics are top-1, given a face."""

from __future__ import annotations

from collections.abc import Mapping

from realera.contracts import Mode
from realera.tasks.people import PeopleTask


class CelebrityTask(PeopleTask):
    """The anchor of known people is "a person", as in MACE. The settings are those of `PeopleTask`."""

    name = "celebrity"
    headline: Mapping[str, Mode] = dict.fromkeys(("acc_e", "acc_s", "acc_g", "acc_a", "acc_u"), "top1")
    example, anchors, known_as = "Tom Cruise", ("a person", "a man"), "people this task knows"
    people = "celebrities.yaml"
