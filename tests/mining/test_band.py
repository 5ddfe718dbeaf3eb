import math
import subprocess
import sys

import pytest

from realera.contracts import UserError
from realera.mining.band import Band, check, cosine_of_radius, radius_of_cosine, resolve

RHO, WIDTH = 27.7, 768  # a row of SD 1.x

# arXiv 2410.09140 prints no distances; these follow from its equation 5 (and from 20,000 draws each).
COSINES = {
    1: 0.9997,
    5: 0.990,
    10: 0.946,
    15: 0.850,
    20: 0.692,
    25: 0.493,
    30: 0.293,
    39.2: 0.0,
    45: -0.128,
    60: -0.328,
}
RADII = {0.99: 4.9, 0.95: 9.7, 0.9: 12.8, 0.8: 16.8, 0.7: 19.8, 0.5: 24.8, 0.3: 29.8, 0.1: 35.6, 0.0: 39.2}


@pytest.mark.parametrize(("radius", "cosine"), COSINES.items())
def test_cosine_by_distance(radius, cosine):
    assert cosine_of_radius(radius, RHO, WIDTH) == pytest.approx(cosine, abs=1.5e-3)


@pytest.mark.parametrize(("cosine", "radius"), RADII.items())
def test_distance_by_cosine(cosine, radius):
    assert radius_of_cosine(cosine, RHO, WIDTH) == pytest.approx(radius, abs=0.06)


def test_isotropic_moves_turn_less():
    found = [cosine_of_radius(r, RHO, WIDTH, "isotropic") for r in (20, 27.7, 39.2)]
    assert found == pytest.approx([0.811, 0.707, 0.577], abs=1e-3)


@pytest.mark.parametrize("direction", ["backward", "isotropic"])
@pytest.mark.parametrize(("rho", "width"), [(27.7, 768), (16.0, 256), (3.0, 2)])
def test_cosine_and_distance_are_inverse(direction, rho, width):
    for radius in (0.01, 0.3 * rho, rho, 3 * rho):
        cosine = cosine_of_radius(radius, rho, width, direction)
        assert radius_of_cosine(cosine, rho, width, direction) == pytest.approx(radius)


def test_an_unreachable_cosine_has_infinite_distance():
    assert cosine_of_radius(math.inf, RHO, WIDTH) == pytest.approx(-0.707, abs=1e-3)
    assert radius_of_cosine(-0.71, RHO, WIDTH) == math.inf
    assert radius_of_cosine(0.0, RHO, WIDTH, "isotropic") == math.inf


def test_defaults_are_the_papers_scale_on_stable_diffusion():
    assert resolve(Band(), RHO, WIDTH) == pytest.approx((19.8, 9.9, 39.2), abs=0.05)


def test_a_typed_distance_is_absolute():
    band = Band(d1=5, d2=30)
    assert resolve(band, RHO, WIDTH) == (5, 2.5, 30) == resolve(band, 3.0, 16)


def test_flat_distances_grow_with_the_root_of_the_rows():
    token, flat = resolve(Band(), RHO, WIDTH), resolve(Band(unit="flat"), RHO, WIDTH, rows=76)
    assert flat == pytest.approx([r * math.sqrt(76) for r in token])
    assert resolve(Band(d1=20), RHO, WIDTH, rows=76).d1 * math.sqrt(76) == pytest.approx(174, abs=0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"d1": -1}, r"d1=-1 is not a distance"),
        ({"d1": "ten"}, r"d1=ten is not a distance"),
        ({"d2": math.inf}, r"d2=inf is not a distance"),
        ({"d1_anchor": -0.5}, r"d1_anchor=-0.5 is not a distance"),
        ({"s_hi": 1.2}, r"s_hi=1.2 is not a cosine"),
        ({"s_lo": 0.9, "s_hi": 0.4}, r"s_lo=0.9 must be below s_hi=0.4"),
        ({"s_lo": 0.7, "s_hi": 0.7}, r"must be below"),
        ({"d1": 10, "s_hi": 0.9, "s_lo": 0.5}, r"d1=10 reaches only cosines from 0\.94\d to 1.*raise d1 above 12\.8"),
        ({"d1": 0}, r"d1=0 reaches only"),
        ({"s_lo": -0.9}, r"s_lo=-0.9 is not reached at any distance.*above the cosine -0\.707"),
        ({"d1": 15, "d2": 18}, r"d2=18 reaches only cosines from 0\.76\d to 0\.8.*raise d2 above 19\.8"),
        ({"d1": 20, "d2": 20}, r"d2=20 must be greater than d1=20"),
        ({"d1": 50}, r"d2=39\.\d* must be greater than d1=50"),
        ({"d1": 20, "d2": 40, "s_lo": -0.9}, r"none below s_lo=-0.9.*beyond the concept: raise s_lo"),
        ({"direction": "isotropic"}, r"isotropic never turns a row by 90 degrees.*set d2"),
        ({"direction": "forward"}, r"direction='forward' is not known: choose one of backward, isotropic"),
        ({"rows": "last"}, r"rows='last' is not known: choose one of suffix, concept"),
        ({"unit": "flat", "noise_sharing": "shared"}, r"no noise to share"),
    ],
)
def test_impossible_bands_are_refused(settings, says):
    with pytest.raises(UserError, match=says) as refusal:
        check(Band(**settings), RHO, WIDTH)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("counts", "settings", "says"),
    [
        ({"m": 0}, {}, r"m=0 is not a number of points.*neighbours=null"),
        ({"m": 2.5}, {}, r"m=2.5 is not a number of points"),
        ({"m": float("nan")}, {}, r"m=nan is not"),
        ({"n": -1}, {}, r"n=-1 is not a number of points"),
        ({"m": math.inf}, {"anchor_dir": "own"}, r"m=.inf works only for .*anchor_dir=shared"),
        ({"n": math.inf}, {"literal_break": True}, r"literal_break stops after one draw"),
    ],
)
def test_invalid_counts_are_refused(counts, settings, says):
    with pytest.raises(UserError, match=says):
        check(Band(**settings), RHO, WIDTH, **counts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"s_hi": 0.7, "s_lo": 0.3},  # gamma read as thresholds: r in [19.8, 29.8]
        {"d1": 5},
        {"d1": 20, "d2": 40},
        {"d1_anchor": 0},
        {"direction": "isotropic", "d2": 60},
        {"radius_law": "volume"},
        {"unit": "flat"},
        {"literal_break": True, "filter": "zero", "anchor_dir": "own"},
    ],
)
def test_possible_bands_pass(settings):
    check(Band(**settings), RHO, WIDTH, rows=72, m=5, n=25)


def test_no_beyond_points_need_no_beyond_region():
    check(Band(s_lo=-0.5), RHO, WIDTH, m=5, n=0)
    check(Band(direction="isotropic"), RHO, WIDTH, m=math.inf, n=0)
    with pytest.raises(UserError, match="set n=0"):
        check(Band(s_lo=-0.5, d1=20), RHO, WIDTH, m=5, n=1)


def test_a_band_is_checked_without_torch():
    code = "import sys, realera.mining.band; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
