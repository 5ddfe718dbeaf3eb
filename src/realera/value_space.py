"""Closed-form edits in the space where a U-Net reads text: the values W_l k of its cross-attention layers l.

Two texts that draw the same thing lie close together in their values, however far apart the text encoder puts them, so
what is to be erased is taken from there. Letters: k a row of text states, a column vector of width D; e a concept's
mean row, a its anchor's; mu, C the mean and covariance of rows of plain captions, which stand for all that is to stay.

    G = sum_l c_l W_l^T W_l                     the metric in which the U-Net sees text
    Q = G (G C G + r I)^-1 G                    the quiet readings, below
    U = Q (E - mu 1^T),  then  U^T H = 0        one reading per concept, blind to what is held (columns of H)
    M = I - g X (U^T X)^-1 U^T,   X = E - A     the map: W = W0 M

Where Q comes from. A reading u^T k = w^T G k of the values, with w in the U-Net's coordinates, is to give 1 on e - mu
and little on captions, w^T G C G w, at a price r ||w||^2 on large coefficients. Minimising the sum of both gives
w ~ (G C G + r I)^-1 G (e - mu), so u = G w = Q (e - mu) up to a factor, which M does not depend on. r -> 0 is a reading
whitened by captions, as in closed forms that keep a caption prior; r -> infinity a filter matched to e in G^2.

What M does. X (U^T X)^-1 U^T is an oblique projection, onto what leads from the anchors to the concepts, along what U
does not read. So with gain g = 1: M^2 = M; U^T M = 0, the readings are gone from every text, the concept's name or not;
concepts do not cross-talk, M (e_i - a_i) = 0 for each; and M h = h for whatever U does not read, the columns of H
exactly. M is singular: no text state gives e back. G and C are scaled to trace D, so M does not change when weights or
text states are scaled, and r means the same on every backbone.

Everything is (D, D) or (D, n) float64 on the CPU, columns are vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from realera.contracts import UserError

LEAST = 0.05  # of an eigenvalue of the metric, in `roots`
ROUNDING = 1e-8  # of a reading; what is left of one that is less was read of what is held
CONDITION = 1e8  # of U^T X, above which concepts and anchors cannot be told apart


def metric(weights: Sequence[Tensor], layers: str = "as_they_are") -> Tensor:
    """G (D, D) of weights (out, D), scaled to trace D. layers: "as_they_are" = c_l = 1, a layer that writes much counts
    much; "equal" = every layer's trace is the same."""
    total = torch.zeros(weights[0].shape[1], weights[0].shape[1], dtype=torch.float64)
    for weight in weights:
        double = weight.detach().to("cpu", torch.float64)
        gram = double.T @ double
        total += gram / gram.trace() if layers == "equal" else gram
    return _scaled(total)


def roots(metric: Tensor, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """R = G^(1/2) and R^-1, (D, D): k -> R k are coordinates in which distances are those of the values. Eigenvalues of
    G below `least` (their mean is 1) count as so much, for what the U-Net hardly reads must still have a way back."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp(min=least).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def covariance(gram: Tensor, mean: Tensor, rows: int) -> Tensor:
    """C (D, D), scaled to trace D, of `rows` rows with the sum gram = sum k k^T and this mean (D,)."""
    return _scaled(gram / rows - torch.outer(mean, mean))


def quiet(metric: Tensor, covariance: Tensor, price: float) -> Tensor:
    """Q = G (G C G + r I)^-1 G, (D, D), symmetric.

    price: r, at least 0. Raises UserError where it does not determine the readings: captions of a small rank need one.
    """
    system = metric @ covariance @ metric
    system = (system + system.T) / 2 + price * torch.eye(len(metric), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(system)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise UserError(
            f"method.edit.price={price:g} does not determine how the concept is read: give a larger one, such as 1."
        )
    return metric @ torch.cholesky_solve(metric, lower)


def readings(quiet: Tensor, concepts: Tensor, mean: Tensor, held: Tensor, keep: float = math.inf) -> Tensor:
    """U (D, n): one reading for each column of concepts (D, n).

    held: columns h (D, m) with U^T h = 0, made so by U <- U - Q H (H^T Q H)^+ H^T U, the nearest readings in Q^-1 that
    are blind to them; the pseudo-inverse, for names that are held may depend on one another. keep: a price on what is
    read of them in place of that, (H^T Q H + I / keep)^-1; inf = exactly.
    """
    return blind(quiet, quiet @ (concepts - mean[:, None]), held, keep)


def blind(quiet: Tensor, readings: Tensor, held: Tensor, keep: float = math.inf) -> Tensor:
    """Readings (D, n) made blind to held (D, m), as in `readings`."""
    if held.shape[1] == 0 or keep == 0:
        return readings
    known = quiet @ held
    products = held.T @ known
    if math.isinf(keep):
        left = readings - known @ (torch.linalg.pinv(products, hermitian=True) @ (held.T @ readings))
        gone = left.norm(dim=0) <= ROUNDING * readings.norm(dim=0)
        return torch.where(gone, 0.0, left)
    price = float(products.diagonal().mean()) / keep
    system = products + price * torch.eye(len(products), dtype=torch.float64)
    return readings - known @ torch.linalg.solve(system, held.T @ readings)


def projection(
    readings: Tensor, concepts: Tensor, anchors: Tensor, gain: float = 1.0, tolerance: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """L = -g X (D, n) and R = (U^T X + t I)^-1 U^T (n, D) with M = I + L R, each reading scaled to u^T x = 1, and the
    system's condition number.

    gain: g; 1 is the projection, more takes the readings beyond zero, 0 changes nothing. tolerance: t; 0 takes them
    away entirely, which more concepts than D less what is held cannot be. Raises UserError where a concept is read like
    its anchor, like another concept, or like what is held.
    """
    shifts = concepts - anchors
    differ = shifts.norm(dim=0) > 0  # a concept that is its own anchor is not to be changed
    shifts, readings = shifts[:, differ], readings[:, differ]
    if not shifts.shape[1]:
        return shifts, shifts.T.contiguous(), {"condition": 1.0}
    own = (readings * shifts).sum(dim=0)
    unread = own.abs() <= ROUNDING * readings.norm(dim=0) * shifts.norm(dim=0)
    scaled = readings / torch.where(unread, math.nan, own)
    system = scaled.T @ shifts + tolerance * torch.eye(shifts.shape[1], dtype=torch.float64)
    condition = float(torch.linalg.cond(system)) if bool(torch.isfinite(system).all()) else math.inf
    if not condition < CONDITION:
        raise UserError(
            "The concepts cannot be told from their anchors, from one another or from what is kept, by what the U-Net "
            "reads: choose other anchors (anchor=...), or keep fewer names."
        )
    return -gain * shifts, torch.linalg.solve(system, scaled.T), {"condition": condition}


def _scaled(gram: Tensor) -> Tensor:
    return gram * (len(gram) / gram.trace())
