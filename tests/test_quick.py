"""Which cases of a test the quick tests take: n, evenly spread, and all others are slow."""

from __future__ import annotations

from typing import Any

import pytest

from quick import slow_unless, take_a_few


class Case:
    """As much of pytest.Item as the choice reads."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator) -> None:
        self.nodeid, self.marks = nodeid, list(marks)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark.mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark)


def quick_ones(cases: list[Any]) -> list[str]:
    take_a_few(cases)
    return [case.nodeid for case in cases if not case.get_closest_marker("slow")]


@pytest.mark.parametrize(("n", "taken"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_n_cases_evenly_spread(n: int, taken: list[int]) -> None:
    cases = [Case(f"tests/test_a.py::test_a[{number}]", pytest.mark.quick(n)) for number in range(10)]
    assert quick_ones(cases) == [f"tests/test_a.py::test_a[{number}]" for number in taken]


def test_each_test_by_itself_and_no_other() -> None:
    few, slow = pytest.mark.quick(1), pytest.mark.slow
    cases = [Case("a::one[0]", few), Case("a::two[0]", few), Case("a::one[1]", few), Case("a::other[0]")]
    late = [Case("a::late[0]", few, slow), Case("a::late[1]", few)]
    assert quick_ones(cases + late) == ["a::one[0]", "a::two[0]", "a::other[0]", "a::late[1]"]


def test_a_named_case_is_quick() -> None:
    cases = slow_unless([1, (2, 3), 4], 1, (2, 3))
    assert cases[:2] == [1, (2, 3)] and cases[2].values == (4,) and cases[2].marks[0].name == "slow"
    with pytest.raises(AssertionError, match="not all among"):
        slow_unless([1, 2], 3)
