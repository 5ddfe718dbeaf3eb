"""OCE: the rotation against another solver and the written-out problem, and the invariants of a rotation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from options import built
from realera.contracts import KEYS, VALUES, Concept, Pair, TextStates, UserError
from realera.methods import oce, priors
from realera.methods.oce import OrthogonalErasure

D, SCALE = 8, 30.0


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def named(target: str, anchor: str) -> Pair:
    """OCE reads the names only."""
    nothing = TextStates(*(torch.zeros(0) for _ in range(4)))
    return Pair(Concept(target, anchor), nothing, nothing)


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


@pytest.fixture(params=[6, 8, 13], ids=["narrow", "square", "wide"])
def world(request: Any) -> dict[str, Tensor]:
    """A layer of fewer, as many and more outputs than inputs; two concepts, their guides, names, captions."""
    weight = numbers(request.param, D, seed=1)
    concepts, guides, names, rows = (numbers(n, D, seed=n) for n in (2, 3, 4, 50))
    names_gram, captions = names.T @ names, rows.T @ rows / 50
    kept = 0.7 * names_gram + 0.4 * captions + 0.2 * torch.eye(D)
    return locals()


def problem(world: dict[str, Tensor], turn: Tensor) -> float:
    """The objective of Q in the module's docstring, term by term."""
    weight = world["weight"]
    out = len(weight)
    basis = torch.linalg.qr(weight @ world["concepts"].T).Q
    beyond = torch.eye(out, dtype=torch.float64) - projector(weight @ world["guides"].T)
    total = 2 * SCALE * sum(float(b @ turn @ beyond @ b) for b in basis.T)
    for rows, weighed in ((world["names"], 0.7), (world["rows"], 0.4 / 50)):
        total += weighed * sum(float((turn @ weight @ k - weight @ k).square().sum()) for k in rows)
    return total + 0.2 * float((turn @ weight - weight).square().sum())


def moment(world: dict[str, Tensor]) -> Tensor:
    weight = world["weight"]
    eye = torch.eye(len(weight), dtype=torch.float64)
    erased, guided = (projector(weight @ world[side].T) for side in ("concepts", "guides"))
    return weight @ world["kept"] @ weight.T - SCALE * erased @ (eye - guided)


def turn_of(world: dict[str, Tensor], moved: Tensor) -> Tensor:
    """An orthogonal Q with Q W = moved."""
    weight = world["weight"]
    inside = moved @ torch.linalg.pinv(weight)
    return inside + torch.eye(len(weight), dtype=torch.float64) - projector(weight)


def test_the_problem_is_a_trace(world: dict[str, Tensor]) -> None:
    turns = [torch.linalg.qr(numbers(len(world["weight"]), len(world["weight"]), seed=s)).Q for s in (1, 2, 3)]
    constants = [problem(world, turn) + 2 * float((turn.T @ moment(world)).trace()) for turn in turns]
    assert constants == pytest.approx([constants[0]] * 3)


def test_the_rotation_solves_the_problem(world: dict[str, Tensor]) -> None:
    """Neither small rotations of it nor random rotations do better."""
    weight = world["weight"]
    moved = oce.rotated(weight, world["concepts"], world["guides"], world["kept"], SCALE)
    turn = turn_of(world, moved)
    assert torch.allclose(turn.T @ turn, torch.eye(len(weight), dtype=torch.float64), atol=1e-9)
    best = problem(world, turn)
    for seed in range(20):
        skew = numbers(len(weight), len(weight), seed=seed)
        small = torch.linalg.matrix_exp(1e-3 * (skew - skew.T))
        assert problem(world, small @ turn) > best
        assert problem(world, torch.linalg.matrix_exp(skew - skew.T)) > best


def test_the_rotation_equals_the_polar_factor_by_newtons_iteration() -> None:
    """X <- (X + X^-T) / 2 goes from M to U V^T without a decomposition."""
    matrix = numbers(7, 7, seed=5)
    found = matrix
    for _ in range(60):
        found = (found + torch.linalg.inv(found).T) / 2
    assert torch.allclose(oce.rotation(matrix, proper=False), found, atol=1e-9)
    for one in (matrix, matrix[[1, 0, *range(2, 7)]]):  # of either sign
        turn = oce.rotation(one, proper=True)
        assert float(torch.linalg.det(turn)) == pytest.approx(1)
        assert float((turn.T @ one).trace()) <= float(torch.linalg.svdvals(one).sum()) + 1e-9


def test_the_rotation_equals_the_official_formula(world: dict[str, Tensor]) -> None:
    """U V^T of the whole (out, out) matrix, if no reflection has to be undone."""
    weight = world["weight"]
    world = {**world, "concepts": world["guides"][:1] + 0.05 * world["concepts"][:1]}
    left, _, right = torch.linalg.svd(moment(world))
    assert len(weight) > D or float(torch.linalg.det(left @ right)) > 0
    moved = oce.rotated(weight, world["concepts"], world["guides"], world["kept"], SCALE)
    assert torch.allclose(left @ right @ weight, moved, atol=1e-8)


