"""RECE against sums over the layers, one matrix and one row at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from options import built
from realera.contracts import Concept, Edit, Pair, TextStates, UserError
from realera.methods.rece import RobustErasure, gram_of
from realera.methods.uce import UnifiedConceptEdit

NAMES = (("cat", "field"), ("mona lisa", "person"))


def named(*names: tuple[str, str]) -> list[Pair]:
    """RECE reads the names only."""
    nothing = TextStates(*(torch.zeros(0) for _ in range(4)))
    return [Pair(Concept(*name), nothing, nothing) for name in names]


def slow_attack(now: dict[str, Tensor], first: dict[str, Tensor], h: Tensor, lambda_norm: float) -> Tensor:
    """h' = (sum W^T W + lambda I)^-1 (sum W^T W0) h, the sums over every layer's own matrices."""
    left, right = lambda_norm * torch.eye(len(h), dtype=torch.float64), torch.zeros(len(h), len(h), dtype=torch.float64)
    for name, weight in now.items():
        left = left + weight.T @ weight
        right = right + weight.T @ first[name]
    return torch.linalg.inv(left) @ right @ h


def slow_update(weight: Tensor, terms: list[tuple[Tensor, Tensor, float]], ridge: float) -> Tensor:
    """UCE's closed form from one layer's current weight, one term (key, value's state, scale) at a time."""
    left, right = ridge * weight, ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for key, state, scale in terms:
        left = left + scale * torch.outer(weight @ state, key)
        right = right + scale * torch.outer(key, key)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("guide", [" ", None])
def test_two_rounds_are_the_papers_algorithm(guide: str | None, new_backbone: Any) -> None:
    """Every layer separately, as in the official code; this reference has no common map."""
    backbone = new_backbone()
    start = UnifiedConceptEdit("suffix_2023", guide=guide)
    edit = RobustErasure(start, rounds=2, guide=guide, lambda_norm=0.3, preserve=[" ", "bird"], preserve_scale=0.2)
    first = {name: layer.weight.detach().double() for name, layer in backbone.text_projections().items()}
    uce = start(backbone, named(*NAMES), []).map
    assert uce is not None
    now = {name: weight @ uce for name, weight in first.items()}

    def rows(text: str) -> list[Tensor]:
        return list(backbone.encode([text]).states[0].double())

    for _ in range(2):
        terms = [(k, k, 0.2) for k in rows(" ") + rows("bird")]
        for target, anchor in NAMES:
            taken_to = rows(anchor if guide is None else guide)
            terms += [(slow_attack(now, first, h, 0.3), a, 1.0) for h, a in zip(rows(target), taken_to)]
        now = {name: slow_update(weight, terms, 0.1) for name, weight in now.items()}

    made = edit(backbone, named(*NAMES), []).map
    assert made is not None
    for name, weight in first.items():
        torch.testing.assert_close(weight @ made, now[name], atol=1e-5, rtol=1e-5)


def test_the_attack_finds_the_nearest_states(new_backbone: Any) -> None:
    """Apart from the penalty on its norm, no other state is nearer to the concept. A round increases the distance."""
    backbone = new_backbone()
    first = {name: layer.weight.detach().double() for name, layer in backbone.text_projections().items()}
    uce = UnifiedConceptEdit("suffix_2023", guide=" ")(backbone, named(NAMES[0]), []).map
    assert uce is not None
    now = {name: weight @ uce for name, weight in first.items()}
    h = backbone.encode(["cat"]).states[0, 1].double()
    found = slow_attack(now, first, h, 1e-6).requires_grad_(True)
    miss = sum(((now[name] @ found - first[name] @ h) ** 2).sum() for name in now)
    assert isinstance(miss, Tensor)
    (slope,) = torch.autograd.grad(miss + 1e-6 * (found**2).sum(), found)
    assert float(slope.abs().max()) < 1e-9
    edit = RobustErasure(UnifiedConceptEdit("suffix_2023", guide=" "), rounds=3, lambda_norm=1e-3)
    info = edit(backbone, named(NAMES[0]), []).info
    assert info["attack_1"] < info["attack_2"] < info["attack_3"], info


def test_layers_are_summed_one_at_a_time() -> None:
    """All layers of SDXL would not fit into memory together."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(5, 37, generator=generator) for _ in range(8)]
    alive: list[int] = []

    def watched() -> Iterator[Tensor]:
        for layer in layers:
            alive.append(sum(type(found) is Tensor and found.shape == (37, 37) for found in gc.get_objects()))
            yield layer

    found = gram_of(watched())
    stacked = torch.stack([layer.double().T @ layer.double() for layer in layers]).sum(dim=0)
    assert found.dtype == torch.float64 and (found - stacked).norm() < 1e-12 * stacked.norm()
    assert max(alive) <= 3


def test_no_rounds_are_uce(new_backbone: Any) -> None:
    backbone = new_backbone()
    start = UnifiedConceptEdit("suffix_2023", guide=" ")
    made, alone = (part(backbone, named(*NAMES), []).map for part in (RobustErasure(start, rounds=0), start))
    assert made is not None and alone is not None and torch.equal(made, alone)


@pytest.mark.parametrize(
    "settings", [{"rounds": -1}, {"lambda_norm": 0}, {"ridge": -1}, {"preserve_scale": float("nan")}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(RobustErasure, start=UnifiedConceptEdit(), **settings)


def test_a_start_without_a_map_is_refused(new_backbone: Any) -> None:
    with pytest.raises(UserError, match="no map"):
        RobustErasure(lambda *_: Edit())(new_backbone(), named(*NAMES), [])
