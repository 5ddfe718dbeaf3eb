"""Libraries that an erasure in closed form does not import: they would cost seconds before the first result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realera import paths

NEVER = [
    "lightning",
    "torchmetrics",
    "matplotlib",
    "wandb",
    "wandb_workspaces",
    "open_clip",
    "nudenet",
    "tensorboard",
    "optuna",
    "pandas",
    "sklearn",
    "joblib",
    "submitit",
    "ray",
    "IPython",
    "realera.judges.clip",
    "realera.tracking",
    "realera.sweeps",
    "realera.reporting.sweep",
]
SCRIPT = f"""
import gc
import sys
import realera
assert "torch" not in sys.modules and "hydra" not in sys.modules, "import realera alone is quick"
erased = realera.erase(realera.miniature_pipeline(), "airplane", method="uce", progress=False)
assert erased.method == "uce" and gc.isenabled() and not gc.get_freeze_count()
erased.save(sys.argv[1])
print([name for name in {NEVER!r} if name in sys.modules])
"""


@pytest.mark.slow
def test_an_erasure_imports_only_what_it_needs(tmp_path: Path) -> None:
    erase(tmp_path)


@pytest.mark.slow
def test_its_weights_are_those_of_the_command_which_uses_lightning(tmp_path: Path) -> None:
    folder, run = erase(tmp_path), tmp_path / "run"
    words = ["concept=airplane", "method=uce", "backbone=mini", "trainer=cpu", "evaluate=false", f"run_dir={run}"]
    code = (
        "import runpy, sys\nrunpy.run_module('realera.train', run_name='__main__')\nassert 'lightning' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "logger=none"],
        env={**os.environ, "REALERA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("erased.safetensors", "map.safetensors"):
        one, two = load_file(folder / name), load_file(run / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


def erase(tmp_path: Path) -> Path:
    """The folder of an erasure by a fresh interpreter."""
    folder = tmp_path / "erased"
    given = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(given, capture_output=True, text=True, cwd=paths.CONF_DIR)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    return folder
