import math
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from realera.closed_form import NormalEquations
from realera.contracts import Concept, Pair, TextStates, UserError
from realera.mining.band import Band, Region, radius_of_cosine
from realera.mining.expectation import polar_moments
from realera.mining.sampling import align_rows, expected_moments, fit_band, mine_beyond, mine_near

WIDTH = 256
F64 = torch.float64


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def states(prompts: int, rows: int, width: int, seed: int = 0, norm: float | None = None) -> Tensor:
    x = torch.randn(prompts, rows, width, generator=seeded(seed))
    spread = torch.linspace(0.9, 1.1, rows)[:, None]  # rows of different norms
    return x / x.norm(dim=-1, keepdim=True) * spread * (norm or math.sqrt(width))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3:], mask[1, 4:6] = True, True
    return states(2, 7, WIDTH), states(2, 7, WIDTH, seed=1), mask


# --- rows ------------------------------------------------------------------------------------------------------------


def numbered(first: list[int], last: list[int], length: list[int], rows: int = 10) -> TextStates:
    """States whose row i contains the number i."""
    count = torch.arange(rows, dtype=torch.float32)[None, :, None].expand(len(first), rows, 2)
    return TextStates(count, torch.tensor(first), torch.tensor(last), torch.tensor(length))


# (target's first, last), (anchor's first, last) -> partner of each row of the concept's suffix
ALIGNED = [
    ((3, 3), (3, 3), [3, 4, 5, 6, 7, 8, 9]),
    ((3, 5), (3, 3), [3, 3, 3, 4, 5, 6, 7]),  # longer target: its first sub-tokens share the anchor's only one
    ((3, 3), (3, 5), [5, 6, 7, 8, 9]),  # longer anchor: the two last rows have no partner
    ((3, 4), (3, 5), [4, 5, 6, 7, 8, 9]),
]


@pytest.mark.parametrize(("target", "anchor", "partners"), ALIGNED)
def test_last_sub_tokens_are_paired(target, anchor, partners):
    pair = Pair(
        Concept("c", "a"),
        numbered([target[0]], [target[1]], [target[1] + 2]),
        numbered([anchor[0]], [anchor[1]], [anchor[1] + 2]),
    )
    e, e_star, mask = align_rows(pair, "suffix")
    assert mask[0].tolist() == [3 <= i < 3 + len(partners) for i in range(10)]
    assert e_star[0, mask[0], 0].tolist() == partners
    assert e[0, :, 0].tolist() == list(range(10)) and e_star[0, :3, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        ("suffix", range(3, 10)),
        ("concept", range(3, 5)),
        ("to_eos", range(3, 7)),
        ("all_but_bos", range(1, 10)),
        ("all", range(10)),
    ],
)
def test_counted_rows(rows, counted):
    pair = Pair(Concept("c", "a"), numbered([3], [4], [6]), numbered([3], [4], [6]))
    e, e_star, mask = align_rows(pair, rows)
    assert mask[0].nonzero()[:, 0].tolist() == list(counted)
    assert torch.equal(e, e_star)


