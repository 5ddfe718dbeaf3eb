"""LEACE: the paper's formula, its problem by a general solver, and the failure of linear classifiers after the edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from options import built
from realera.contracts import KEYS, VALUES, UserError
from realera.methods import leace, priors
from realera.methods.leace import LinearErasure, Moments

D = 7
CAT, DOG = ("cat", "field"), ("dog", "sky")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache"))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.sum(dim=0), rows.T @ rows)


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """Two concepts and captions: rows of three classes that differ in their means, with an uneven covariance."""
    spread = numbers(D, D, seed=1)
    sizes, shifts = (20, 30, 200), (2.0, -1.0, 0.0)
    classes = [numbers(n, D, seed=n) @ spread + s + numbers(D, seed=2) for n, s in zip(sizes, shifts)]
    classes[1] = classes[1] + numbers(D, seed=3)
    count, mean, covariance, cross = leace.statistics([moments(rows) for rows in classes])
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    indicators = torch.nn.functional.one_hot(labels)[:, :2].double()
    return {**locals(), "rows": torch.cat(classes)}


def solved(world: dict[str, Any], held: bool) -> Tensor:
    left, right = leace.eraser(world["covariance"], world["cross"], world["mean"] if held else None)
    assert left.shape == (D, 2)
    return torch.eye(D, dtype=torch.float64) + left @ right


def test_statistics_are_those_of_all_rows(world: dict[str, Any]) -> None:
    rows, indicators = world["rows"], world["indicators"]
    centred = rows - rows.mean(dim=0)
    assert world["count"] == 250 and torch.allclose(world["mean"], rows.mean(dim=0))
    assert torch.allclose(world["covariance"], torch.cov(rows.T, correction=0))
    assert torch.allclose(world["cross"], centred.T @ (indicators - indicators.mean(dim=0)) / 250)


@pytest.mark.parametrize("rank", [D, 4])
def test_the_map_equals_the_papers_formula(rank: int) -> None:
    """W^+ P W by roots and pseudo-inverses, also of a singular covariance."""
    rows = numbers(50, rank, seed=1) @ numbers(rank, D, seed=2)
    z = (rows[:, :1] + numbers(50, 1, seed=3) > 0).double()
    covariance, cross = torch.cov(rows.T, correction=0), (rows - rows.mean(dim=0)).T @ (z - z.mean()) / 50
    values, vectors = torch.linalg.eigh(torch.linalg.pinv(covariance, hermitian=True, rtol=1e-9))
    whiten = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    columns = whiten @ cross
    projection = columns @ torch.linalg.pinv(columns)
    wanted = torch.eye(D) - torch.linalg.pinv(whiten, rtol=1e-6) @ projection @ whiten
    left, right = leace.eraser(covariance, cross)
    assert torch.allclose(torch.eye(D) + left @ right, wanted, atol=1e-6)


@pytest.mark.parametrize("held", [True, False])
def test_the_map_is_the_smallest_that_erases_the_classes(world: dict[str, Any], held: bool) -> None:
    """min E ||D x||^2 about the mean, subject to (I + D) S_xz = 0, and D m = 0 where held, by one system of the change
    and all multipliers for each of its rows."""
    cross, mean = world["cross"], world["mean"]
    fixed = torch.cat([cross, mean[:, None]], dim=1) if held else cross
    wanted = torch.cat([-cross, torch.zeros(D, 1)], dim=1) if held else -cross
    system = torch.zeros(D + fixed.shape[1], D + fixed.shape[1], dtype=torch.float64)
    system[:D, :D], system[:D, D:], system[D:, :D] = 2 * world["covariance"], fixed, fixed.T
    right = torch.cat([torch.zeros(D, D, dtype=torch.float64), wanted.T])
    change = torch.linalg.solve(system, right)[:D].T
    assert torch.allclose(solved(world, held), torch.eye(D) + change, atol=1e-9)


@pytest.mark.parametrize("held", [True, False])
def test_no_linear_classifier_finds_the_classes(world: dict[str, Any], held: bool) -> None:
    """The best linear regression of the classes, with a constant, does no better than the constant."""
    map, indicators, rows = solved(world, held), world["indicators"], world["rows"]

    def error(read: Tensor) -> float:
        left, sizes, _ = torch.linalg.svd(torch.cat([read, torch.ones(len(read), 1)], dim=1), full_matrices=False)
        left = left[:, sizes > 1e-9 * sizes[0]]
        return float((indicators - left @ (left.T @ indicators)).square().sum())

    constant = float((indicators - indicators.mean(dim=0)).square().sum())
    assert error(rows) < 0.8 * constant
    assert error(rows @ map.T) == pytest.approx(constant)
    means = torch.stack([(one @ map.T).mean(dim=0) for one in world["classes"]])
    assert torch.allclose(means, (map @ world["mean"]).expand(3, D), atol=1e-9)
    assert torch.allclose(map @ map, map, atol=1e-9)
    assert torch.allclose(map @ world["mean"], world["mean"], atol=1e-9) == held


def test_the_paper_s_matrix_never_widens_the_rows(world: dict[str, Any]) -> None:
    """So the official bound on the covariance's trace is never active."""
    map = solved(world, held=False)
    root_trace = (map @ world["covariance"] @ map.T).trace()
    assert root_trace < world["covariance"].trace()


