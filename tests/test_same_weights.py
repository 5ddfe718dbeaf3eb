"""Three quick erasures of the built-in model have the weights that they had before (`tests/same_weights.json`);
`test_same_numbers.py` has slow ones, with their metrics.

The file is changed only together with a change that says why numbers change:
python tests/test_same_weights.py > tests/same_weights.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import realera

FILE = Path(__file__).parent / "same_weights.json"
RUNS: dict[str, dict[str, Any]] = {
    "uce": {"concept": "ship"},
    "valera": {"concept": ["cat", "dog"]},
    "realera": {
        "concept": "truck",
        "align.steps": 4,
        "latents.images": 4,
        "latents.batch": 2,
        "backbone.sampler.steps": 2,
        "neighbours.m": 8,
        "neighbours.n": 8,
    },
}


def numbers(method: str) -> dict[str, list[float]]:
    """Of each changed weight: the norm of its change, and the product of the change with fixed noise, in 6 digits.

    The plainest kernels of torch, without AVX, give norms that differ by 2e-5 and products by 1.5e-4 of the norm."""
    pipe = realera.miniature_pipeline()
    before = {name: value.detach().clone() for name, value in pipe.unet.named_parameters()}
    realera.erase(pipe, method=method, seed=5, progress=False, **RUNS[method])
    found = {}
    for name, value in pipe.unet.named_parameters():
        change = value.detach().double() - before[name].double()
        if change.any():
            noise = torch.randn(change.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            found[name] = [float(f"{number:.6g}") for number in (float(change.norm()), float((change * noise).sum()))]
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", RUNS)
def test_the_weights_are_as_before(method: str) -> None:
    wanted, found = json.loads(FILE.read_text(encoding="utf-8"))[method], numbers(method)
    assert found.keys() == wanted.keys()
    for name, (norm, product) in wanted.items():
        assert found[name] == [pytest.approx(norm, rel=1e-4), pytest.approx(product, abs=1e-3 * norm)], name


if __name__ == "__main__":
    each = [(method, [f"  {json.dumps(w)}: {pair}" for w, pair in numbers(method).items()]) for method in RUNS]
    print("{", ",\n".join(f' "{method}": {{\n' + ",\n".join(lines) + "\n }" for method, lines in each), "}", sep="\n")
