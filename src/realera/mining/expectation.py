"""The exact expectation over one accepted draw of `sampling.py`, in the plane of the vector it perturbs.

A vector e of norm rho and length L is moved to e + r v_hat, v_hat = c e_hat + s u: phi is the angle between e and
v_hat, c = cos phi, s = sin phi, and u is a unit vector across e. The band's test depends only on (phi, r), so u stays
uniform on its sphere and independent of both, and the draw's second moments need only the scalars below. Nothing is
sampled.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from realera.mining.band import Direction, Region

PERP_NODES = 16  # for v_perp
PAR_NODES = 10  # for v_par, in every piece
PAR_CUTS = (-9.0, -4.5, -2.0, 0.0, 2.0, 4.5, 9.0)  # N(0, 1) has 1e-19 of its mass outside


class Polar(NamedTuple):
    """Expectations over one draw, each (U,), for `sampling.expected_moments`.

    mass: probability that a draw is kept. The others are c = E[c], r_c = E[r c], r_cc = E[r c^2], r_ss = E[r s^2],
    rr_cc = E[r^2 c^2], rr_ss = E[r^2 s^2], given that the draw is kept; if `zeroed`, over all draws, with c = r = 0 for
    those that are not kept.
    """

    mass: Tensor
    c: Tensor
    r_c: Tensor
    r_cc: Tensor
    r_ss: Tensor
    rr_cc: Tensor
    rr_ss: Tensor


def polar_moments(
    rho: Tensor, length: int, region: Region, direction: Direction, exponent: float, zeroed: bool = False
) -> Polar:
    """Expectations for vectors of norm rho (U,) float64 and `length` L > 1, where r^exponent is drawn uniformly.

    phi depends on v ~ N(0, I) through v_par ~ N(0, 1), its part along e, and v_perp ~ chi(L - 1), its norm across.
    Given phi, the angle theta between e and e + r v_hat grows with r,

        r(theta) = rho sin(theta)/sin(phi - theta)    (law of sines; never reached if theta >= phi),

    so the kept r form one interval, and the integrals of r^k over it are elementary. They have kinks where an end of
    the interval meets the region's low or high, so v_par is integrated in pieces between the kinks. Gauss rules give
    the remaining integrals, to about 1e-10 of rho at the widths of text encoders.
    """
    v_perp, perp_weight = (q.to(rho.device)[:, None] for q in _chi(length - 1))
    shift = rho if direction == "backward" else torch.zeros_like(rho)  # v_hat is along (v_par - shift, v_perp)
    v_par, par_weight = _normal_in_pieces(_kinks(rho, shift, v_perp, region))
    phi = torch.atan2(v_perp, v_par - shift[:, None, None])  # (U, W, K)
    weight = perp_weight * par_weight

    def radius(cosine: float) -> Tensor:
        theta = math.acos(cosine)
        gap = (phi - theta).clamp(min=0.0)
        reached = rho[:, None, None] * math.sin(theta) / torch.sin(gap)
        return reached.where(gap > 0, torch.inf).clamp(region.low, region.high)

    start, stop = radius(region.cos_max), radius(region.cos_min)
    whole = 1 - (region.low / region.high) ** exponent

    def integral(k: int) -> Tensor:
        """The integral of r^k over the kept interval under the law of r, times the weight of phi."""
        upper, lower = (q**k * (q / region.high) ** exponent for q in (stop, start))
        result: Tensor = weight * (upper - lower) * (exponent / (exponent + k) / whole)
        return result

    kept, first, second = integral(0), integral(1), integral(2)
    c, s = torch.cos(phi), torch.sin(phi)
    mass = kept.sum((1, 2))
    given = torch.ones_like(mass) if zeroed else mass
    means = (kept * c, first * c, first * c * c, first * s * s, second * c * c, second * s * s)
    return Polar(mass, *(q.sum((1, 2)) / given for q in means))


def _kinks(rho: Tensor, shift: Tensor, v_perp: Tensor, region: Region) -> Tensor:
    """v_par (U, W, up to 8) where r(theta) of an end of the band equals low or high; inf if it never does."""
    kinks = []
    for cosine in (region.cos_max, region.cos_min):
        theta = math.acos(cosine)
        for r in (region.low, region.high):
            if r == 0:
                continue  # r = 0 only at theta = 0, for every v
            opening = torch.asin(rho * math.sin(theta) / r)  # phi - theta, or nan: this r never reaches theta
            for phi in (theta + opening, theta + math.pi - opening):
                cotangent = (1 / torch.tan(phi)).where(phi < math.pi, torch.inf)
                kinks.append(shift[:, None] + cotangent[:, None] * v_perp[:, 0])
    return torch.stack(kinks, dim=-1)


def _normal_in_pieces(cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights (U, W, K) for N(0, 1), by Gauss-Legendre between the cuts (U, W, n) and PAR_CUTS."""
    fixed = torch.tensor(PAR_CUTS, dtype=cuts.dtype, device=cuts.device).expand(*cuts.shape[:2], -1)
    edges = torch.cat([fixed, cuts.clamp(PAR_CUTS[0], PAR_CUTS[-1])], dim=-1).sort(dim=-1).values
    share, weight = (q.to(cuts.device) for q in _legendre())
    piece = edges.diff(dim=-1)[..., None]
    nodes = (edges[..., :-1, None] + piece * share).flatten(2)
    density = torch.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    return nodes, density * (piece * weight).flatten(2)


@lru_cache(maxsize=64)
def _chi(freedom: int, count: int = PERP_NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights (W,) for chi(freedom): chi^2/2 ~ Gamma(freedom/2), whose polynomials are Laguerre's."""
    k = torch.arange(count, dtype=torch.float64)
    nodes, weights = _gauss(2 * k + freedom / 2, torch.sqrt(k[1:] * (k[1:] + freedom / 2 - 1)))
    return torch.sqrt(2 * nodes), weights


@lru_cache(maxsize=1)
def _legendre(count: int = PAR_NODES) -> tuple[Tensor, Tensor]:
    """Nodes and weights (K,) for the uniform law on [0, 1]."""
    k = torch.arange(1, count, dtype=torch.float64)
    nodes, weights = _gauss(torch.zeros(count, dtype=torch.float64), k / torch.sqrt(4 * k * k - 1))
    return (nodes + 1) / 2, weights


def _gauss(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss rule of a probability law from the recurrence coefficients of its polynomials (Golub and Welsch 1969)."""
    jacobi = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes, vectors[0] ** 2
