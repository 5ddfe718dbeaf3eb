"""Hydra's launchers and the search by Optuna on the tiny model. A test is skipped if its plugin is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from realera import cli

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
    "submitit_local": ["hydra.sweeper.max_batch_size=2"],
}


def sweep(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
        "REALERA_CACHE": str(place / "cache"),
        "REALERA_STAMP": "stamp",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "realera.train", "-m", *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def read_lines(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "runs/sweeps/stamp/cells.jsonl").read_text().splitlines()]


def needs(plugin: str) -> None:
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_runs_every_cell(launcher: str, small: list[str], tmp_path: Path) -> None:
    needs(f"hydra_{launcher.partition('_')[0]}_launcher")
    axes = ["method=uce", "concept=airplane,nothingknown", "method.edit.ridge=0.5,5"]
    done = sweep(tmp_path, f"hydra/launcher={launcher}", *LAUNCHERS[launcher], *axes, *small)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2 done, 2 refused" in done.stdout and "page to open: runs/sweeps/stamp/report.html" in done.stdout
    cells = read_lines(tmp_path)
    assert sorted(cell["state"] for cell in cells) == ["done", "done", "refused", "refused"]
    folders = {cell["folder"] for cell in cells if cell["folder"]}
    assert len(folders) == 2 and all((tmp_path / folder / "metrics.json").is_file() for folder in folders)
    again = sweep(tmp_path, "method=uce", "concept=airplane", "method.edit.ridge=0.5,5", *small)
    assert again.returncode == 0 and "2 already finished" in again.stdout


@pytest.mark.slow
def test_a_search_continues_its_study(small: list[str], tmp_path: Path) -> None:
    needs("hydra_optuna_sweeper")
    words = ["experiment=search", "method=uce", "hydra.sweeper.params=null", "hydra.sweeper.n_trials=2"]
    axes = ["concept=airplane", "method.edit.ridge=interval(0.1,100)"]
    for call in (1, 2):
        done = sweep(tmp_path, *words, *axes, *small)
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = (tmp_path / "runs/studies").iterdir()
        assert file.name.startswith("airplane-uce-mini-")
        with sqlite3.connect(file) as study:
            values = [value for (value,) in study.execute("select value from trial_values")]
        assert len(values) == 2 * call
        cells = read_lines(tmp_path)
        assert len(cells) == 2 * call and {cell["state"] for cell in cells} <= {"done", "found"}
        metrics = [json.loads((tmp_path / cell["folder"] / "metrics.json").read_text()) for cell in cells]
        assert [found["main"]["h_o"]["value"] for found in metrics] == pytest.approx(values)
    best = (tmp_path / "runs/sweeps/stamp/optimization_results.yaml").read_text()
    assert f"best_value: {max(values)}" in best
