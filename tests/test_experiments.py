"""What stands in experiments/ can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.json")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_results_are_json(file: Path) -> None:
    assert json.loads(file.read_text(encoding="utf-8"))