def test_shrinkage_is_the_optimal_linear_one() -> None:
    """It equals the estimator of arXiv 1308.2608, and is nearer to the true covariance of the rows."""
    truth = torch.diag(torch.linspace(0.1, 6, 20, dtype=torch.float64))
    rows = numbers(30, 20, seed=4) @ truth.sqrt()
    sample = rows.T @ rows / 30
    start = torch.eye(20, dtype=torch.float64) * sample.trace() / 20
    product, norm = (sample @ start).trace(), start.square().sum()
    share = 1 - (sample.trace() ** 2 * norm / 30) / (sample.square().sum() * norm - product**2)
    found = leace.shrunk(sample, 30)
    assert torch.allclose(found, share * sample + (1 - share) * product / norm * start)
    assert (found - truth).norm() < (sample - truth).norm()
    assert torch.allclose(leace.shrunk(truth, 10**9), truth, atol=1e-6)
    assert torch.allclose(leace.shrunk(torch.eye(3).double(), 5), torch.eye(3).double())


def test_classes_that_differ_only_along_the_mean_are_refused() -> None:
    mean = torch.ones(3, dtype=torch.float64)
    with pytest.raises(UserError, match="mean=moved"):
        leace.eraser(torch.eye(3, dtype=torch.float64), mean[:, None], mean)


@pytest.mark.parametrize("mean", ["held", "moved"])
@pytest.mark.parametrize("contrast", ["captions", "anchor"])
def test_all_projections_map_the_concept_to_the_contrast(
    contrast: str, mean: str, new_backbone: Any, new_pairs: Any
) -> None:
    backbone = new_backbone()
    pairs = new_pairs(backbone, CAT, DOG)
    settings: dict[str, Any] = {"contrast": contrast, "mean": mean}
    edit = LinearErasure(**settings)(backbone, pairs, [])
    assert edit.map is not None and edit.projections == (KEYS, VALUES) and edit.info["rank"] == 2

    def rows_of(sides: list[Any]) -> Tensor:
        return torch.cat([s.states[i, int(first) :].double() for s in sides for i, first in enumerate(s.first)])

    captions = priors.CAPTIONS.read_text(encoding="utf-8").splitlines()
    others = rows_of([pair.anchor for pair in pairs])
    others = backbone.encode(captions).states.flatten(0, 1).double() if contrast == "captions" else others
    classes = [rows_of([pair.target]) for pair in pairs] + [others]
    goal = edit.map @ classes[-1].mean(dim=0)
    for rows in classes[:-1]:
        assert torch.allclose(edit.map @ rows.mean(dim=0), goal, atol=1e-4)
    whole = torch.cat(classes).mean(dim=0)
    assert torch.allclose(edit.map @ whole, whole, atol=1e-4) == (mean == "held")
    assert LinearErasure("values", **settings)(backbone, pairs, []).projections == (VALUES,)
    assert not torch.equal(LinearErasure(shrinkage=False, **settings)(backbone, pairs, []).map, edit.map)


def test_a_concept_that_is_its_own_contrast_is_unchanged(new_backbone: Any, new_pairs: Any) -> None:
    backbone = new_backbone()
    edit = LinearErasure(contrast="anchor")(backbone, new_pairs(backbone, ("cat", "cat")), [])
    assert torch.allclose(edit.map, torch.eye(backbone.width, dtype=torch.float64), atol=1e-9)


def test_captions_from_a_file(new_backbone: Any, new_pairs: Any, tmp_path: Path) -> None:
    backbone, file = new_backbone(), tmp_path / "sum.safetensors"
    priors.accumulate(backbone, ["a bird", "the sea"], file, "captions")
    pairs = new_pairs(backbone, CAT)
    first, second = (LinearErasure(captions=captions)(backbone, pairs, []).map for captions in (file, "everyday"))
    assert not torch.allclose(first, second)
    with pytest.raises(UserError, match="contrast"):
        LinearErasure(captions=file, contrast="anchor")


@pytest.mark.parametrize(
    "settings", [{"projections": "all"}, {"rows": "x"}, {"contrast": "nothing"}, {"mean": 1}, {"shrinkage": "x"}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(LinearErasure, **settings)
