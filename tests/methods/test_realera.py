"""RealEra's parts against slow, obvious loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from options import built
from realera.contracts import Edit, LoraSpec, Moments, Neighbours, Pair, TextStates, TrainingBatch, UserError
from realera.methods.realera import ClosedForm, Mining, NoiseAlignment
from realera.mining.band import Band
from realera.mining.sampling import align_rows, fit_band


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def backbone(new_backbone: Callable[..., Any]) -> Any:
    return new_backbone()


@pytest.fixture
def pair(backbone: Any, new_pairs: Callable[..., list[Pair]]) -> Pair:
    """One name has several sub-tokens, so the rows shift."""
    return new_pairs(backbone, ("mona lisa", "person"))[0]


# --- mining ----------------------------------------------------------------------------------------------------------


def test_mining_counts(pair: Pair) -> None:
    prompts = len(pair.target.states)
    found = Mining(m=2, n=3)(pair, seeded())
    assert (len(found.near), len(found.near_targets), len(found.beyond)) == (2 * prompts, 2 * prompts, 3 * prompts)
    assert found.moments is None


def test_a_step_mines_its_own_counts_and_prompt(pair: Pair) -> None:
    found = Mining(m=float("inf"), n=float("inf"))(pair, seeded(), m=1, n=2, prompts=[1])
    assert (len(found.near), len(found.beyond), found.moments) == (1, 2, None)
    kept = ~found.near_rows[0]
    assert torch.equal(found.near[0, kept], pair.target.states[1, kept])
    assert not torch.equal(found.near[0], pair.target.states[1])


def test_n_0_mines_no_points_beyond_in_a_step(pair: Pair) -> None:
    assert len(Mining(n=0)(pair, seeded(), m=1, n=1).beyond) == 0


def test_a_single_prompt_is_mined_in_the_band_of_all(pair: Pair) -> None:
    """Targets lie within d1 / 2 of the anchor, d1 from the mean row of all prompts, one of which is shrunk here."""
    e, e_star, mask = align_rows(pair, "suffix")
    states = e.clone()
    states[1, mask[1]] *= 0.5
    c = pair.target
    shrunk = Pair(pair.concept, TextStates(states, c.first, c.last, c.length), pair.anchor)
    targets = Mining(m=100, n=0)(shrunk, seeded(), prompts=[1]).near_targets
    farthest = float((targets[:, mask[1]] - e_star[1, mask[1]]).norm(dim=-1).max())
    own, whole = (fit_band(Band(), states[p], mask[p]).d1_anchor for p in ([1], [0, 1, 2]))
    assert own is not None and whole is not None
    assert own < 0.8 * whole < farthest <= whole


# --- closed form -----------------------------------------------------------------------------------------------------


def slow_map(
    backbone: Any, pairs: list[Pair], mined: list[Neighbours], lam: float, ridge: float, keep: list[str]
) -> Tensor:
    """Equation 7 with one row at a time."""
    left = ridge * torch.eye(32, dtype=torch.float64)
    right = left.clone()

    def ask(key: Tensor, anchor: Tensor, weight: float) -> None:
        nonlocal left, right
        left = left + weight * torch.outer(anchor.double(), key.double())
        right = right + weight * torch.outer(key.double(), key.double())

    for pair in pairs:
        c, a = pair.target, pair.anchor
        for p in range(len(c.states)):
            for row in range(int(c.first[p]), 77):
                partner = max(row - int(c.last[p]) + int(a.last[p]), int(a.first[p]))
                if partner < 77:
                    ask(c.states[p, row], a.states[p, partner], 1.0)
    for found in mined:
        for s, row in found.near_rows.nonzero().tolist():
            ask(found.near[s, row], found.near_targets[s, row], 1.0)
        for s, row in found.beyond_rows.nonzero().tolist():
            ask(found.beyond[s, row], found.beyond[s, row], lam)
    for text in keep:
        for row in backbone.encode([text]).states[0, 1:]:
            ask(row, row, lam)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("mining", [None, Mining(m=2, n=0), Mining(m=1, n=2)], ids=["no mining", "n=0", "m=1 n=2"])
def test_equation_7(mining: Mining | None, backbone: Any, new_pairs: Callable[..., list[Pair]]) -> None:
    pairs = new_pairs(backbone, ("mona lisa", "person"), ("cat", "field"))
    mined = [] if mining is None else [mining(pair, seeded(i)) for i, pair in enumerate(pairs)]
    edit = ClosedForm(lambda_preserve=0.3, ridge=0.2, preserve_prompts=["a dog", "sky"])(backbone, pairs, mined)
    assert edit.map is not None
    assert torch.allclose(edit.map, slow_map(backbone, pairs, mined, 0.3, 0.2, ["a dog", "sky"]), atol=1e-7)
    assert edit.info["rows_near"] == sum(int(found.near_rows.sum()) for found in mined)
    assert edit.info["rows_beyond"] == sum(int(found.beyond_rows.sum()) for found in mined)


def test_the_ridge_is_relative_to_the_sums(backbone: Any, pair: Pair) -> None:
    """Twice the prompts, or states of twice the norm, give the same map."""
    edit = ClosedForm(relative_ridge=0.1)
    once = edit(backbone, [pair], [])
    sums = slow_sums(pair, 0.0)[1]
    assert once.info["ridge"] == pytest.approx(0.1 * float(torch.linalg.eigvalsh(sums).mean()))
    twice = edit(backbone, [pair, pair], [])
    longer = Pair(pair.concept, *(replace(side, states=2 * side.states) for side in (pair.target, pair.anchor)))
    for other in (twice, edit(backbone, [longer], [])):
        assert once.map is not None and other.map is not None
        assert torch.allclose(other.map, once.map, atol=1e-9)
    assert torch.allclose(ClosedForm(ridge=once.info["ridge"])(backbone, [pair], []).map, once.map)  # type: ignore[arg-type]


def test_preserved_captions(backbone: Any, pair: Pair, tmp_path: Path) -> None:
    """Each of their rows counts as a preserved row, including BOS, as in MACE's caches."""
    from realera.methods.priors import accumulate

    captions = ["a dog", "the sea and a ship"]
    accumulate(backbone, captions, tmp_path / "sum", "captions")
    kept = ClosedForm(ridge=0.2, prior_cache=str(tmp_path / "sum"), prior_weight=0.3)(backbone, [pair], []).map
    rows = backbone.encode(captions).states.flatten(0, 1)
    slow_left, slow_right = slow_sums(pair, 0.2)
    for row in rows:
        slow_left = slow_left + 0.3 * torch.outer(row.double(), row.double())
        slow_right = slow_right + 0.3 * torch.outer(row.double(), row.double())
    assert kept is not None
    assert torch.allclose(kept, slow_left @ torch.linalg.inv(slow_right), atol=1e-7)


