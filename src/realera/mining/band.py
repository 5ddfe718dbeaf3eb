"""The band of a concept's neighbours: the distances and angles of equations 3-6 of RealEra (arXiv 2410.09140).

Plain arithmetic without torch, so an impossible setting is refused when the config is read.

A row e (norm rho, width d) is moved by eta = r v_hat. Backward (equation 5), v_hat = (v - e)/||v - e|| with v ~ N(0,
I), and e + eta = (1 - alpha) e + alpha v with alpha = r/||v - e||: a walk from e towards white noise. In high dimension
e.v is about 0 and ||v|| about sqrt(d), so alpha is about r/sqrt(rho^2 + d) and

    tan(theta) = alpha sqrt(d) / ((1 - alpha) rho),    cos(theta) = cos(e, e + eta):

the angle is a function of the distance. Isotropic, v_hat = v/||v|| and tan(theta) = r/rho. (The spread around these
values at d = 768 is below 0.003 in the cosine up to r = 22; `sampling.py` tests the exact cosine of every point that it
draws.)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from realera.contracts import UserError
from realera.setting_types import Cosine, NonNegative

Direction = Literal["backward", "isotropic"]
RadiusLaw = Literal["uniform", "volume"]
NoiseSharing = Literal["independent", "shared"]
AnchorDirection = Literal["shared", "own"]
Filter = Literal["reject", "zero"]
Rows = Literal["suffix", "concept", "to_eos", "all_but_bos", "all"]
Unit = Literal["token", "flat"]

CHOICES: dict[str, Any] = {
    "direction": Direction,
    "radius_law": RadiusLaw,
    "noise_sharing": NoiseSharing,
    "anchor_dir": AnchorDirection,
    "filter": Filter,
    "rows": Rows,
    "unit": Unit,
}


@dataclass(frozen=True)
class Band:
    """Which points count as neighbours (near) and which as beyond the concept.

    Distances are Euclidean, in the units of the text states, over one `unit`; cosines are between e and e + eta.

    d1: near points have distances in [0, d1). None: where the mean row reaches the cosine s_lo (19.8 on SD 1.x).
    d1_anchor: targets have distances in [0, d1_anchor) from the anchor's row; 0 = the anchor itself. None: d1 / 2.
    d2: beyond points have distances in [d1, d2). None: where the mean row reaches the cosine 0 (39.2 on SD 1.x).
    s_hi, s_lo: cosines; near means s_lo <= cos <= s_hi, beyond means cos < s_lo. (The paper's S1 and S2.)
    direction: "backward" (equation 5, (v - e)/||v - e||) or "isotropic" (v/||v||).
    radius_law: "uniform" in the distance (the paper) or in the "volume" of the ball or shell.
    noise_sharing: v "independent" per row, or one draw "shared" by the rows of a sample.
    anchor_dir: targets move along the direction "shared" with their key (Algorithm 1, line 6), or along their "own",
        taken at the anchor's row with the same v.
    filter: near points outside the band are redrawn ("reject", Algorithm 1) or reset to e and its target ("zero",
        equation 6). Beyond points are always redrawn.
    rows: which rows count: the concept's first sub-token to the end ("suffix"), its sub-tokens only ("concept"), to the
        first end-of-text ("to_eos"), every row but BOS ("all_but_bos"), or "all".
    unit: the vector that has a distance and a cosine: each "token" row, or all counted rows of a prompt as one "flat"
        vector (its distances grow with the square root of the number of rows).
    literal_break: Algorithm 1's line 21 as printed: one try per prompt for a beyond point, kept or not, for every n.
    """

    d1: NonNegative | None = None
    d1_anchor: NonNegative | None = None
    d2: NonNegative | None = None
    s_hi: Cosine = 1.0
    s_lo: Cosine = 0.7
    direction: Direction = "backward"
    radius_law: RadiusLaw = "uniform"
    noise_sharing: NoiseSharing = "independent"
    anchor_dir: AnchorDirection = "shared"
    filter: Filter = "reject"
    rows: Rows = "suffix"
    unit: Unit = "token"
    literal_break: bool = False


class Radii(NamedTuple):
    """A band's three distances with the defaults filled in, in the units of the text states."""

    d1: float
    d1_anchor: float
    d2: float


class Region(NamedTuple):
    """Draws have r in [low, high) and r' in [0, anchor); a draw is kept if cos(e, e + eta) is in [cos_min, cos_max]."""

    low: float
    high: float
    anchor: float
    cos_min: float
    cos_max: float


def near_region(band: Band, radii: Radii) -> Region:
    """Algorithm 1, lines 5 and 7."""
    return Region(0.0, radii.d1, radii.d1_anchor, band.s_lo, band.s_hi)


def beyond_region(band: Band, radii: Radii) -> Region:
    """Algorithm 1, lines 14 and 16 (cos < S2, strictly)."""
    return Region(radii.d1, radii.d2, 0.0, -1.0, math.nextafter(band.s_lo, -math.inf))


def cosine_of_radius(radius: float, rho: float, width: float, direction: Direction = "backward") -> float:
    """cos(e, e + eta) of a row of norm `rho` and `width` d at distance `radius` (may be inf: the limit)."""
    if direction == "isotropic":
        return 1 / math.hypot(1, radius / rho)
    whole = math.hypot(rho, math.sqrt(width))  # ||v - e||
    if math.isinf(radius):
        return -rho / whole
    along, across = (whole - radius) * rho, radius * math.sqrt(width)
    return along / math.hypot(along, across)


def radius_of_cosine(cosine: float, rho: float, width: float, direction: Direction = "backward") -> float:
    """The distance at which a row of norm `rho` and `width` d reaches `cosine`; inf if no distance does."""
    if cosine <= cosine_of_radius(math.inf, rho, width, direction):
        return math.inf
    sine = math.sqrt(1 - cosine * cosine)
    if direction == "isotropic":
        return rho * sine / cosine
    alpha = rho * sine / (math.sqrt(width) * cosine + rho * sine)
    return alpha * math.hypot(rho, math.sqrt(width))


def resolve(band: Band, rho: float, width: float, rows: float = 1) -> Radii:
    """The band's distances, for rows of mean norm `rho` and `width` D. `rows`: rows per flat unit."""
    rho, width = _of_unit(band, rho, width, rows)
    d1 = radius_of_cosine(band.s_lo, rho, width, band.direction) if band.d1 is None else band.d1
    d2 = radius_of_cosine(0.0, rho, width, band.direction) if band.d2 is None else band.d2
    return Radii(d1, d1 / 2 if band.d1_anchor is None else band.d1_anchor, d2)


def check(band: Band, rho: float, width: float, *, rows: float = 1, m: float = 1, n: float = 1) -> None:
    """Refuses a band that cannot be mined. `m`, `n`: points per prompt (whole numbers, inf = the exact expectation,
    n = 0 = no beyond points); `rho`, `width`, `rows` as in `resolve`.

    Raises:
        UserError: an unknown choice, a value out of range, or a region that no draw reaches (with reachable values).
    """
    _check_values(band)
    _check_counts(band, m, n)
    d1, _, d2 = resolve(band, rho, width, rows)
    rho, width = _of_unit(band, rho, width, rows)

    def cosine(radius: float) -> float:
        return cosine_of_radius(radius, rho, width, band.direction)

    def radius(cosine: float) -> float:
        return radius_of_cosine(cosine, rho, width, band.direction)

    if math.isinf(d1):
        raise UserError(
            f"s_lo={band.s_lo:g} is not reached at any distance ({band.direction} moves of a vector of norm {rho:.1f} "
            f"stay above the cosine {cosine(math.inf):.3f}), so d1 has no default: raise s_lo or set d1."
        )
    if d1 <= radius(band.s_hi):
        raise UserError(
            f"d1={d1:g} reaches only cosines from {cosine(d1):.3f} to 1, all above s_hi={band.s_hi:g}, so there is no "
            f"neighbour to mine: {_raise_to('d1', radius(band.s_hi))}raise s_hi."
        )
    if n == 0:
        return
    if math.isinf(d2):
        raise UserError(
            f"direction={band.direction} never turns a row by 90 degrees, so d2 has no default: set d2, for example "
            f"{2 * d1:.1f} (twice d1)."
        )
    if d2 <= d1:
        raise UserError(
            f"d2={d2:g} must be greater than d1={d1:g}, because points beyond the concept are between these distances: "
            f"raise d2 or lower d1."
        )
    if d2 <= radius(band.s_lo):
        raise UserError(
            f"d2={d2:g} reaches only cosines from {cosine(d2):.3f} to {cosine(d1):.3f}, none below s_lo={band.s_lo:g}, "
            f"so there are no points beyond the concept: {_raise_to('d2', radius(band.s_lo))}raise s_lo, or set n=0."
        )


def _of_unit(band: Band, rho: float, width: float, rows: float) -> tuple[float, float]:
    """Norm and width of one unit: a row, or `rows` concatenated rows."""
    return (rho * math.sqrt(rows), width * rows) if band.unit == "flat" else (rho, width)


def _raise_to(name: str, radius: float) -> str:
    return "" if math.isinf(radius) else f"raise {name} above {radius:.1f} or "


def _check_values(band: Band) -> None:
    for name, choices in CHOICES.items():
        if (value := getattr(band, name)) not in (allowed := get_args(choices)):
            raise UserError(f"{name}={value!r} is not known: choose one of {', '.join(allowed)}.")
    for name in ("d1", "d1_anchor", "d2"):
        value = getattr(band, name)
        if value is not None and not (_is_number(value) and 0 <= value < math.inf):
            raise UserError(
                f"{name}={value} is not a distance: give a finite number of 0 or more, or null for the default."
            )
    for name in ("s_hi", "s_lo"):
        if not (_is_number(value := getattr(band, name)) and -1 <= value <= 1):
            raise UserError(f"{name}={value} is not a cosine: give a number from -1 to 1.")
    if band.s_lo >= band.s_hi:
        raise UserError(
            f"s_lo={band.s_lo:g} must be below s_hi={band.s_hi:g}, because neighbours are kept where "
            f"s_lo <= cosine <= s_hi: swap them or widen the band."
        )
    if band.unit == "flat" and band.noise_sharing == "shared":
        raise UserError(
            "unit=flat draws one vector for all rows, so there is no noise to share: set noise_sharing=independent or "
            "unit=token."
        )


def _check_counts(band: Band, m: float, n: float) -> None:
    for name, value, least in (("m", m, 1), ("n", n, 0)):
        if not (_is_number(value) and value >= least and (math.isinf(value) or value == int(value))):
            without = "set neighbours=null to mine nothing" if name == "m" else "0 mines no points beyond the concept"
            raise UserError(
                f"{name}={value} is not a number of points per prompt: give a whole number of {least} or more, or .inf "
                f"({without})."
            )
    if math.isinf(m) and band.anchor_dir == "own" and band.direction == "backward":
        raise UserError(
            "m=.inf works only for targets that move along the key's direction: set anchor_dir=shared or a finite m."
        )
    if math.isinf(n) and band.literal_break:
        raise UserError(
            "literal_break stops after one draw per prompt, so n=.inf is impossible: set literal_break=false or a "
            "finite n."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
