"""A handful of runs have the weights and the metrics that they had before (`tests/same_numbers.json`).

The file was made at commit 76e9c9e, before the package's modules moved, and is changed only together with a change that
says why numbers change: python tests/test_same_numbers.py > tests/same_numbers.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

FILE = Path(__file__).parent / "same_numbers.json"
IMAGES = "task.images={erase: 4, near: 1, keep: 1, associated: 1, unseen: 1}"
RUNS = {
    "uce": ["task=object", "concept=ship", "method=uce"],
    "valera": ["task=celebrity", "concept=Elon Musk", "method=valera"],
    "rece": ["task=object", "concept=cat", "method=rece"],
    "realera-text": ["task=object", "concept=truck", "method=realera-text", "method.align.steps=6"],
    "mace": ["task=style", "concept=Van Gogh", "method=mace", "method.align.steps=3"],
    "esd-x": ["task=object", "concept=dog", "method=esd-x", "method.align.steps=3"],
}


def numbers(words: list[str]) -> dict[str, Any]:
    """Of a run: for each weight its norm and its product with fixed noise; the metrics; where the images are bright."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        common = ["backbone=mini", "trainer=cpu", "logger=none", "seed=5", f"run_dir={run}", IMAGES]
        environ = {**os.environ, "REALERA_CACHE": f"{place}/cache", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "realera.train", *common, *words], check=True, env=environ, stdout=2)
        weights = {}
        for name, value in sorted(load_file(run / "erased.safetensors").items()):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weights[name] = [float(value.double().norm()), float((value.double() * noise).sum())]
        main = json.loads((run / "metrics.json").read_text())["main"]
    return {"weights": weights, "metrics": {name: one["value"] for name, one in main.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_as_before(name: str) -> None:
    wanted, found = json.loads(FILE.read_text(encoding="utf-8"))[name], numbers(RUNS[name])
    assert found["weights"].keys() == wanted["weights"].keys()
    for weight, pair in wanted["weights"].items():
        assert found["weights"][weight] == pytest.approx(pair, rel=2e-3, abs=2e-3), weight
    for measure, value in wanted["metrics"].items():
        assert found["metrics"][measure] == pytest.approx(value, abs=1.0), measure


if __name__ == "__main__":
    print(json.dumps({name: numbers(words) for name, words in RUNS.items()}, indent=1))