def slow_sums(pair: Pair, ridge: float) -> tuple[Tensor, Tensor]:
    """Equation 7's two sums for one pair, without mined or preserved rows."""
    e, e_star, mask = align_rows(pair, "suffix")
    left = ridge * torch.eye(32, dtype=torch.float64)
    right = left.clone()
    for key, anchor in zip(e[mask].double(), e_star[mask].double()):
        left, right = left + torch.outer(anchor, key), right + torch.outer(key, key)
    return left, right


def test_infinitely_many_points_are_the_limit_of_many(backbone: Any, pair: Pair) -> None:
    count = 1500
    infinite = Mining(m=float("inf"), n=float("inf"), m_weight=count, n_weight=count, rows="concept")
    found = infinite(pair, seeded())
    assert len(found.near) == len(found.beyond) == 0
    exact = ClosedForm(ridge=1.0)(backbone, [pair], [found]).map
    few, many = (
        ClosedForm(ridge=1.0)(
            backbone, [pair], [scaled(Mining(m=k, n=k, rows="concept")(pair, seeded()), count / k)]
        ).map
        for k in (count // 100, count)
    )
    assert exact is not None and few is not None and many is not None
    error = [float((sampled - exact).norm() / exact.norm()) for sampled in (few, many)]
    assert error[1] < 0.04
    assert error[0] > 5 * error[1]  # a hundredth of the points: ten times the error


def scaled(found: Neighbours, weight: float) -> Neighbours:
    """The sums over the sampled points times a weight, as moments, so that few points can have the weight of many."""
    near, target = found.near[found.near_rows].double(), found.near_targets[found.near_rows].double()
    beyond = found.beyond[found.beyond_rows].double()
    sums = Moments(weight * near.T @ near, weight * target.T @ near, weight * beyond.T @ beyond)
    return Neighbours(
        found.near[:0], found.near[:0], found.near_rows[:0], found.beyond[:0], found.beyond_rows[:0], sums
    )


# --- noise alignment -------------------------------------------------------------------------------------------------


def edit_of_the_student() -> Edit:
    return Edit(map=torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(32, 32, generator=seeded(1)).double())


@pytest.fixture
def student(backbone: Any, pair: Pair) -> Any:
    """Edited, with an adapter that is not zero."""
    backbone.apply(edit_of_the_student())
    for parameter in backbone.add_adapter(LoraSpec(rank=2, alpha=2.0), seeded(2)):
        nn.init.normal_(parameter, std=0.1, generator=seeded(3))
    return backbone


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 4, 8, 8, generator=seeded(4)), torch.tensor([3, 250, 600, 999])


