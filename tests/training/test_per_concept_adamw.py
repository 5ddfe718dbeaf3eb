"""The adapters of several concepts, joined in one tensor and trained one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from realera.contracts import Edit, LoraSpec, Method
from realera.training.checkpoint import read_erased
from realera.training.fit import fit
from realera.training.per_concept_adamw import PerConceptAdamW

SETTINGS = {"lr": 0.1, "weight_decay": 0.01}
RANK, CONCEPTS = 2, 3
TURNS = [0, 0, 1, 1, 2, 2, 0, 0, 1]


def start() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(CONCEPTS * RANK, 5, generator=draw), torch.randn(4, CONCEPTS * RANK, generator=draw)


def pull(down: Tensor, up: Tensor) -> Tensor:
    return (down.sin().sum() + up.square().sum()) * 3.0


def test_every_concept_is_trained_as_if_it_were_alone() -> None:
    down, up = (nn.Parameter(tensor) for tensor in start())
    optimizer = PerConceptAdamW([down, up], CONCEPTS, **SETTINGS)
    for concept in TURNS:
        optimizer.zero_grad()
        rows = slice(concept * RANK, (concept + 1) * RANK)
        pull(down[rows], up[:, rows]).backward()
        optimizer.hand_over(concept)
        optimizer.step()
    assert down.grad is None and up.grad is None  # else they would add up over the steps
    for concept in range(CONCEPTS):
        rows = slice(concept * RANK, (concept + 1) * RANK)
        first = start()
        alone = nn.Parameter(first[0][rows].clone()), nn.Parameter(first[1][:, rows].clone())
        single = AdamW(alone, **SETTINGS)
        for _ in range(TURNS.count(concept)):
            single.zero_grad()
            pull(*alone).backward()
            single.step()
        torch.testing.assert_close(down[rows], alone[0])
        torch.testing.assert_close(up[:, rows], alone[1])


class Grow:
    """An aligner that pulls every B towards 1."""

    steps, lr, weight_decay, parameters = 2, 1e-2, 0.0, ()
    lora = LoraSpec(rank=1, per_concept=True)

    def __init__(self) -> None:
        self.concepts: list[str] = []
        self.known: list[Tensor] = []
        self.prepared: list[int] = []

    def prepare(self, backbone: Any, pairs: Any, cache: Path, seed: int) -> None:
        self.prepared.append(len(pairs))

    def loss(self, backbone: Any, pair: Any, mine: Any, batch: Any, generator: Any) -> Any:
        self.concepts.append(pair.concept.target)
        self.known.append(batch.known["mask"])
        return {"away": backbone.predict_noise(batch.latents, batch.timesteps, pair.target.states[:1]).square().sum()}


class Masked:
    def prepare(self, *_: Any) -> None: ...

    def __call__(self, backbone: Any, concept: int, generator: torch.Generator) -> Any:
        z_t = torch.randn(1, 4, 8, 8, generator=generator)
        return z_t, torch.full((1,), 300), {"mask": torch.full((1, 8, 8), float(concept))}


class Fuse:
    """A `finish` edit that records the weights it gets."""

    seen: dict[str, Tensor]

    def __call__(self, backbone: Any, pairs: Any, neighbours: Any) -> Edit:
        self.seen = backbone.erased_state()
        return Edit(weights={name: layer.weight + 1 for name, layer in backbone.text_projections().items()})


@pytest.mark.parametrize("concepts", [1, 2])
def test_each_concept_has_its_own_steps_and_finish_replaces_the_adapter(
    concepts: int, new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], tmp_path: Path
) -> None:
    backbone, align, finish = new_backbone(), Grow(), Fuse()
    pairs = new_pairs(backbone, ("cat", "field"), ("ship", "sky"))[:concepts]
    method = Method("grow", latents=Masked(), align=align, finish=finish)
    trainer = {"accelerator": "cpu"}
    path = fit(backbone, method, pairs, run_dir=tmp_path / "a", seed=0, config={}, trainer=trainer, cache=tmp_path)
    assert align.concepts == ["cat", "cat", "ship", "ship"][: 2 * concepts]
    assert [float(mask.mean()) for mask in align.known] == [0, 0, 1, 1][: 2 * concepts]
    assert align.prepared == [concepts]
    ups = [value for key, value in finish.seen.items() if key.endswith(".up")]
    assert all(up.shape[1] == concepts for up in ups) and any((up != 0).all() for up in ups)
    saved = read_erased(path)
    assert saved.lora is None
    assert {key.split(".")[0] for key in saved.state} == {"edit"}
    assert len(saved.state) == len(backbone.text_projections())


def test_recomputed_activations_use_the_same_concept_s_adapter(
    new_backbone: Callable[..., Any], new_pairs: Callable[..., Any], tmp_path: Path
) -> None:
    """Lightning calls backward after the training step, where the other concepts' adapters would be on again."""
    ends = []
    for checkpointing in (False, True):
        backbone = new_backbone(gradient_checkpointing=checkpointing)
        pairs = new_pairs(backbone, ("cat", "field"), ("ship", "sky"))
        method = Method("grow", latents=Masked(), align=Grow())
        to, trainer = tmp_path / str(checkpointing), {"accelerator": "cpu"}
        fit(backbone, method, pairs, run_dir=to, seed=0, config={}, trainer=trainer, cache=tmp_path)
        ends.append(backbone.erased_state())
    ups = [key for key in ends[0] if key.endswith(".up")]
    assert ups and all(ends[0][key].any(dim=0).all() for key in ups)  # both concepts learnt
    torch.testing.assert_close(ends[1], ends[0], atol=1e-5, rtol=1e-4)
