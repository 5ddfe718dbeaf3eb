"""Exports in other programs' own code. diffusers is in test_forms.py and tests/backbones/test_original_layout.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import realera

TABLE = Path(__file__).parents[2] / "experiments" / "exports" / "table.py"


def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exports_table", TABLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_stable_diffusion_cpp_draws_a_checkpoint_as_the_run_does(tmp_path: Path) -> None:
    """It knows the full size only: 5 GB of disk, minutes of a CPU."""
    pytest.importorskip("stable_diffusion_cpp", reason="needs stable-diffusion-cpp-python")
    exports = table()
    place = exports.random_folder(tmp_path / "base", small=False)
    before = exports.drawn(exports.opened(place))
    steps = {"backbone.sampler.steps": 2}
    erased = realera.erase(exports.opened(place), "airplane", anchor="sky", method="valera", progress=False, **steps)
    run = exports.drawn(erased.pipe)
    made = erased.export("checkpoint", tmp_path / "out", verify=0)
    there = exports.by_stable_diffusion_cpp(made.path)
    moved = float((run - before).abs().mean())
    assert moved > 10 and float((there - run).abs().mean()) < moved / 20