def gradients(backbone: Any, loss: Tensor) -> Tensor:
    """The gradients of all trained parameters, concatenated."""
    trained = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]).double()


@pytest.mark.quick(2)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"gamma_role": "loss_terms"}, (1, 0.3, 0.7)),
        ({"gamma_role": "loss_terms_swapped"}, (1, 0.7, 0.3)),
        ({"gamma_role": "step_mix"}, (0.3, 0.7, 0.7)),
        ({"gamma_role": "none"}, (1, 1, 1)),
        ({"gamma_role": "none", "teacher": "closed_form"}, (1, 1, 1)),
        ({"gamma_role": "none", "noise_anchor": "perturbed"}, (1, 1, 1)),
    ],
)
def test_equations_8_and_9(
    step: int,
    settings: dict[str, Any],
    weights: tuple[float, float, float],
    student: Any,
    new_backbone: Callable[..., Any],
    pair: Pair,
) -> None:
    """One latent and one forward at a time, with a second U-Net as the teacher."""
    teacher, (z_t, t) = new_backbone(), batch()
    if settings.get("teacher") == "closed_form":
        teacher.apply(edit_of_the_student())
    align, mining = NoiseAlignment(**settings, m_step=2, n_step=3), Mining()
    terms = align.loss(student, pair, mining, TrainingBatch(z_t, t, step), seeded(5))
    loss = sum(term for term in terms.values() if term.requires_grad)

    generator = seeded(5)
    i = int(torch.randint(3, (1,), generator=generator))
    p_c, p_a = pair.target.states[i], pair.anchor.states[i]
    found = mining(pair, generator, m=2, n=3, prompts=[i])

    def square(b: int, states: Tensor, taught: Tensor) -> Tensor:
        out = student.predict_noise(z_t[b : b + 1], t[b : b + 1], states[None])
        with torch.no_grad():
            target = teacher.predict_noise(z_t[b : b + 1], t[b : b + 1], taught[None])
        return ((out - target) ** 2).mean()

    if step == 1:
        slow = weights[0] * sum(square(b, p_c, p_a) for b in range(4)) / 4
        assert set(terms) - {"align_unweighted"} == {"align"}
    else:
        perturbed = settings.get("noise_anchor") == "perturbed"
        near = sum(square(b, found.near[b % 2], found.near_targets[b % 2] if perturbed else p_a) for b in range(4)) / 4
        beyond = sum(square(b, found.beyond[b % 3], found.beyond[b % 3]) for b in range(4)) / 4
        slow = weights[1] * near + weights[2] * beyond
        unweighted = terms.get("near_unweighted", terms["near"]), terms.get("beyond_unweighted", terms["beyond"])
        assert torch.allclose(torch.stack(unweighted), torch.stack([near, beyond]), rtol=1e-5)
        assert len(terms) == (2 if settings["gamma_role"] == "none" else 4)
    assert isinstance(loss, Tensor) and isinstance(slow, Tensor)
    assert torch.allclose(loss, slow, rtol=1e-5)
    fast, plain = gradients(student, loss), gradients(student, slow)
    assert (fast - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize(("mining", "names"), [(None, {"align"}), (Mining(n=0), {"near", "near_unweighted"})])
def test_even_steps_without_mined_points(mining: Mining | None, names: set[str], student: Any, pair: Pair) -> None:
    terms = NoiseAlignment().loss(student, pair, mining, TrainingBatch(*batch(), 2), seeded(5))
    assert set(terms) == names
    assert all(term > 0 for term in terms.values())


def test_a_step_takes_a_random_prompt(student: Any, pair: Pair) -> None:
    losses = {
        float(NoiseAlignment().loss(student, pair, None, TrainingBatch(*batch(), 1), seeded(seed))["align"].detach())
        for seed in range(8)
    }
    assert len(losses) == len(pair.target.states)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (Mining, {"m": 0}),
        (Mining, {"m": 1.5}),
        (Mining, {"n": -1}),
        (Mining, {"n_weight": 0}),
        (ClosedForm, {"ridge": float("nan")}),
        (ClosedForm, {"relative_ridge": -0.1}),
        (ClosedForm, {"rows": "some"}),
        (ClosedForm, {"lambda_preserve": -0.1}),
        (NoiseAlignment, {"gamma_role": "thresholds"}),
        (NoiseAlignment, {"teacher": "student"}),
        (NoiseAlignment, {"noise_anchor": "target"}),
        (NoiseAlignment, {"steps": -1}),
        (NoiseAlignment, {"lr": 0.0}),
        (NoiseAlignment, {"m_step": float("inf")}),
    ],
)
def test_bad_settings_are_refused(part: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        built(part, **settings)


def test_value_space_is_the_same_algorithm_in_other_coordinates(new_backbone: Any, new_pairs: Any) -> None:
    """Text states multiplied by R, mined and solved in the same way; points and map transformed back by R^-1."""
    from realera.contracts import VALUES, Edit
    from realera.methods.realera import ClosedForm, Mining, value_roots

    backbone = new_backbone()
    (pair,) = new_pairs(backbone, ("cat", "field"))
    there, back = value_roots(backbone)
    assert torch.allclose(there @ back, torch.eye(len(there), dtype=torch.float64), atol=1e-9)
    settings: dict[str, Any] = {"m": 2, "n": 3, "d1": 6.0, "d2": 12.0}
    mining = Mining(space="value", **settings)
    with pytest.raises(RuntimeError, match="prepare"):
        mining(pair, torch.Generator())
    mining.prepare(backbone)
    found = mining(pair, torch.Generator().manual_seed(1))

    def moved(states: Any) -> Any:
        return replace(states, states=(states.states.double() @ there).float())

    seen = replace(pair, target=moved(pair.target), anchor=moved(pair.anchor))
    plain = Mining(**settings)(seen, torch.Generator().manual_seed(1))
    assert torch.allclose(found.near.double() @ there, plain.near.double(), atol=1e-4)
    assert torch.allclose(found.beyond.double() @ there, plain.beyond.double(), atol=1e-4)
    assert torch.equal(found.near_rows, plain.near_rows)

    edit = ClosedForm(space="value")(backbone, [pair], [found])
    slow = ClosedForm()(backbone, [seen], [plain])
    assert edit.map is not None and slow.map is not None
    assert torch.allclose(there @ edit.map @ back, slow.map, atol=1e-4)
    assert edit.projections == (VALUES,) and slow.projections == Edit().projections
    settings |= {"m": float("inf"), "n": float("inf")}
    exact = Mining(space="value", **settings)
    exact.prepare(backbone)
    moments = exact(pair, torch.Generator()).moments
    straight = Mining(**settings)(seen, torch.Generator()).moments
    for name in ("near", "near_cross", "beyond"):
        assert torch.allclose(there @ getattr(moments, name) @ there, getattr(straight, name), rtol=1e-4, atol=1e-3)
