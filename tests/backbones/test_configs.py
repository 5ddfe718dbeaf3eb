"""Every yaml in conf/backbone builds a backbone with its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from realera.backbones.unet import UNetBackbone
from realera.contracts import Sampler, UserError
from realera.paths import CONF_DIR, MINIATURE

FILES = sorted((CONF_DIR / "backbone").glob("*.yaml"))


def made(file: Path, **changes: Any) -> UNetBackbone:
    config = OmegaConf.load(file)
    backbone: UNetBackbone = instantiate(OmegaConf.merge(config, changes))
    return backbone


TRANSFORMERS = {"flux-dev": ("flux", 64), "flux-schnell": ("schnell", 64), "sd3-medium": ("sd3", 96)}
TRANSFORMERS |= {"sd35-medium": ("sd3", 96), "mini-dit": ("one-clip", 32)}


@pytest.mark.quick(3)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_makes_a_backbone(file: Path, tiny_sd: Path, tiny_transformers: Callable[[str], Path]) -> None:
    kind, width = TRANSFORMERS.get(file.stem, ("", 32))
    place = str(tiny_transformers(kind) if kind else tiny_sd)
    rows = {} if kind in ("flux", "schnell", "sd3") else {"max_length": 77}
    backbone = made(file, pretrained=place, text={"width": width, **rows})
    assert backbone.name == file.stem
    assert isinstance(backbone.sampler, Sampler)
    assert backbone.timesteps().shape == (backbone.sampler.steps,)
    with pytest.raises(InstantiationException) as wrapped:  # hydra's wrapper, which the commands remove
        made(file, pretrained=place)  # its text encoder differs from the config
    assert isinstance(wrapped.value.__cause__, UserError) and "backbone.text" in str(wrapped.value.__cause__)


@pytest.mark.skipif(not (MINIATURE / "model_index.json").is_file(), reason="the miniature's weights are not there yet")
def test_the_miniature_config() -> None:
    backbone = made(CONF_DIR / "backbone" / "mini.yaml")
    assert backbone.generate(["a photo of a cat"], [0]).shape == (1, 32, 32, 3)