def test_a_rotation_keeps_lengths_and_angles(world: dict[str, Tensor]) -> None:
    weight = world["weight"]
    moved = oce.rotated(weight, world["concepts"], world["guides"], world["kept"], SCALE)
    assert torch.allclose(moved.T @ moved, weight.T @ weight, atol=1e-9)
    assert not torch.allclose(moved, weight, atol=1e-2)
    if len(weight) <= D:
        assert float(torch.linalg.det(turn_of(world, moved))) == pytest.approx(1)


def test_a_concept_that_is_its_own_guide_is_unchanged(world: dict[str, Tensor]) -> None:
    weight, concepts = world["weight"], world["concepts"]
    twice = torch.cat([concepts, concepts])
    assert torch.allclose(oce.rotated(weight, twice, concepts, world["kept"], SCALE), weight, atol=1e-9)
    once = oce.rotated(weight, concepts, world["guides"], world["kept"], SCALE)
    again = oce.rotated(weight, twice, world["guides"].repeat(3, 1), world["kept"], SCALE)
    assert torch.allclose(once, again, atol=1e-9), "a text that is given twice counts once"


def test_only_values_are_rotated_away_from_the_concept(new_backbone: Any) -> None:
    backbone, before = new_backbone(), new_backbone().text_projections()
    edit = OrthogonalErasure(erase_scale=1e4)(backbone, [named("cat", "field")], [])
    assert set(edit.weights) == {name for name in before if name.endswith(VALUES)} and edit.map is None
    assert 0 < edit.info["captions_cosine"] < 1
    states = backbone.encode(["cat", "field"])
    cat, field = (states.states[i, states.length[i] - 1].double() for i in range(2))
    for name, weight in edit.weights.items():
        original = before[name].weight.double()
        value, guide = original @ cat, original @ field
        beyond = value - guide * (guide @ value) / (guide @ guide)
        turned = weight @ torch.linalg.pinv(original) @ beyond
        assert float(turned @ value) < 0.2 * float(beyond @ value)
        assert torch.allclose(weight.T @ weight, original.T @ original, atol=1e-6)
    keys = OrthogonalErasure("keys")(backbone, [named("cat", "field")], [])
    assert all(name.endswith(KEYS) for name in keys.weights)


def test_two_concepts_at_once(new_backbone: Any) -> None:
    """Each is rotated farther than when only the other one is erased."""
    backbone = new_backbone()
    pairs = [named("cat", "field"), named("ship", "sky")]
    states = backbone.encode(["cat", "ship"])

    def cosines(pairs: list[Pair]) -> list[float]:
        edit = OrthogonalErasure(erase_scale=1e5)(backbone, pairs, [])
        found = []
        for row in (states.states[i, states.length[i] - 1].double() for i in range(2)):
            layers = [(backbone.text_projections()[name].weight.double(), new) for name, new in edit.weights.items()]
            found.append(sum(float((old @ row) @ (new @ row) / (old @ row).square().sum()) for old, new in layers))
        return [total / len(layers) for total in found]

    together, ship, cat = cosines(pairs), cosines(pairs[1:]), cosines(pairs[:1])
    assert together[0] < ship[0] and together[1] < cat[1], (together, ship, cat)


def test_preserved_texts_change_less(new_backbone: Any, tmp_path: Path) -> None:
    backbone, pairs = new_backbone(), [named("cat", "field")]
    birds = backbone.encode(["a bird"])
    bird = birds.states[0, birds.length[0] - 1].double()

    def moved(**settings: Any) -> float:
        edit = OrthogonalErasure(**settings)(backbone, pairs, [])
        layers = backbone.text_projections()
        return sum(float(((w - layers[name].weight.double()) @ bird).norm()) for name, w in edit.weights.items())

    plain = moved()
    assert moved(preserve=["a bird"], preserve_scale=100.0) < 0.8 * plain
    assert moved(ridge=1e5) < 0.1 * plain and moved(caption_scale=1e5) < plain
    assert moved(expand=["photo of {}"]) != plain and moved(guide="") != plain
    priors.accumulate(backbone, ["a bird", "the sea"], tmp_path / "sum.safetensors", "captions")
    assert moved(captions=tmp_path / "sum.safetensors") != plain


@pytest.mark.parametrize(
    "settings",
    [{"projections": "all"}, {"erase_scale": 0}, {"ridge": 0}, {"caption_scale": -1}, {"expand": ["x"]}],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(OrthogonalErasure, **settings)


def test_preserved_names_without_a_weight_are_refused() -> None:
    with pytest.raises(UserError, match="preserve_scale"):
        OrthogonalErasure(preserve=["a bird"])
