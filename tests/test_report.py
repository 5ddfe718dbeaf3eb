"""Which runs a report is of."""

from __future__ import annotations

from pathlib import Path

import pytest

from realera import paths, report
from realera.contracts import UserError
from realera.sweeps.jobs import CELLS, LISTED
from realera.system import disk


def test_a_sweep_in_which_no_cell_had_a_folder_has_no_runs_and_is_a_sweep(tmp_path: Path) -> None:
    disk.write_text(tmp_path / CELLS, '{"folder": null, "state": "refused"}\n')
    assert report._runs_in(str(tmp_path)) == []
    with pytest.raises(UserError, match="is not a run folder"):
        report._runs_in(str(tmp_path / "other"))
    run = tmp_path / "run"
    disk.write_text(run / paths.CONFIG, "seed: 1\n")
    disk.write_text(tmp_path / LISTED, f"{run}\n")
    assert report._runs_in(str(tmp_path)) == [run]
