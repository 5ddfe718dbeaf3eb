"""The jobs of a sweep, against Hydra's own sweeper."""

from __future__ import annotations

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from realera.sweeps import planning


@pytest.mark.parametrize(
    "words",
    [
        ["a=1,2", "b=x", "c=choice(3,4,5)"],
        ["a=range(1,4)", "a=7", "+d.e=[1,2],[3]", "~f"],
        ["concept='Tom Cruise','Beyonce (singer)'", "seed=0,1", "method/neighbours=null,functional"],
        ["a=sort(3,1,2)"],
    ],
)
def test_jobs_are_those_of_hydra(words: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(words)
    assert [list(job) for job in planning.combinations(parsed)] == BasicSweeper.split_arguments(parsed, None)[0]
