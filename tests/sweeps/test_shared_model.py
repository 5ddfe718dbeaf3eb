"""The original model is shared by jobs: only if it is unchanged, and with the same numbers as separate runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator

from realera import train
from realera.contracts import Edit, LoraSpec
from realera.sweeps import shared_model

METHOD = ["concept=airplane", "method.align.steps=3", "method.latents.images=2", "method.latents.batch=1"]


def change(backbone: Any) -> None:
    """Changes a backbone as methods do: an edit, an adapter with gradients, unfrozen weights, the training mode."""
    backbone.apply(Edit(map=2 * torch.eye(backbone.width, dtype=torch.float64)))
    backbone.add_adapter(LoraSpec(rank=2), Generator().manual_seed(0))
    backbone.unet.train()
    backbone.generate(["a cat"], [0])


def test_a_backbone_is_restored(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    state, before = shared_model.state_of(backbone), backbone.generate(["a cat"], [0])
    change(backbone)
    assert shared_model.state_of(backbone) != state
    assert shared_model.restore(backbone, "cpu", state)
    assert torch.equal(backbone.generate(["a cat"], [0]), before)
    for weight in backbone.unfreeze(["mid_block"]):
        weight.data += 1e-4
        weight.grad = torch.ones_like(weight)
    assert shared_model.restore(backbone, "cpu", state)
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.unet.parameters())
    assert torch.equal(backbone.generate(["a cat"], [0]), before)


def test_a_backbone_with_other_changes_is_not_shared(new_backbone: Callable[..., Any]) -> None:
    backbone = new_backbone()
    state = shared_model.state_of(backbone)
    hook = backbone.unet.register_forward_hook(lambda *_: None)
    assert not shared_model.restore(backbone, "cpu", state)
    hook.remove()
    assert shared_model.restore(backbone, "cpu", state)
    weight = next(backbone.vae.parameters())
    weight.data.view(-1).view(torch.int32)[0] ^= 1  # one bit
    assert not shared_model.restore(backbone, "cpu", state)


def test_a_checksum_detects_a_flipped_bit_and_swapped_values(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(50, generator=Generator().manual_seed(0))
    other, turned = value.clone(), value.flip(0)
    other.view(torch.int32)[7] ^= 1
    assert len({shared_model.checksum(one) for one in (value, other, turned)}) == 3
    whole = shared_model.checksum(value)
    monkeypatch.setattr(shared_model, "PIECE", 7)
    assert shared_model.checksum(value) == whole
    assert shared_model.checksum(value.bfloat16()) != whole and shared_model.checksum(
        torch.tensor([3], dtype=torch.int64)
    ) == (3, 3)


@pytest.mark.slow
def test_cells_that_share_a_process_get_the_numbers_of_separate_runs(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from realera.runs import steps

    loaded: list[str] = []
    load = steps.load_backbone

    def counted(config: Any, meter: Any = None) -> Any:
        loaded.append(config["method"]["name"])
        return load(config, meter)

    monkeypatch.setattr(steps, "load_backbone", counted)
    shared_model._kept_models.clear()  # of other tests in this process

    def type_in(place: str, *words: str) -> None:
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        monkeypatch.setenv("REALERA_CACHE", str(tmp_path / place / "cache"))
        monkeypatch.setattr(sys, "argv", ["train", *words, *METHOD, *small])
        train.main()

    type_in("together", "-m", "seed=0,1")
    assert loaded == ["realera"]
    for seed in (0, 1):
        type_in(f"alone{seed}", f"seed={seed}")
    assert len(loaded) == 3
    runs = sorted(tmp_path.glob("together/runs/airplane-*"))
    assert len(runs) == 2
    for run in runs:
        (other,) = tmp_path.glob(f"alone*/runs/{run.name}")
        for name in ("metrics.json", "losses.jsonl", "manifest.jsonl"):
            assert (run / name).read_bytes() == (other / name).read_bytes(), name
        for name in ("erased.safetensors", "neighbours.safetensors", "map.safetensors"):
            ours, theirs = load_file(run / name), load_file(other / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
        for image in run.glob("images/*.png"):
            assert image.read_bytes() == (other / "images" / image.name).read_bytes()
