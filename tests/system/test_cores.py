"""The cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from realera.system import cores

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, ALL),
        ({"cpu__max": "max 100000\n"}, ALL),
        ({"cpu__max": "50000 100000\n"}, 1),  # half a core
        ({"cpu__max": "99900000 100000\n"}, ALL),  # more than the machine has
        ({"cpu__max": "not a number"}, ALL),
        ({"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "100000"}, 1),
        ({"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, ALL),
    ],
)
def test_a_quota_lowers_the_cores(tmp_path: Path, files: dict[str, str], most: int) -> None:
    assert cores.usable(group(tmp_path, **files), tmp_path / "none") == most


@pytest.mark.parametrize("said", ["0::/a.slice/job.scope\n", "12:memory:/a.slice\n4:cpu,cpuacct:/a.slice/job.scope\n"])
def test_the_quota_of_an_outer_group_counts(tmp_path: Path, said: str) -> None:
    own = tmp_path / "own"
    own.write_text(said)
    group(tmp_path / "groups" / "a.slice" / "job.scope", cpu__max="max 100000")
    group(tmp_path / "groups" / "a.slice", cpu__max="100000 100000")
    assert cores.usable(tmp_path / "groups", own) == 1


def test_threads_are_lowered_but_not_raised_and_a_typed_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(cores, "usable", lambda: 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        cores.limit_threads()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        cores.limit_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(cores, "usable", lambda: 64)
        cores.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
