"""Neighbour-Concept Mining and Beyond-Concept samples: Algorithm 1, lines 1-23, of RealEra (arXiv 2410.09140).

Letters are the paper's: e rows of the prompt with the concept, e* rows of the prompt with the anchor, v ~ N(0, I), r
distances, v_hat directions, eta = r v_hat perturbations, m near and n beyond points per prompt. Shapes: P prompts, T
token rows, D text width, S sampled points. A prompt has U units of L numbers: a unit is a row (L = D) or, with
unit="flat", all R counted rows of the prompt, concatenated (U = 1, L = R D). Float64 inside, results in the dtype of e.

A point is a whole perturbed prompt. Its units are tested separately, and a unit that fails is redrawn alone, v and r
together. With noise_sharing="shared" the rows of a sample get the same draws, and each takes the first draw that passes
its own test. So a single unit follows the same law with both settings: "v ~ N(0, I) and r ~ U[low, high), given that
the test is passed". Sums over rows contain no products of different rows, so both settings have the same expectation
(`expected_moments`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from realera.contracts import EncoderRows, Moments, Pair, TextStates, UserError
from realera.mining.band import Band, Radii, Region, beyond_region, check, cosine_of_radius, near_region, resolve
from realera.mining.expectation import Polar, polar_moments

TRIES = 1000  # draws per unit; a unit that keeps fewer than one draw in TRIES cannot reach the band


def align_rows(pair: Pair, rows: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs the rows of the P target prompts with rows of the P anchor prompts.

    Row i from the concept's first sub-token on is paired with row i - last_c + last_a, which pairs the last sub-tokens
    (the 2023 code of UCE), but never with a row before the anchor's first sub-token. Rows whose partner would be past
    T - 1 do not count. Earlier rows have the same words in both prompts: row i is paired with row i. The rows of each
    text encoder are paired among themselves. Returns e (P, T, D); e_star (P, T, D), whose row j is the partner of row j
    of e; and mask (P, T) bool, the rows that count under `rows` (see `Band.rows`).

    Raises:
        UserError: a prompt that does not contain all of the concept or of the anchor.
    """
    c, a = pair.target, pair.anchor
    for states, name in ((c, pair.concept.target), (a, pair.concept.anchor)):
        if bool((states.first < 0).any()):
            raise UserError(f"A training prompt does not contain all of '{name}': shorten the prompt or the name.")
    partners, inside = [], []
    for own, other in zip(c.encoders(), a.encoders(), strict=True):
        row = torch.arange(own.start, own.stop, device=c.states.device).expand(len(c.states), -1)
        shifted = (row - own.last[:, None] + other.last[:, None]).maximum(other.first[:, None])
        # the rows of an encoder that is left out have no name: each is its own partner
        partner = torch.where((row < own.first[:, None]) | (own.first[:, None] < 0), row, shifted)
        partners.append(partner.clamp(max=own.stop - 1))
        inside.append(partner < own.stop)
    index = torch.cat(partners, dim=1)[..., None].expand_as(c.states)
    return c.states, a.states.gather(1, index), counted_rows(c, rows) & torch.cat(inside, dim=1)


def counted_rows(states: TextStates, rows: str) -> Tensor:
    """(P, T) bool: the rows of each prompt that count under `rows` (see `Band.rows`)."""
    return torch.cat([_counted(part, rows) for part in states.encoders()], dim=1)


def _counted(part: EncoderRows, rows: str) -> Tensor:
    """(P, stop - start) bool: `counted_rows` of one encoder. Rows of an encoder that is left out never count, except
    for "all"."""
    first, last, end = (row[:, None] for row in (part.first, part.last, part.end))
    row = torch.arange(part.start, part.stop, device=first.device).expand(len(first), -1)
    own = row >= part.start + (part.begins if part.begins == part.stop - part.start else 0)
    return {
        "suffix": own & (row >= first),
        "concept": own & (row >= first) & (row <= last),
        "to_eos": own & (row >= first) & (row <= end),
        "all_but_bos": row >= part.start + part.begins,
        "all": row >= 0,
    }[rows]