def test_prompts_are_aligned_one_by_one():
    pair = Pair(Concept("c", "a"), numbered([3, 5], [3, 6], [5, 8]), numbered([3, 5], [4, 5], [6, 7]))
    _, e_star, mask = align_rows(pair, "suffix")
    assert mask.sum(1).tolist() == [6, 5]
    assert e_star[0, mask[0], 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert e_star[1, mask[1], 0].tolist() == [5, 5, 6, 7, 8]


def test_a_prompt_without_the_concept_is_refused():
    pair = Pair(Concept("cat", "dog"), numbered([3, -1], [3, -1], [5, 9]), numbered([3, 3], [3, 3], [5, 5]))
    with pytest.raises(UserError, match="all of 'cat'"):
        align_rows(pair, "suffix")


# --- mining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["independent", "shared"])
@pytest.mark.parametrize("direction", ["backward", "isotropic"])
@pytest.mark.parametrize(("s_hi", "s_lo"), [(1.0, 0.7), (0.9, 0.6)])
def test_near_points_are_in_the_band(prompts, direction, sharing, s_hi, s_lo):
    e, e_star, mask = prompts
    band = fit_band(Band(s_hi=s_hi, s_lo=s_lo, direction=direction, noise_sharing=sharing), e, mask)
    near, targets, rows = mine_near(e, e_star, mask, band, 20, seeded())
    key, anchor = e.repeat_interleave(20, 0), e_star.repeat_interleave(20, 0)
    assert near.shape == targets.shape == (40, 7, WIDTH) and near.dtype == e.dtype
    assert torch.equal(rows, mask.repeat_interleave(20, 0))
    assert torch.equal(near[~rows], key[~rows]) and torch.equal(targets[~rows], anchor[~rows])
    cosine, distance = cosines(key, near)[rows], (near - key).norm(dim=-1)[rows]
    assert cosine.min() >= s_lo - 1e-6 and cosine.max() <= s_hi + 1e-6
    assert band.d1 is not None and distance.max() < band.d1 * (1 + 1e-6)
    assert distance.min() < radius_of_cosine(s_hi, float(e[mask].norm(dim=-1).mean()), WIDTH, direction) + 0.2 * band.d1
    # Line 6: the target moves along the key's direction, by its own distance below D1'.
    moved = targets - anchor
    assert cosines(moved, near - key)[rows].min() > 0.999
    assert (
        band.d1_anchor is not None and 0.8 * band.d1_anchor < moved.norm(dim=-1)[rows].max() < band.d1_anchor * 1.0001
    )


def test_beyond_points_are_outside_the_band(prompts):
    e, _, mask = prompts
    band = fit_band(Band(), e, mask)
    beyond, rows = mine_beyond(e, mask, band, 30, seeded())
    key = e.repeat_interleave(30, 0)
    assert beyond.shape == (60, 7, WIDTH) and torch.equal(rows, mask.repeat_interleave(30, 0))
    assert torch.equal(beyond[~rows], key[~rows])
    assert cosines(key, beyond)[rows].max() < 0.7
    distance = (beyond - key).norm(dim=-1)[rows]
    assert band.d1 is not None and band.d2 is not None
    assert band.d1 * 0.9999 <= distance.min() and distance.max() < band.d2 * 1.0001


def test_points_move_towards_noise(prompts):
    """Equation 5: e + eta = (1 - alpha) e + alpha v, alpha = r/||v - e||, so v can be read back from a point."""
    e, e_star, mask = prompts
    near, _, rows = mine_near(e, e_star, mask, Band(), 200, seeded())
    key = e.repeat_interleave(200, 0)[rows].double()
    step = near[rows].double() - key
    v_hat = step / step.norm(dim=-1, keepdim=True)
    # ||v - e|| is about sqrt(rho^2 + d), and v is the point minus the share of e
    v = key + v_hat * torch.sqrt(key.norm(dim=-1) ** 2 + WIDTH)[:, None]
    assert abs(float(v.mean())) < 0.01 and float(v.var()) == pytest.approx(1, abs=0.02)
    assert float(cosines(v, key).mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("sharing", "rank"), [("independent", 60), ("shared", 15)])
def test_rank_of_the_noise(sharing, rank):
    """A shared v adds one direction per sample, independent ones add one per row and sample."""
    e, mask = states(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.bool)
    near, _, rows = mine_near(e, e, mask, Band(s_lo=0.5, d1=5.0, noise_sharing=sharing), 15, seeded())
    across = near[rows].double() @ (torch.eye(WIDTH) - torch.linalg.pinv(e[0]) @ e[0]).double()
    assert int(torch.linalg.matrix_rank(across, rtol=1e-4)) == rank


def test_targets_equal_the_anchor_at_distance_0(prompts):
    e, e_star, mask = prompts
    _, targets, _ = mine_near(e, e_star, mask, Band(d1_anchor=0), 3, seeded())
    assert torch.equal(targets, e_star.repeat_interleave(3, 0))


def test_own_direction_is_computed_at_the_anchor(prompts):
    e, e_star, mask = prompts
    _, targets, rows = mine_near(e, e_star, mask, Band(anchor_dir="own"), 50, seeded())
    anchor = e_star.repeat_interleave(50, 0)[rows]
    # backwards along e*: cos(e*, v_hat*) = -rho/sqrt(rho^2 + d)
    assert float(cosines(targets[rows] - anchor, anchor).mean()) == pytest.approx(-0.707, abs=0.02)
    _, shared, _ = mine_near(e, e_star, mask, Band(), 50, seeded())
    assert abs(float(cosines(shared[rows] - anchor, anchor).mean())) < 0.1


def test_zero_filter_resets_points_that_rejection_redraws(prompts):
    e, e_star, mask = prompts
    band = Band(s_hi=0.9, s_lo=0.6, filter="zero")
    near, targets, rows = mine_near(e, e_star, mask, band, 100, seeded())
    still = (near == e.repeat_interleave(100, 0)).all(-1)[rows]
    assert torch.equal(still, (targets == e_star.repeat_interleave(100, 0)).all(-1)[rows])
    assert 0.3 < float(still.float().mean()) < 0.8
    cosine = cosines(e.repeat_interleave(100, 0), near)[rows][~still]
    assert cosine.min() >= 0.6 and cosine.max() <= 0.9


def test_volume_law_fills_the_ball():
    e, mask = states(1, 1, 3, norm=1.0), torch.ones(1, 1, dtype=torch.bool)
    band = Band(s_lo=-1.0, d1=0.8, radius_law="volume")
    near, _, _ = mine_near(e, e, mask, band, 4000, seeded())
    inside = ((near - e).norm(dim=-1) < 0.4).double().mean()
    assert float(inside) == pytest.approx(1 / 8, abs=0.02)


def test_flat_unit_is_one_vector_per_prompt(prompts):
    e, e_star, mask = prompts
    band = fit_band(Band(unit="flat"), e, mask)
    assert band.d1 is not None and band.d2 is not None
    near, targets, rows = mine_near(e, e_star, mask, band, 10, seeded())
    beyond, _ = mine_beyond(e, mask, band, 10, seeded())
    for i, here in enumerate(mask):
        sample = slice(10 * i, 10 * i + 10)
        flat, key, far = near[sample, here].flatten(1), e[i, here].flatten()[None], beyond[sample, here].flatten(1)
        assert cosines(flat, key).min() >= 0.7 - 1e-6 and cosines(far, key).max() < 0.7
        assert (flat - key).norm(dim=1).max() < band.d1 and band.d1 <= (far - key).norm(dim=1).min() + 1e-3
        moved = (targets[sample, here] - e_star[i, here]).flatten(1)
        assert cosines(moved, flat - key).min() > 0.999
    assert (near - e.repeat_interleave(10, 0)).norm(dim=-1)[rows].max() < band.d1


def test_literal_break_draws_once(prompts):
    e, _, mask = prompts
    band = Band(d1=5.0, literal_break=True)  # about half the draws of [5, d2) are near
    beyond, rows = mine_beyond(e, mask, band, 25, seeded())
    assert len(beyond) == 2 and 0 < rows.sum() < mask.sum()
    assert torch.equal(beyond[~rows], e[~rows]) and cosines(e, beyond)[rows].max() < 0.7


def test_no_beyond_points(prompts):
    e, _, mask = prompts
    beyond, rows = mine_beyond(e, mask, Band(), 0, seeded())
    assert beyond.shape == (0, 7, WIDTH) and rows.shape == (0, 7)


def test_the_seed_determines_the_points(prompts):
    e, e_star, mask = prompts
    one, two, other = (mine_near(e, e_star, mask, Band(), 2, seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_some_prompts_of_a_concept_are_mined_in_its_band(prompts):
    e, _, mask = prompts
    band = fit_band(Band(), e, mask)
    assert fit_band(band, e[:1] * 2, mask[:1]) == band
    assert fit_band(Band(), e[:1] * 2, mask[:1]) != band


def test_a_band_that_rows_cannot_reach_is_refused(prompts):
    e, e_star, mask = prompts
    with pytest.raises(UserError, match=r"d1=4 reaches only cosines from .* raise d1 above"):
        mine_near(e, e_star, mask, Band(d1=4.0, s_hi=0.9), 2, seeded())
    # The mean row reaches it and one row does not: the tries run out.
    uneven = e.clone()
    uneven[0, 3] *= 3
    band = Band(d1=10.0, s_hi=0.95)
    with pytest.raises(UserError, match=r"1 rows of norm about 4\d\.\d keep fewer than one draw in 1000"):
        mine_near(uneven, e_star, mask, band, 2, seeded())
    with pytest.raises(UserError, match=r"1 rows of norm about 4\d\.\d keep fewer than one draw in 1000"):
        expected_moments(uneven, e_star, mask, band, m_weight=5)


def test_zero_states_are_refused(prompts):
    e, e_star, mask = prompts
    with pytest.raises(UserError, match="empty or zero"):
        mine_near(e * 0, e_star, mask, Band(), 2, seeded())


# --- the exact expectation -------------------------------------------------------------------------------------------

SAMPLES = 20_000


def z_scores(left: Tensor, right: Tensor, mask: Tensor, expected: Tensor) -> Tensor:
    """(sample mean of sum_rows left right^T - expected) in standard errors; left, right (S, T, D), mask (S, T)."""
    left, right = (x.double() * mask[..., None] for x in (left, right))
    products = left.transpose(1, 2) @ right
    error = products.std(0) / math.sqrt(len(products))
    return ((products.mean(0) - expected) / (error + 1e-9)).abs()


BANDS = [
    Band(),
    Band(s_hi=0.9, s_lo=0.5),
    Band(d1=1.5, d1_anchor=2.0, d2=6.0),
    Band(direction="isotropic", d2=9.0),
    Band(radius_law="volume"),
    Band(noise_sharing="shared", s_hi=0.95),
    Band(filter="zero", s_hi=0.95),
    Band(unit="flat"),
    Band(unit="flat", direction="isotropic", s_hi=0.9, s_lo=0.6, d2=20.0),
]


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "band", BANDS, ids=lambda band: ",".join(f"{k}={v}" for k, v in vars(band).items() if v != vars(Band())[k])
)
def test_samples_converge_to_the_expectation(band):
    e, e_star = states(1, 3, 10), states(1, 3, 10, seed=1)
    mask = torch.tensor([[False, True, True]])
    moments = expected_moments(e, e_star, mask, band, m_weight=1.0, n_weight=1.0)
    near, targets, near_rows = mine_near(e, e_star, mask, band, SAMPLES, seeded(2))
    beyond, beyond_rows = mine_beyond(e, mask, band, SAMPLES, seeded(3))
    assert moments.near is not None and moments.near_cross is not None and moments.beyond is not None
    assert z_scores(near, near, near_rows, moments.near).max() < 5
    assert z_scores(targets, near, near_rows, moments.near_cross).max() < 5
    assert z_scores(beyond, beyond, beyond_rows, moments.beyond).max() < 5


@pytest.mark.slow
def test_expectation_at_a_text_encoders_width():
    """256 dimensions, tested along e, e*, a direction orthogonal to both, and by the trace."""
    e, e_star, mask = states(1, 1, WIDTH), states(1, 1, WIDTH, seed=1), torch.ones(1, 1, dtype=torch.bool)
    moments = expected_moments(e, e_star, mask, Band(), m_weight=1.0, n_weight=1.0)
    near, targets, _ = mine_near(e, e_star, mask, Band(), SAMPLES, seeded(2))
    beyond, _ = mine_beyond(e, mask, Band(), SAMPLES, seeded(3))
    axes = torch.linalg.qr(torch.cat([e[0], e_star[0], states(1, 1, WIDTH, seed=4)[0]]).double().T).Q
    here = torch.ones(SAMPLES, 1, dtype=torch.bool)
    for left, right, expected in (
        (near, near, moments.near),
        (targets, near, moments.near_cross),
        (beyond, beyond, moments.beyond),
    ):
        assert expected is not None
        seen = (left.double() @ axes, right.double() @ axes)
        assert z_scores(*seen, here, axes.T @ expected @ axes).max() < 5
        whole = (left.double() * right.double()).sum((1, 2))
        assert abs(whole.mean() - expected.trace()) < 5 * whole.std() / math.sqrt(SAMPLES)


def test_expectation_carries_weights_and_adds_prompts(prompts):
    e, e_star, mask = prompts
    band = fit_band(Band(), e, mask)
    both = expected_moments(e, e_star, mask, band, m_weight=5.0, n_weight=25.0)
    each = [expected_moments(e[i : i + 1], e_star[i : i + 1], mask[i : i + 1], band, 1.0, 1.0) for i in (0, 1)]
    assert both.near is not None and both.near_cross is not None and both.beyond is not None
    torch.testing.assert_close(both.near, 5 * (each[0].near + each[1].near))
    torch.testing.assert_close(both.near_cross, 5 * (each[0].near_cross + each[1].near_cross))
    torch.testing.assert_close(both.beyond, 25 * (each[0].beyond + each[1].beyond))
    only_far = expected_moments(e, e_star, mask, band, n_weight=25.0)
    assert only_far.near is None and only_far.near_cross is None and torch.equal(only_far.beyond, both.beyond)


def test_sharing_noise_changes_no_expectation(prompts):
    e, e_star, mask = prompts
    own, shared = (expected_moments(e, e_star, mask, Band(noise_sharing=s), 1.0) for s in ("independent", "shared"))
    assert torch.equal(own.near, shared.near) and torch.equal(own.near_cross, shared.near_cross)


@pytest.mark.parametrize("direction", ["backward", "isotropic"])
@pytest.mark.parametrize(("cos_min", "cos_max"), [(0.7, 1.0), (0.5, 0.9), (-1.0, 0.7)])
def test_quadrature_agrees_with_a_fine_grid(direction, cos_min, cos_max):
    """The scalars against a plain sum over values of v_par and r, at two values of v_perp."""
    rho, length = 16.0, WIDTH
    region = Region(4.0, 22.0, 0.0, cos_min, cos_max)
    found = polar_moments(torch.tensor([rho], dtype=F64), length, region, direction, 1.0)
    # chi(255) to third order: two points, one standard deviation either side of its mean
    mean = math.sqrt(2) * math.exp(math.lgamma(128) - math.lgamma(127.5))
    spread = math.sqrt(255 - mean**2)
    v_par = torch.linspace(-7, 7, 301, dtype=F64)[:, None]
    r = torch.linspace(4.0, 22.0, 2001, dtype=F64)[:-1] + 18 / 4000
    weight = torch.exp(-(v_par**2) / 2)
    sums = torch.zeros(7, dtype=F64)
    total = 0.0
    for v_perp in (mean - spread, mean + spread):
        ahead = v_par - rho if direction == "backward" else v_par
        c, s = (x / torch.sqrt(ahead**2 + v_perp**2) for x in (ahead, torch.full_like(ahead, v_perp)))
        cosine = (rho + r * c) / torch.sqrt((rho + r * c) ** 2 + (r * s) ** 2)
        kept = weight * ((cos_min <= cosine) & (cosine <= cos_max))
        each = (1.0, c, r * c, r * c * c, r * s * s, (r * c) ** 2, (r * s) ** 2)
        sums += torch.stack([(kept * q).sum() for q in each])
        total += float(weight.sum()) * len(r)
    expected = torch.cat([sums[:1] / total, sums[1:] / sums[0]])
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-3, atol=1e-3)


# --- the purpose of points beyond ------------------------------------------------------------------------------------


def test_only_independent_noise_needs_points_beyond_the_concept():
    """RealEra's ablation: near points alone change unrelated states, points beyond the concept restore them."""
    width, rows = 96, 10
    mask = torch.ones(1, rows, dtype=torch.bool)
    common = torch.randn(2, 1, width, generator=seeded(0))
    rho = math.sqrt(width)
    e, e_star = (x / x.norm(dim=-1, keepdim=True) * rho for x in (0.7 * states(2, rows, width) + 0.7 * common).split(1))
    unrelated = states(1, 200, width, seed=5)[0].double()

    def change(band: Band, m: int, n: int) -> float:
        near, targets, near_rows = mine_near(e, e_star, mask, band, m, seeded(1))
        beyond, beyond_rows = mine_beyond(e, mask, band, n, seeded(2))
        equations = NormalEquations(width).add_pairs(e[0], e_star[0]).add_pairs(near[near_rows], targets[near_rows])
        found, _ = equations.add_preserved(beyond[beyond_rows], 0.1).solve(0.5)
        return float((unrelated @ found.T - unrelated).norm() / unrelated.norm())

    mined, kept = change(Band(), 10, 0), change(Band(), 10, 50)
    assert kept < 0.7 * mined
    assert change(replace(Band(), noise_sharing="shared"), 10, 0) < 0.7 * mined
