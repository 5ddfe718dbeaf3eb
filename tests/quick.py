"""Which of a test's many parameters the quick tests see; the slow tests see them all."""

from __future__ import annotations

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
