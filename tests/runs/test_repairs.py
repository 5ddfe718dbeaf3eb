"""Damage in files that a run's settings name. test_torn and test_runs damage the run's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from realera.contracts import UserError
from realera.files import checksums
from realera.runs import repairs
from tearing import TEARS, tear


@pytest.mark.parametrize("how", ["missing", *TEARS])
def test_a_torn_sum_of_captions_is_refused_before_a_run_begins(how: str, tmp_path: Path) -> None:
    file = tmp_path / "sum.safetensors"
    preserved = {"prior_cache": str(file), "domain_cache": None}
    method: dict[str, Any] = {"name": "mace", "edit": {"preserved": preserved}, "align": None}
    if how != "missing":
        checksums.save(file, {"gram": torch.rand(8, 8)}, {"made": "{}"})
        repairs.check_sums(method)
        tear(file, how)
    said = r"method\.edit\.preserved\.prior_cache=.*sum\.safetensors is missing, torn or not a sum .* realera\.cache"
    with pytest.raises(UserError, match=said):
        repairs.check_sums(method)
    preserved["prior_cache"] = "everyday"
    repairs.check_sums(method)