def fit_band(band: Band, e: Tensor, mask: Tensor) -> Band:
    """The band with its missing distances filled in for the rows e[mask] (`band.resolve` with their mean norm).

    The functions below do this for the prompts that they are given. Fit once on all prompts of a concept to mine some
    of them in the same band. A distance without a default stays None and raises UserError when it is needed.
    """
    radii = resolve(band, *_size(e, mask))._asdict()
    return replace(band, **{name: radius for name, radius in radii.items() if math.isfinite(radius)})


def mine_near(
    e: Tensor, e_star: Tensor, mask: Tensor, band: Band, m: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines 4-12: m neighbours of every prompt, and their targets.

    e, e_star (P, T, D) and mask (P, T) as from `align_rows`. Returns near (P m, T, D), near_targets (P m, T, D) and the
    counted rows (P m, T) bool, with the m points of one prompt together. Other rows equal those of e and e_star.

    Raises:
        UserError: a band that cannot be reached, by its numbers (`band.check`) or within TRIES draws.
    """
    region = near_region(band, _radii(band, e, mask, m=m, n=0))
    near, targets = e.repeat_interleave(m, dim=0), e_star.repeat_interleave(m, dim=0)
    for i, x in _prompts(e, mask, band):
        x_star = _units(e_star[i, mask[i]], band)
        draw = _draw(x, m, region, band, generator, once=band.filter == "zero")
        v_hat = _direction(draw.v, x, band)  # line 6
        v_hat_star = v_hat if band.anchor_dir == "shared" else _direction(draw.v, x_star, band)
        _put(near, i, mask, x + draw.r * v_hat)  # line 8
        _put(targets, i, mask, x_star + draw.r_prime * v_hat_star)  # line 9
    return near, targets, mask.repeat_interleave(m, dim=0)


def mine_beyond(e: Tensor, mask: Tensor, band: Band, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Lines 13-22: n points beyond the concept for every prompt; each is its own target.

    e (P, T, D), mask (P, T). Returns beyond (P n, T, D) and the counted rows (P n, T) bool, with the n points of one
    prompt together. With literal_break a prompt gives one point for every n, and rows whose only draw failed do not
    count.

    Raises:
        UserError: as `mine_near`.
    """
    region = beyond_region(band, _radii(band, e, mask, m=1, n=n))
    n = min(n, 1) if band.literal_break else n
    beyond, rows = e.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
    for i, x in _prompts(e, mask, band) if n else ():
        draw = _draw(x, n, region, band, generator, once=band.literal_break)
        _put(beyond, i, mask, x + draw.r * _direction(draw.v, x, band))  # line 17
        rows[i * n : (i + 1) * n, mask[i]] = draw.kept[..., 0]
    return beyond, rows


# --- rejection sampling ----------------------------------------------------------------------------------------------


class _Draw(NamedTuple):
    """One draw per unit. If none was kept (possible only with `once`), r and r' are 0."""

    v: Tensor  # (S, U, L)
    r: Tensor  # (S, U, 1)
    r_prime: Tensor  # (S, U, 1)
    kept: Tensor  # (S, U, 1) bool


def _draw(x: Tensor, count: int, region: Region, band: Band, generator: Generator, once: bool) -> _Draw:
    """`count` draws for every unit of x (U, L): the first (v, r, r') that the region keeps; one try with `once`."""
    units, length = x.shape
    v = x.new_zeros(count, units, length)
    r, r_prime = x.new_zeros(2, count, units, 1)
    kept = torch.zeros(count, units, 1, dtype=torch.bool, device=x.device)
    law = _exponent(band, length)
    inner = (region.low / region.high) ** law
    where: dict[str, Any] = {"dtype": x.dtype, "device": generator.device}
    for _ in range(1 if once else TRIES):
        s, u = (~kept[..., 0]).nonzero(as_tuple=True)
        if len(s) == 0:
            break
        # The index of each pending unit's fresh draw: its own, or the one that its sample shares.
        index = torch.unique(s, return_inverse=True)[1] if band.noise_sharing == "shared" else torch.arange(len(s))
        fresh = int(index.max()) + 1
        v_new = torch.randn(fresh, length, generator=generator, **where)[index].to(x.device)  # line 5
        a, b = torch.rand(2, fresh, 1, generator=generator, **where)[:, index].to(x.device)
        r_new = region.high * (inner + a * (1 - inner)) ** (1 / law)
        cos = torch.cosine_similarity(x[u], x[u] + r_new * _direction(v_new, x[u], band)).clamp(-1, 1)
        good = (region.cos_min <= cos) & (cos <= region.cos_max)
        v[s, u] = v_new
        s, u = s[good], u[good]
        r[s, u], r_prime[s, u], kept[s, u] = r_new[good], region.anchor * b[good] ** (1 / law), True
    if not once and not kept.all():
        short = x[~kept.all(dim=0)[:, 0]]
        raise _out_of_reach(torch.linalg.vector_norm(short, dim=1), length, region, band)
    return _Draw(v, r, r_prime, kept)


def _direction(v: Tensor, x: Tensor, band: Band) -> Tensor:
    """v_hat: (v - x)/||v - x|| (equation 5), or v/||v||; over the last axis."""
    step = v - x if band.direction == "backward" else v
    result: Tensor = step / torch.linalg.vector_norm(step, dim=-1, keepdim=True)
    return result


def _exponent(band: Band, length: int) -> float:
    """p of the radius law P(r < R) = (R^p - low^p)/(high^p - low^p): 1, or the number of dimensions of the ball."""
    return 1.0 if band.radius_law == "uniform" else float(length)


# --- the exact expectation -------------------------------------------------------------------------------------------


def expected_moments(
    e: Tensor, e_star: Tensor, mask: Tensor, band: Band, m_weight: float | None = None, n_weight: float | None = None
) -> Moments:
    """The limit of the sums over mined points for m, n to infinity: per prompt, weight * E[sum over one sample].

    e, e_star (P, T, D), mask (P, T) as for the mining functions. m_weight, n_weight: the number of samples that the
    expectation counts as (None = that side is left out).

    With v_hat = c e_hat + s u as in `expectation`, u is uniform on the unit sphere across e and independent of (c, r):
    E[u] = 0, E[u u^T] = (I - e_hat e_hat^T)/(L - 1), and for a key k = e + r v_hat and its target a = e* + r' v_hat of
    norm rho = ||e||

        E[k k^T] = E[(rho + r c)^2] e_hat e_hat^T + E[r^2 s^2]/(L - 1) (I - e_hat e_hat^T),
        E[a k^T] = E[rho + r c] e* e_hat^T
                   + E[r'] (E[c (rho + r c)] e_hat e_hat^T + E[r s^2]/(L - 1) (I - e_hat e_hat^T)).

    The same holds for a row of a flat unit, with its own part of e_hat.

    Raises:
        UserError: as `mine_near`; also for anchor_dir="own" and literal_break, whose limits are not derived.
    """
    width = e.shape[-1]
    radii = _radii(band, e, mask, m=1 if m_weight is None else math.inf, n=0 if n_weight is None else math.inf)
    near, near_cross, beyond = torch.zeros(3, width, width, dtype=torch.float64, device=e.device)
    for i, x in _prompts(e, mask, band):
        rho, across = torch.linalg.vector_norm(x, dim=1), x.shape[1] - 1
        rows = (x / rho[:, None]).reshape(-1, width)  # e_hat
        if m_weight is not None:
            q = _polar(rho, x.shape[1], near_region(band, radii), band, zeroed=band.filter == "zero")
            near += m_weight * _isotropic(rows, rho**2 + 2 * rho * q.r_c + q.rr_cc, q.rr_ss / across)
            towards = e_star[i, mask[i]].double().T * (rho + q.r_c).expand(len(rows))
            exponent = _exponent(band, x.shape[1])
            r_prime = m_weight * radii.d1_anchor * exponent / (exponent + 1)
            near_cross += m_weight * towards @ rows + r_prime * _isotropic(rows, rho * q.c + q.r_cc, q.r_ss / across)
        if n_weight is not None:
            q = _polar(rho, x.shape[1], beyond_region(band, radii), band, zeroed=False)
            beyond += n_weight * _isotropic(rows, rho**2 + 2 * rho * q.r_c + q.rr_cc, q.rr_ss / across)
    no_near, no_beyond = m_weight is None, n_weight is None
    return Moments(None if no_near else near, None if no_near else near_cross, None if no_beyond else beyond)


def _polar(rho: Tensor, length: int, region: Region, band: Band, zeroed: bool) -> Polar:
    moments = polar_moments(rho, length, region, band.direction, _exponent(band, length), zeroed)
    if not zeroed and bool((scarce := moments.mass < 1 / TRIES).any()):
        raise _out_of_reach(rho[scarce], length, region, band)
    return moments


def _isotropic(rows: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """Sum over the rows e_hat (R, D) of along e_hat e_hat^T + across (I - e_hat e_hat^T); along, across (U,)."""
    along, across = along.expand(len(rows)), across.expand(len(rows))
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return (rows.T * (along - across)) @ rows + across.sum() * eye


# --- prompts and units -----------------------------------------------------------------------------------------------


def _prompts(e: Tensor, mask: Tensor, band: Band) -> Iterator[tuple[int, Tensor]]:
    """(i, units (U, L) float64) of every prompt with a counted row."""
    for i in mask.any(dim=1).nonzero()[:, 0].tolist():
        yield i, _units(e[i, mask[i]], band)


def _units(rows: Tensor, band: Band) -> Tensor:
    """(R, D) rows of one prompt as units (U, L) float64."""
    return rows.double().reshape(1, -1) if band.unit == "flat" else rows.double()


def _put(out: Tensor, i: int, mask: Tensor, units: Tensor) -> None:
    """Writes the units (S, U, L) of prompt i to the counted rows of its S samples in out (P S, T, D)."""
    samples = len(units)
    out[i * samples : (i + 1) * samples, mask[i]] = units.reshape(samples, -1, out.shape[-1]).to(out.dtype)


def _size(e: Tensor, mask: Tensor) -> tuple[float, int, float]:
    """Mean norm of the counted rows, D, and the average number of counted rows per prompt."""
    norms = torch.linalg.vector_norm(e[mask].double(), dim=-1)
    if len(norms) == 0 or not bool((norms > 0).all()):
        raise UserError(
            "The text states of the concept are empty or zero: check its prompts and the text encoder's weights."
        )
    return float(norms.mean()), e.shape[-1], len(norms) / max(1, int(mask.any(dim=1).sum()))


def _radii(band: Band, e: Tensor, mask: Tensor, m: float, n: float) -> Radii:
    rho, width, rows = _size(e, mask)
    check(band, rho, width, rows=rows, m=m, n=n)
    return resolve(band, rho, width, rows)


def _out_of_reach(norms: Tensor, length: int, region: Region, band: Band) -> UserError:
    rho = float(norms.mean())
    nearest, farthest = (cosine_of_radius(r, rho, length, band.direction) for r in (region.low, region.high))
    return UserError(
        f"{len(norms)} rows of norm about {rho:.1f} keep fewer than one draw in {TRIES}: at distances from "
        f"{region.low:.1f} to {region.high:.1f} their cosines are {farthest:.3f} to {nearest:.3f}, but the band is "
        f"{region.cos_min:.3f} to {region.cos_max:.3f}. Widen s_lo..s_hi, or change d1 or d2."
    )
