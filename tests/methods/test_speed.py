"""SPEED: its constrained problem by a general solver, and the rows that the edited weights preserve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from options import built
from realera.contracts import KEYS, VALUES, Concept, Pair, TextStates, UserError
from realera.methods import speed
from realera.methods.speed import NullSpaceErasure

D = 14
BIRDS = ["a bird", "a tree", "the sea", "a house"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def named(target: str, anchor: str) -> Pair:
    """SPEED reads the names only."""
    nothing = TextStates(*(torch.zeros(0) for _ in range(4)))
    return Pair(Concept(target, anchor), nothing, nothing)


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    """Two concepts with anchors, five retained rows, two held ones, one layer; rows are states."""
    keys, anchors, retained, held = (numbers(n, D, seed=n + i) for i, n in enumerate((2, 2, 5, 2)))
    target, cross = keys.T @ keys / 2, anchors.T @ keys / 2
    basis = speed.null_space(retained.T @ retained / 5, 1e-9)
    return {**locals(), "weight": numbers(6, D, seed=9)}


def change(problem: dict[str, Any], slack: float, ridge: float = 0.3) -> Tensor:
    step = speed.constrained(problem["basis"], problem["target"], problem["held"].T, ridge, slack)
    return problem["weight"] @ (problem["cross"] - problem["target"]) @ step


def test_the_change_solves_the_constrained_problem(problem: dict[str, Any]) -> None:
    """Its stationary point by one symmetric system of the change and all multipliers, an output row at a time."""
    keys, anchors, weight = problem["keys"], problem["anchors"], problem["weight"]
    fixed = torch.cat([problem["retained"], problem["held"]])
    hessian = 2 * (keys.T @ keys / 2 + 0.3 * torch.eye(D))
    system = torch.zeros(D + len(fixed), D + len(fixed), dtype=torch.float64)
    system[:D, :D], system[D:, :D], system[:D, D:] = hessian, fixed, fixed.T
    found = change(problem, slack=0.0)
    for row, changed in zip(weight, found):
        wanted = (anchors - keys) @ row
        right = torch.cat([2 * keys.T @ wanted / 2, torch.zeros(len(fixed))])
        assert torch.allclose(torch.linalg.solve(system, right)[:D], changed, atol=1e-9)


def test_slack_is_a_price_on_the_preserved_rows(problem: dict[str, Any]) -> None:
    """The penalised problem in coordinates of the null space, by an explicit inverse."""
    basis, held = problem["basis"], problem["held"].T
    priced = problem["target"] + 0.3 * torch.eye(D) + held @ held.T / 0.5
    inverse = basis @ torch.linalg.inv(basis.T @ priced @ basis) @ basis.T
    wanted = problem["weight"] @ (problem["cross"] - problem["target"]) @ inverse
    assert torch.allclose(change(problem, slack=0.5), wanted, atol=1e-9)
    moved = [float((change(problem, slack) @ held).norm()) for slack in (0.0, 0.1, 1.0, 10.0)]
    assert moved == sorted(moved) and moved[0] < 1e-10


def test_the_change_equals_the_official_formula(problem: dict[str, Any]) -> None:
    """W (A - T) P (I - M K2 (K2^T P M K2 + l I)^-1 K2^T P) M with M = (T P + mu I)^-1."""
    held, eye = problem["held"].T, torch.eye(D, dtype=torch.float64)
    projector = problem["basis"] @ problem["basis"].T
    inverse = torch.linalg.inv(problem["target"] @ projector + 0.3 * eye)
    inner = torch.linalg.inv(held.T @ projector @ inverse @ held + 0.2 * torch.eye(2))
    step = projector @ (eye - inverse @ held @ inner @ held.T @ projector) @ inverse
    wanted = problem["weight"] @ (problem["cross"] - problem["target"]) @ step
    assert torch.allclose(change(problem, slack=0.2), wanted, atol=1e-9)


def test_rows_that_are_moved_more_than_the_mean_are_retained() -> None:
    rows, moving = torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([4.0, 1.0, 3.0, 0.0]).double())
    assert torch.equal(speed.most_moved(rows, moving), rows[[0, 2]])
    assert torch.equal(speed.most_moved(rows, torch.eye(4).double()), rows), "if none is above the mean, all are used"


@pytest.mark.parametrize("out", [5, 20])
def test_noise_is_along_the_direction_that_the_layer_reads_least(out: int) -> None:
    weight, rows = numbers(out, D, seed=1), numbers(3, D, seed=2)
    shifts = speed.noisy(rows, weight, 400, Generator().manual_seed(0)) - rows.repeat(400, 1)
    sizes = shifts.norm(dim=1)
    assert torch.allclose((shifts @ weight.T).norm(dim=1), sizes * torch.linalg.svdvals(weight)[-1])
    assert float(sizes.square().mean()) == pytest.approx(1, abs=0.15)


def test_k_means_ends_at_means_of_their_nearest_rows() -> None:
    rows = torch.cat([numbers(1, D, seed=1), *(8.0 * k + numbers(6, D, seed=k) for k in range(3))])
    held = speed.invariants(rows[:1], rows[1:], 3)
    assert torch.equal(held[:, 0], rows[0])
    for k in range(3):
        assert torch.allclose(held[:, 1 + k], rows[1 + 6 * k : 7 + 6 * k].mean(dim=0))
    assert speed.invariants(rows[:1], rows[1:], 0).shape == (D, 1)


def test_only_values_change_and_the_name_is_read_as_its_anchor(new_backbone: Any) -> None:
    backbone, before = new_backbone(), new_backbone().text_projections()
    edit = NullSpaceErasure(retain=BIRDS, ridge=1e-6)(backbone, [named("cat", "field")], [])
    assert set(edit.weights) == {name for name in before if name.endswith(VALUES)} and edit.map is None
    assert edit.info["directions_free"] > 10
    states = backbone.encode(["cat", "field"])
    cat, field = (states.states[i, states.length[i] - 1].double() for i in range(2))
    for name, weight in edit.weights.items():
        original = before[name].weight.double()
        gap = float((original @ (cat - field)).norm())
        assert float((weight @ cat - original @ field).norm()) < 0.3 * gap
    assert all(name.endswith(KEYS) for name in NullSpaceErasure("keys")(backbone, [named("cat", "sky")], []).weights)


def test_retained_rows_and_invariant_rows_are_preserved(new_backbone: Any) -> None:
    """Exactly, if no retained row is filtered out and none of their directions is below the threshold."""
    backbone = new_backbone()
    settings: dict[str, Any] = {"retain": [*BIRDS, "a black cat"], "filter": False, "augment": 0}
    edit = NullSpaceErasure(threshold=1e-9, **settings)(backbone, [named("cat", "field")], [])
    kept = backbone.encode(BIRDS)
    rows = kept.states[torch.arange(4), kept.length - 1].double()
    empty = backbone.encode([""]).states[0].double()
    held = torch.cat([rows, speed.invariants(empty[:1], empty[1:], 3).T])
    assert edit.info["rows_retained"] == len(BIRDS), "a retained name that contains the erased one is left out"
    for name, weight in edit.weights.items():
        moved = (weight - backbone.text_projections()[name].weight.double()) @ held.T
        assert float(moved.abs().max()) < 1e-6  # the texts are encoded in float32
    wide = NullSpaceErasure(threshold=10.0, **settings)(backbone, [named("cat", "field")], [])
    assert wide.info["directions_free"] > edit.info["directions_free"]


def test_the_seed_determines_the_noise(new_backbone: Any) -> None:
    backbone, pairs = new_backbone(), [named("cat", "field")]
    first, again, other, plain = (
        NullSpaceErasure(retain=BIRDS, **more)(backbone, pairs, []).weights
        for more in ({}, {}, {"seed": 1}, {"augment": 0, "filter": False})
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    for weights in (other, plain):
        assert any(not torch.equal(first[name], weights[name]) for name in first)


def test_a_threshold_without_free_directions_is_refused() -> None:
    assert speed.null_space(torch.diag(torch.tensor([0.01, 1.0, 2.0])).double(), 0.1).shape == (3, 1)
    with pytest.raises(UserError, match="threshold"):
        speed.null_space(torch.eye(3, dtype=torch.float64), 0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"projections": "all"},
        {"rows": "x"},
        {"threshold": 0},
        {"ridge": 0},
        {"augment": -1},
        {"slack": -1},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(NullSpaceErasure, **settings)
