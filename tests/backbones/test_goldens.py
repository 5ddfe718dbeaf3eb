"""Against what the rivals' official code computed, where a folder of such references is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realera.backbones.unet import UNetBackbone
from realera.contracts import Edit, NamedPrompt, Sampler

GOLDENS = Path(os.environ.get("REALERA_GOLDENS", ""))

pytestmark = pytest.mark.skipif("REALERA_GOLDENS" not in os.environ, reason="REALERA_GOLDENS names no folder")


@pytest.fixture
def backbone() -> UNetBackbone:
    return UNetBackbone("golden", GOLDENS / "tinysd", Sampler("ddim", 2, 3.0, 64, 64))


def test_official_uce_as_one_map(backbone: UNetBackbone) -> None:
    """UCE (28c81ed): one row a concept, its last sub-token; W = W0 (a k^T + ridge I)(k k^T + ridge I)^-1, ridge 0.5."""
    wanted = load_file(GOLDENS / "uce_airplane_sky.safetensors")
    states = backbone.encode([NamedPrompt.of("{}", name) for name in ("airplane", "sky")])
    key, anchor = states.states[torch.arange(2), states.last].double()
    ridge = 0.5 * torch.eye(32, dtype=torch.float64)
    backbone.apply(Edit(map=torch.linalg.solve(key.outer(key) + ridge, anchor.outer(key) + ridge, left=False)))
    assert {f"{name}.weight" for name in backbone.text_projections()} == set(wanted)
    for name, value in backbone.erased_state().items():
        torch.testing.assert_close(value, wanted[name.removeprefix("edit.")], atol=1e-5, rtol=0)


def test_generates(backbone: UNetBackbone) -> None:
    assert backbone.generate(["an airplane in the sky"], [0]).shape == (1, 64, 64, 3)
