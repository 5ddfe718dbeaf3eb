"""The closed form in value space: what it is derived from by a general solver, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from realera import value_space
from realera.contracts import UserError

D = 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world() -> dict[str, Tensor]:
    """Weights of three layers, rows of captions, two concepts with anchors, and two things to hold."""
    rows = numbers(400, D, seed=1) @ numbers(D, D, seed=2) + numbers(D, seed=3)
    weights = [scale * numbers(width, D, seed=4 + width) for width, scale in ((5, 1.0), (7, 3.0), (20, 0.2))]
    metric = value_space.metric(weights)
    mean = rows.mean(dim=0)
    captions = value_space.covariance(rows.T @ rows, mean, len(rows))
    concepts, anchors, names = numbers(D, 2, seed=8), numbers(D, 2, seed=9), numbers(D, 2, seed=10)
    held = torch.cat([mean[:, None], names], dim=1)
    return locals()


def centred(world: dict[str, Tensor]) -> Tensor:
    return world["concepts"] - world["mean"][:, None]


def solved(world: dict[str, Tensor], price: float = 3.0, **more: float) -> tuple[Tensor, Tensor]:
    quiet = value_space.quiet(world["metric"], world["captions"], price)
    found = value_space.blind(quiet, quiet @ centred(world), world["held"])
    left, right, _ = value_space.projection(found, world["concepts"] - world["anchors"], **more)
    return torch.eye(D, dtype=torch.float64) + left @ right, found


def test_metric_and_covariance_are_the_sums_they_say(world: dict[str, Tensor]) -> None:
    rows, metric, captions = world["rows"], world["metric"], world["captions"]
    plain = sum(weight.T @ weight for weight in world["weights"])
    assert torch.allclose(metric / metric[0, 0], plain / plain[0, 0])
    assert float(metric.trace()) == pytest.approx(D) and float(captions.trace()) == pytest.approx(D)
    covariance = torch.cov(rows.T, correction=0)
    assert torch.allclose(captions, covariance * D / covariance.trace())
    equal = value_space.metric(world["weights"], "equal")
    each = sum(weight.T @ weight / weight.square().sum() for weight in world["weights"])
    assert torch.allclose(equal, each * D / each.trace())


def test_a_reading_is_the_quietest_one_that_reads_the_concept_and_is_blind_to_what_is_held(
    world: dict[str, Tensor],
) -> None:
    """The constrained minimisation, solved as it is written by a general solver: over w, with u = G w,

    minimise u^T C u + r ||w||^2  subject to  u^T (e - mu) = 1 and u^T h = 0.

    Its stationary point solves one symmetric system of all w and multipliers. (In G's range w and u are one to one.)
    """
    metric, captions, mean, held = (world[name] for name in ("metric", "captions", "mean", "held"))
    price = 3.0
    _, found = solved(world, price)
    for i in range(2):
        constraints = torch.cat([(world["concepts"][:, i] - mean)[:, None], held], dim=1)
        inner = metric @ captions @ metric + price * torch.eye(D, dtype=torch.float64)
        top = torch.cat([inner, metric @ constraints], dim=1)
        zeros = torch.zeros(constraints.shape[1], constraints.shape[1], dtype=torch.float64)
        system = torch.cat([top, torch.cat([constraints.T @ metric, zeros], dim=1)])
        right = torch.zeros(len(system), dtype=torch.float64)
        right[D] = 1
        slow = metric @ torch.linalg.solve(system, right)[:D]
        scale = found[:, i] @ (world["concepts"][:, i] - mean)
        assert torch.allclose(found[:, i] / scale, slow, atol=1e-9)


def test_the_map_is_a_projection_that_takes_the_readings_away_and_holds_what_is_held(world: dict[str, Tensor]) -> None:
    map, found = solved(world)
    assert torch.allclose(map @ map, map, atol=1e-9), "idempotent"
    assert torch.allclose(found.T @ map, torch.zeros(2, D, dtype=torch.float64), atol=1e-8), "of every text"
    assert torch.allclose(map @ world["held"], world["held"], atol=1e-9)
    shifts = world["concepts"] - world["anchors"]
    assert torch.allclose(map @ shifts, torch.zeros_like(shifts), atol=1e-9), "no cross-talk between the concepts"
    assert int(torch.linalg.matrix_rank(map)) == D - 2
    text = numbers(D, seed=20)
    moved = map @ text - text
    assert torch.allclose(shifts @ torch.linalg.lstsq(shifts, moved[:, None]).solution[:, 0], moved, atol=1e-9)


def test_a_concept_and_its_own_anchor_are_one_text_then(world: dict[str, Tensor]) -> None:
    map, _ = solved(world)
    gone, there = map @ world["concepts"], map @ world["anchors"]
    assert torch.allclose(gone, there, atol=1e-9)
    assert float((gone[:, 0] - there[:, 1]).norm()) > 0.1, "and not the other's"


def test_the_gain_scales_the_change(world: dict[str, Tensor]) -> None:
    eye = torch.eye(D, dtype=torch.float64)
    whole = solved(world)[0]
    assert torch.equal(solved(world, gain=0.0)[0], eye)
    assert torch.allclose(solved(world, gain=1.5)[0], eye + 1.5 * (whole - eye))


def test_a_concept_that_is_its_own_anchor_changes_nothing(world: dict[str, Tensor]) -> None:
    same = {**world, "anchors": world["concepts"]}
    assert torch.equal(solved(same)[0], torch.eye(D, dtype=torch.float64))
    one = {**world, "anchors": torch.stack([world["concepts"][:, 0], world["anchors"][:, 1]], dim=1)}
    alone = {**world, "concepts": world["concepts"][:, 1:], "anchors": world["anchors"][:, 1:]}
    assert torch.allclose(solved(one)[0], solved(alone)[0], atol=1e-10)


def test_scales_of_weights_and_of_text_states_mean_nothing(world: dict[str, Tensor]) -> None:
    """So that one price means the same on every backbone."""
    scaled = {
        name: value * 40 if name in ("concepts", "anchors", "held", "mean") else value for name, value in world.items()
    }
    rows = 40 * world["rows"]
    scaled["captions"] = value_space.covariance(rows.T @ rows, rows.mean(dim=0), len(rows))
    scaled["metric"] = value_space.metric([0.01 * weight for weight in world["weights"]])
    assert torch.allclose(solved(scaled)[0], solved(world)[0], atol=1e-9)


def test_texts_that_were_mined_are_read_as_their_goals_ask(world: dict[str, Tensor]) -> None:
    """Against the stationary point of what is minimised, by a general linear solver over u and its multipliers."""
    quiet = value_space.quiet(world["metric"], world["captions"], 3.0)
    columns = torch.cat([centred(world)[:, :1], numbers(D, 4, seed=70)], dim=1)
    goals = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    seen = value_space.blind(quiet, quiet @ columns, world["held"])
    assert torch.equal(value_space.fitted(seen, columns, goals, 0.0), seen[:, 0])
    assert torch.equal(value_space.fitted(seen[:, :1], columns[:, :1], goals[:0], 5.0), seen[:, 0])
    for price in (0.5, 20.0, 1e7):
        weight = price / float(columns[:, 0] @ seen[:, 0])
        others, bounds = columns[:, 1:], torch.cat([columns[:, :1], world["held"]], dim=1)
        hessian = torch.linalg.inv(quiet) + weight * others @ others.T
        count = bounds.shape[1]
        kkt = torch.cat(
            [
                torch.cat([hessian, bounds], dim=1),
                torch.cat([bounds.T, torch.zeros(count, count, dtype=torch.float64)], dim=1),
            ]
        )
        right = torch.cat([weight * others @ goals, torch.ones(1), torch.zeros(count - 1)]).double()
        expected = torch.linalg.solve(kkt, right)[:D]
        found = value_space.fitted(seen, columns, goals, price)
        assert torch.allclose(found, expected, atol=1e-6 * float(expected.norm()))
        assert float(found @ columns[:, 0]) == pytest.approx(1) and float((found @ world["held"]).abs().max()) < 1e-7
    assert torch.allclose(found @ others, goals, atol=1e-3), "and exactly, where the price is high"


def test_a_price_on_names_goes_from_nothing_to_exactly(world: dict[str, Tensor]) -> None:
    quiet = value_space.quiet(world["metric"], world["captions"], 3.0)
    found = quiet @ (world["concepts"] - world["mean"][:, None])

    def read(keep: float) -> float:
        left = value_space.blind(quiet, found, world["names"], keep)
        return float((left.T @ world["names"]).norm())

    sizes = [read(keep) for keep in (0.0, 0.1, 1.0, 10.0, 1e6, math.inf)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 1e-9 * sizes[0]
    assert sizes[0] == float((found.T @ world["names"]).norm())


def test_a_price_beside_what_is_held_is_the_minimum_of_both_and_ends_in_holding_both(world: dict[str, Tensor]) -> None:
    """(u - u0)^T Q^-1 (u - u0) + keep / d ||K^T u||^2 subject to H^T u = 0, by a general solver."""
    quiet = value_space.quiet(world["metric"], world["captions"], 3.0)
    held, names = world["held"][:, :1], world["names"]
    found = value_space.blind(quiet, quiet @ centred(world), held)
    rest = value_space.blind_quiet(quiet, held)
    average = float((names.T @ rest @ names).diagonal().mean())
    inner = torch.linalg.inv(quiet)
    start = quiet @ (world["concepts"] - world["mean"][:, None])
    for keep in (0.3, 5.0):
        top = torch.cat([inner + keep / average * names @ names.T, held], dim=1)
        system = torch.cat([top, torch.cat([held.T, torch.zeros(1, 1, dtype=torch.float64)], dim=1)])
        right = torch.cat([inner @ start, torch.zeros(1, 2, dtype=torch.float64)])
        slow = torch.linalg.solve(system, right)[:D]
        assert torch.allclose(
            value_space.blind(rest, found, names, keep), slow, rtol=1e-6, atol=1e-9 * slow.abs().max()
        )
    both = value_space.blind(quiet, quiet @ centred(world), torch.cat([held, names], dim=1))
    assert torch.allclose(value_space.blind(rest, found, names, 1e12), both, atol=1e-6 * float(both.abs().max()))


def test_more_concepts_than_the_width_need_a_tolerance_and_the_map_stays_finite(world: dict[str, Tensor]) -> None:
    many = {**world, "concepts": numbers(D, 3 * D, seed=30), "anchors": numbers(D, 3 * D, seed=31)}
    with pytest.raises(UserError, match="told"):
        solved(many)
    map, _ = solved(many, tolerance=0.1)
    assert bool(torch.isfinite(map).all())
    few = solved(world, tolerance=1e-9)[0]
    assert torch.allclose(few, solved(world)[0], atol=1e-6)


def differing(world: dict[str, Tensor], rows: int = 40, rank: int = 5) -> list[Tensor]:
    """For each concept rows of it less its anchor's, (rows, D): their mean is the shift, and they differ in `rank`
    directions around it."""
    shifts = (world["concepts"] - world["anchors"]).T
    around = [numbers(rows, rank, seed=40 + i) @ numbers(rank, D, seed=50 + i) for i in range(2)]
    return [each - each.mean(dim=0) + shift for each, shift in zip(around, shifts)]


def test_further_directions_bring_the_space_nearest_to_the_values_of_all_rows(world: dict[str, Tensor]) -> None:
    """Against a general minimiser: of all spaces of three directions with the shift in them, in the values of three
    layers, which are not R k but lie to one another as those do."""
    (rows, _), shift = differing(world), world["concepts"][:, 0] - world["anchors"][:, 0]
    weights = torch.cat(world["weights"])
    more = value_space.further_directions(rows, shift, world["metric"], 2)

    def missed(columns: Tensor) -> Tensor:
        basis, _ = torch.linalg.qr(weights @ torch.cat([shift[:, None], columns], dim=1))
        values = weights @ rows.T
        return (values - basis @ (basis.T @ values)).square().sum()

    free = (more + numbers(D, 2, seed=60)).requires_grad_(True)
    search = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        search.zero_grad()
        loss = missed(free)
        loss.backward()
        return loss

    search.step(step)
    assert float(missed(more)) == pytest.approx(float(missed(free.detach())), rel=1e-6)
    assert float(missed(more)) < 0.9 * float(missed(numbers(D, 2, seed=61)))
    both = torch.cat([shift[:, None], more], dim=1)
    products = both.T @ world["metric"] @ both
    assert torch.allclose(products[1:, 1:], torch.eye(2, dtype=torch.float64), atol=1e-9), "of length 1 in the values"
    assert torch.allclose(products[0, 1:], torch.zeros(2, dtype=torch.float64), atol=1e-8)


def test_further_directions_are_projected_out_and_what_is_held_stays(world: dict[str, Tensor]) -> None:
    shifts = world["concepts"] - world["anchors"]
    more = torch.cat(
        [
            value_space.further_directions(rows, shift, world["metric"], 2)
            for rows, shift in zip(differing(world), shifts.T)
        ],
        dim=1,
    )
    quiet = value_space.quiet(world["metric"], world["captions"], 3.0)
    found = value_space.blind(quiet, quiet @ torch.cat([centred(world), more], dim=1), world["held"])
    plain = value_space.blind(quiet, quiet @ centred(world), world["held"])
    assert torch.allclose(found[:, :2], plain), "a direction more does not change the other readings"
    every = torch.cat([shifts, more], dim=1)
    left, right, _ = value_space.projection(found, every)
    map = torch.eye(D, dtype=torch.float64) + left @ right
    assert torch.allclose(map @ map, map, atol=1e-8), "idempotent"
    assert torch.allclose(found.T @ map, torch.zeros(6, D, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(map @ world["held"], world["held"], atol=1e-9)
    assert torch.allclose(map @ every, torch.zeros_like(every), atol=1e-8)
    assert int(torch.linalg.matrix_rank(map, atol=1e-8)) == D - 6


def test_no_more_directions_than_there_are(world: dict[str, Tensor]) -> None:
    (rows, _), shift = differing(world, rank=2), world["concepts"][:, 0] - world["anchors"][:, 0]
    with pytest.raises(UserError, match=r"method\.edit\.directions=4 is more than the 3 "):
        value_space.further_directions(rows, shift, world["metric"], 3)
    nothing = value_space.further_directions(torch.zeros_like(rows), torch.zeros_like(shift), world["metric"], 3)
    assert torch.equal(nothing, torch.zeros(D, 3, dtype=torch.float64)), "a concept that is its own anchor"
    flat = torch.zeros(D, D, dtype=torch.float64)
    flat[0, 0] = D  # the U-Net reads one number, which the shift spans
    with pytest.raises(UserError, match="more than the 1 "):
        value_space.further_directions(rows, shift, flat, 1)


def test_what_cannot_be_told_apart_is_refused(world: dict[str, Tensor]) -> None:
    like = {**world, "anchors": world["concepts"] + world["names"]}  # which are held, so not read
    with pytest.raises(UserError, match="anchor="):
        solved(like)
    twice = {**world, "concepts": world["concepts"][:, [0, 0]], "anchors": world["anchors"][:, [0, 0]]}
    with pytest.raises(UserError, match="from one another"):
        solved(twice)
    kept = {**world, "held": torch.cat([world["held"], world["concepts"]], dim=1)}
    with pytest.raises(UserError, match="preserved names"):
        solved(kept)
    with pytest.raises(UserError, match=r"method\.edit\.price=0"):
        value_space.quiet(world["metric"], torch.zeros(D, D, dtype=torch.float64), 0.0)
