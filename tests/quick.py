"""Which of a test's many parameters the quick tests see; the slow tests see them all. `slow_unless` names them; the
mark `quick(n)` takes n of them, evenly spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest


def slow_unless(values: Iterable[Any], *quick: Any) -> list[Any]:
    """For `parametrize`: `values`, slow where they are not among `quick`. A tuple is several."""
    values = list(values)
    assert all(value in values for value in quick), f"{quick} are not all among {values}"
    return [value if value in quick else _slow(*(value if isinstance(value, tuple) else (value,))) for value in values]


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def take_a_few(items: list[pytest.Item]) -> None:
    """Mark as slow all but n of the cases of every test that has the mark `quick(n)`."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test in cases.values():
        mark = test[0].get_closest_marker("quick")
        count = min(int(mark.args[0]), len(test)) if mark else 0
        taken = {number * len(test) // count for number in range(count)}
        for number, item in enumerate(test):
            if number not in taken:
                item.add_marker(pytest.mark.slow)
