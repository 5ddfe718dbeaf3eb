import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from realera.closed_form import FEW, NormalEquations, compose, fuse, interpolate, relative_change, spectrum
from realera.contracts import UserError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def by_the_book(original: Tensor, triples: list[tuple[Tensor, Tensor, float]], ridge: float) -> Tensor:
    """One layer's normal equations, row by row: triples (key, value, weight)."""
    width = original.shape[1]
    left, right = ridge * original, ridge * torch.eye(width, dtype=torch.float64)
    for key, value, weight in triples:
        left = left + weight * torch.outer(value, key)
        right = right + weight * torch.outer(key, key)
    return left @ torch.linalg.inv(right)


@settings(max_examples=40)
@given(
    width=st.integers(2, 12),
    pairs=st.integers(1, 15),
    preserved=st.integers(0, 15),
    ridge=st.floats(0.05, 100),
    preserve=st.floats(0.01, 10),
    seed=st.integers(0, 10_000),
)
def test_one_map_solves_every_layer(width, pairs, preserved, ridge, preserve, seed):
    keys, anchors, kept = randn(3, max(pairs, preserved), width, seed=seed)
    weights = randn(pairs, seed=seed + 1).abs() + 0.1
    equations = NormalEquations(width).add_pairs(keys[:pairs], anchors[:pairs], weights)
    equations.add_preserved(kept[:preserved], preserve)
    found, info = equations.solve(ridge)
    for out in (3, 2 * width):
        original = randn(out, width, seed=out)
        triples = [(k, original @ a, float(w)) for k, a, w in zip(keys, anchors, weights)]
        triples += [(k, original @ k, preserve) for k in kept[:preserved]]
        expected = by_the_book(original, triples, ridge)
        assert (original @ found - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())
    assert found.dtype == torch.float64 and info["condition"] >= 1 and info["residual"] < 1e-10


def test_float32_states_are_summed_in_float64():
    keys = (randn(400, 6) + 100).float()  # nearly collinear: float32 sums lose what tells the rows apart
    found, _ = NormalEquations(6).add_pairs(keys, keys.flip(0)).solve(0.1)
    exact, _ = NormalEquations(6).add_pairs(keys.double(), keys.double().flip(0)).solve(0.1)
    assert torch.equal(found, exact)


def test_parts_add_up():
    keys, anchors = randn(2, 9, 5)
    whole = NormalEquations(5).add_pairs(keys, anchors, 2.0).add_preserved(anchors, 0.5)
    parts = (
        NormalEquations(5)
        .add_pairs(keys[:4], anchors[:4], 2.0)
        .merge(NormalEquations(5).add_pairs(keys[4:], anchors[4:], 2.0))
    )
    parts.add_moments(anchors.T @ anchors, anchors.T @ anchors, 0.5)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.cross, whole.cross)


def test_nothing_asked_changes_nothing():
    torch.testing.assert_close(NormalEquations(7).solve(0.1)[0], torch.eye(7, dtype=torch.float64))
    kept, _ = NormalEquations(7).add_preserved(randn(3, 7)).solve(0.1)
    torch.testing.assert_close(kept, torch.eye(7, dtype=torch.float64))


def test_erased_states_get_their_anchors_answer():
    keys, anchors = randn(2, 3, 8)
    found, _ = NormalEquations(8).add_pairs(keys, anchors).solve(1e-9)
    torch.testing.assert_close(keys @ found.T, anchors, atol=1e-6, rtol=0)


def test_condition_number_is_of_the_regularised_gram():
    keys = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    _, info = NormalEquations(3).add_preserved(keys).solve(0.5)
    assert info["condition"] == pytest.approx(25.5 / 1.5)


@given(width=st.integers(4, 24), ridge=st.floats(1e-3, 100), seed=st.integers(0, 1000), weight=st.floats(0.1, 10))
def test_few_rows_are_solved_by_themselves(width, ridge, seed, weight):
    """The same map as by all D unknowns, as I + L R, and the same condition number."""
    torch.manual_seed(seed)
    count = width // FEW
    keys, anchors = randn(count, width), randn(count, width)
    sums = NormalEquations(width).add_pairs(keys, anchors, weight)
    whole = NormalEquations(width).add_moments(sums.cross, sums.gram)
    assert sums.factors(ridge) is not None and whole.factors(ridge) is None
    (found, info), (wanted, told) = sums.solve(ridge), whole.solve(ridge)
    assert torch.allclose(found, wanted, atol=1e-9) and info["condition"] == pytest.approx(told["condition"], rel=1e-9)
    left, right = sums.factors(ridge)
    assert left.shape == (width, count)
    assert torch.allclose(torch.eye(width, dtype=torch.float64) + left @ right, wanted, atol=1e-9)
    assert sums.factors(0.0) is None and sums.add_preserved(keys).factors(ridge) is None


