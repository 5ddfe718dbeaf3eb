"""Official settings, typed at the command line, give the weights that the official code gave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from official_model import OFFICIAL
from realera import train


@pytest.fixture
def erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official_sd: Path
) -> Callable[..., dict[str, torch.Tensor]]:
    """The weights that `python -m realera.train WORDS` makes of the reference results' model."""

    def of(*words: str) -> dict[str, torch.Tensor]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))
        model = ["backbone=mini", f"backbone.pretrained={official_sd}", "backbone.text.width=32"]
        model += ["backbone.text.max_length=77", "trainer=cpu", "logger=none", "evaluate=false", "run_dir=run"]
        monkeypatch.setattr(sys, "argv", ["train", "concept=airplane", "anchor=sky", *model, *words])
        GlobalHydra.instance().clear()
        train.main()
        state = load_file(tmp_path / "run" / "erased.safetensors")
        return {key.removeprefix("edit."): weight for key, weight in state.items()}

    return of


def reference(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("unet."): weight for key, weight in load_file(OFFICIAL / f"{name}.safetensors").items()}


def test_uce_of_today(erased: Callable[..., dict[str, torch.Tensor]]) -> None:
    found, wanted = erased("method=uce", "method.edit.rows=last"), reference("uce_airplane_sky")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_refinement_of_mace(erased: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Its own prompts as templates. The bounds are those of its float32 inverse (see tests/methods/test_mace.py)."""
    prompts = json.loads((OFFICIAL / "mace_cfr_airplane_sky.prompts.json").read_text())["erase"]
    templates = json.dumps([prompt.replace("airplane", "{}") for prompt in prompts])
    found = erased(
        "method=mace",
        f"task.templates={templates}",
        "method.edit.ridge=0.1",
        "method.edit.prompts=null",
        "method.align=null",
        "method.finish=null",
    )
    wanted = reference("mace_cfr_airplane_sky")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        difference = found[name] - weight
        assert difference.square().mean().sqrt() < 1e-3 and difference.abs().max() < 2.5e-3