@pytest.mark.parametrize("rows", [0, 3])
def test_a_singular_system_is_refused_and_the_ridge_named(rows):
    equations = NormalEquations(6).add_preserved(randn(rows, 6))
    with pytest.raises(UserError, match=rf"{rows} of 6 directions.*larger ridge"):
        equations.solve(0.0)


def test_a_determined_system_needs_no_ridge():
    keys, anchors = randn(2, 20, 6)
    found, _ = NormalEquations(6).add_pairs(keys, anchors).solve(0.0)
    torch.testing.assert_close(found.T, torch.linalg.lstsq(keys, anchors).solution)


@pytest.mark.parametrize("ridge", [-0.1, float("nan"), float("inf")])
def test_a_ridge_that_is_no_weight_is_refused(ridge):
    with pytest.raises(UserError, match="ridge"):
        NormalEquations(3).add_preserved(randn(5, 3)).solve(ridge)


def test_states_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        NormalEquations(3).add_preserved(torch.full((2, 3), torch.nan)).solve(0.1)


def test_pairs_that_do_not_pair_are_an_error():
    with pytest.raises(ValueError, match="row by row"):
        NormalEquations(3).add_pairs(randn(4, 3), randn(1, 3))


@settings(max_examples=20)
@given(width=st.integers(2, 8), rows=st.integers(1, 10), ridge=st.floats(0.05, 10), seed=st.integers(0, 1000))
def test_fusing_adapters(width, rows, ridge, seed):
    """Each group's keys are answered as its own adapter does; what is preserved, as the original weights do."""
    keys = randn(3, rows, width, seed=seed)
    kept = randn(4, width, seed=seed + 1)
    weights = {"k": randn(4, width, seed=seed + 2), "v": randn(6, width, seed=seed + 3)}
    originals = {name: weight + 0.1 * randn(*weight.shape, seed=seed + 4) for name, weight in weights.items()}
    changes = {
        name: [(randn(len(weight), 2, seed=seed + i), randn(2, width, seed=seed + 7 + i)) for i in range(3)]
        for name, weight in weights.items()
    }
    fused, info = fuse(weights, changes, [k.T @ k for k in keys], ridge, 0.3 * kept.T @ kept, originals)
    for name, weight in weights.items():
        triples = [(k, (weight + up @ down) @ k, 1.0) for group, (up, down) in zip(keys, changes[name]) for k in group]
        triples += [(k, originals[name] @ k, 0.3) for k in kept]
        expected = by_the_book(weight, triples, ridge)
        assert (fused[name] - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())
    assert 0 <= info["residual"] < 1e-10


def test_adapters_that_do_nothing_leave_the_weights():
    keys, weight = randn(5, 6), randn(9, 6, seed=3)
    nothing = [(torch.zeros(9, 1), randn(1, 6))]
    fused, _ = fuse({"k": weight, "bare": weight}, {"k": nothing}, [keys.T @ keys], 0.2)
    torch.testing.assert_close(fused["k"], weight)
    torch.testing.assert_close(fused["bare"], weight)


def test_one_adapter_is_taken_over_whole_where_its_keys_determine_it():
    keys, weight, up, down = randn(20, 6), randn(9, 6, seed=3), randn(9, 1, seed=4), randn(1, 6, seed=5)
    fused, _ = fuse({"k": weight}, {"k": [(up, down)]}, [keys.T @ keys], 0.0)
    torch.testing.assert_close(fused["k"], weight + up @ down)


def test_what_a_map_does():
    projection = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    weight = torch.tensor([[3.0, 0.0, 4.0]])
    torch.testing.assert_close(spectrum(projection), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert relative_change(weight, projection) == pytest.approx(4 / 5)
    torch.testing.assert_close(interpolate(projection, 0.0), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(interpolate(projection, 1.0), projection)
    assert interpolate(projection, 0.25)[2, 2] == 0.75


def test_composing_maps_is_editing_twice():
    weight, first, second = randn(4, 5), randn(5, 5, seed=1), randn(5, 5, seed=2)
    torch.testing.assert_close(weight @ compose(second, first), (weight @ first) @ second)
