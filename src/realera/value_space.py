"""Closed-form edits in value space: the values W_l k of a U-Net's cross-attention layers l.

Two texts that draw the same thing have similar values, however far apart the text encoder puts them, so a concept is
erased in this space. Letters: k a row of text states, a column vector of width D; e a concept's mean row, a its
anchor's; mu, C the mean and covariance of rows of plain captions, which represent all preserved texts. A reading is
a linear function u^T k of a text state.

    G = sum_l c_l W_l^T W_l                     the metric of the denoiser's values
    Q = G (G C G + r I)^-1 G                    the quiet readings, see below
    U = Q (E - mu 1^T),  then  U^T H = 0        one reading per concept, blind to the preserved columns H
    M = I - g X (U^T X)^-1 U^T,   X = E - A     the map: W = W0 M

`further_directions` adds columns to X, and their readings to U.

Why Q. A reading u^T k = w^T G k of the values, with w in the denoiser's coordinates, should give 1 on e - mu and little
on captions, w^T G C G w, at a price r ||w||^2 on large coefficients. Minimising the sum of both gives
w ~ (G C G + r I)^-1 G (e - mu), so u = G w = Q (e - mu) up to a factor, which does not change M. r -> 0 is a reading
whitened by captions, as in closed forms with a caption prior; r -> infinity is a filter matched to e in G^2.

Properties of M. X (U^T X)^-1 U^T is an oblique projection onto the shifts from the anchors to the concepts, along the
directions that U does not read. With gain g = 1, therefore: M^2 = M; U^T M = 0, so the readings of every text are 0,
whether or not it has the concept's name; concepts do not cross-talk, M (e_i - a_i) = 0 for each; and M h = h for every
h that U does not read, exactly so for the columns of H. M is singular: no text state gives e back. G and C are scaled
to trace D, so M does not change when weights or text states are scaled, and r means the same on every backbone.

Everything is (D, D) or (D, n) float64 on the CPU; vectors are columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from realera.contracts import UserError

LEAST = 0.05  # lower bound of the metric's eigenvalues in `roots`
ROUNDING = 1e-8  # share of a reading; a smaller remainder is rounding error and counts as 0
CONDITION = 1e8  # of U^T X; above it, concepts and anchors cannot be told apart


def metric(weights: Sequence[Tensor], layers: str = "as_they_are") -> Tensor:
    """G (D, D) of weights (out, D), scaled to trace D. layers: "as_they_are" = c_l = 1, so a layer with large weights
    counts more; "equal" = every layer has the same trace."""
    total = torch.zeros(weights[0].shape[1], weights[0].shape[1], dtype=torch.float64)
    for weight in weights:
        double = weight.detach().to("cpu", torch.float64)
        gram = double.T @ double
        total += gram / gram.trace() if layers == "equal" else gram
    return _scaled(total)


def roots(metric: Tensor, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """R = G^(1/2) and R^-1, (D, D): in the coordinates R k, distances are those of the values. Eigenvalues of G below
    `least` (their mean is 1) are raised to `least`, because R must be invertible in directions that the denoiser hardly
    reads too; with least = 0, R^-1 may not be finite."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp(min=least).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def covariance(gram: Tensor, mean: Tensor, rows: int) -> Tensor:
    """C (D, D), scaled to trace D, of `rows` rows with the sum gram = sum k k^T and this mean (D,)."""
    return _scaled(gram / rows - torch.outer(mean, mean))


def quiet(metric: Tensor, covariance: Tensor, price: float) -> Tensor:
    """Q = G (G C G + r I)^-1 G, (D, D), symmetric.

    price: r, at least 0. Raises UserError if it does not determine the readings; captions of low rank need r > 0.
    """
    system = metric @ covariance @ metric
    system = (system + system.T) / 2 + price * torch.eye(len(metric), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(system)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise UserError(
            f"method.edit.price={price:g} does not determine how the concept is read: give a larger one, such as 1."
        )
    return metric @ torch.cholesky_solve(metric, lower)


def further_directions(differences: Tensor, shift: Tensor, metric: Tensor, count: int) -> Tensor:
    """(D, count): directions besides a concept's mean shift x (D,) in which its values differ most from the anchor's.

    differences: rows d_i (n, D), each a row of the concept less the matching row of the anchor, so the effect of their
    template and position cancels. x alone removes the mean of the values R d_i, R = G^(1/2). The space of 1 + count
    directions that is nearest to all of them and includes x minimises sum_i ||R c_i - P R c_i||^2 over orthogonal
    projections P, where R c_i is the part of R d_i outside the span of R x, c_i = d_i - x (x^T G d_i) / (x^T G x). So P
    projects onto the leading eigenvectors v of R S R, S = sum_i c_i c_i^T, and x_j = S R v_j / lambda_j is the
    combination of the c_i with values R x_j = v_j. R is not inverted, so G may be singular: directions that the
    denoiser does not read are not chosen.

    Zeros if the concept is its own anchor. Raises UserError if the rows differ in fewer directions.
    """
    size = shift @ metric @ shift
    if not bool(size > 0):
        return torch.zeros(len(shift), count, dtype=torch.float64)
    rest = differences - torch.outer(differences @ (metric @ shift) / size, shift)
    root, _ = roots(metric, 0.0)
    scatter = rest.T @ rest
    seen = root @ scatter @ root
    values, vectors = torch.linalg.eigh((seen + seen.T) / 2)
    there = int((values > ROUNDING * (differences @ root).square().sum()).sum())
    if there < count:
        raise UserError(
            f"method.edit.directions={1 + count} is more than the {1 + there} directions in which the denoiser's "
            "values of the concept and its anchor differ: give fewer directions, or more prompts (task.templates=...)."
        )
    result: Tensor = scatter @ root @ vectors[:, -count:].flip(1) / values[-count:].flip(0)
    return result


def blind_quiet(quiet: Tensor, held: Tensor) -> Tensor:
    """Q - Q H (H^T Q H)^+ H^T Q, (D, D): the quiet readings that are blind to held (D, m)."""
    known = quiet @ held
    result: Tensor = quiet - known @ torch.linalg.pinv(held.T @ known, hermitian=True) @ known.T
    return result


def blind(quiet: Tensor, readings: Tensor, held: Tensor, keep: float = math.inf) -> Tensor:
    """Readings (D, n) made blind to held (D, m): U <- U - Q H (H^T Q H)^+ H^T U, the nearest readings in Q^-1 with
    U^T H = 0. It is a pseudo-inverse because preserved names may be linearly dependent.

    keep: inf = exactly blind; else a price on readings of held, (keep / d) ||U^T h||^2 for each h against the distance,
    d the mean of h^T Q h: (H^T Q H + d I / keep)^-1 replaces the pseudo-inverse. If other columns are preserved exactly
    as well, the readings must already be blind to those and quiet must come from
    `blind_quiet`, or one step undoes the other.
    """
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
    result: Tensor = readings - known @ torch.linalg.solve(system, held.T @ readings)
    return result


def fitted(seen: Tensor, columns: Tensor, goals: Tensor, price: float) -> Tensor:
    """(D,): a reading that is 1 on a concept and near its goal on each further text.

    columns B (D, 1 + m): the concept's e - mu, and the texts' rows less mu. seen (D, 1 + m): their readings, Q B made
    blind to the preserved columns. goals y (m,): 1 for a text that draws the concept, 0 for one that does not. With
    S = B^T seen and s = S_00 / price, so that price does not depend on the scale of Q, the blind reading that minimises

        u^T Q^-1 u + (1 / s) sum_j (u^T b_j - y_j)^2    with u^T (e - mu) = 1

    is u = seen (S + diag(0, s, ..., s))^-1 (1, y). With price 0 it is seen's first column, which reads only the
    concept; also if that column is zero, because the concept itself is preserved.
    """
    system = columns.T @ seen
    system = (system + system.T) / 2
    if price == 0 or columns.shape[1] == 1 or not bool(system[0, 0] > 0):
        return seen[:, 0]
    system[1:, 1:] += torch.eye(len(goals), dtype=torch.float64) * (system[0, 0] / price)
    result: Tensor = seen @ torch.linalg.solve(system, torch.cat([torch.ones(1, dtype=torch.float64), goals]))
    return result


def projection(
    readings: Tensor, shifts: Tensor, gain: float = 1.0, tolerance: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Of readings U and shifts X = E - A, both (D, n): L = -g X and R = (U^T X + t I)^-1 U^T (n, D) with M = I + L R,
    each reading scaled to u^T x = 1, and the system's condition number.

    gain: g; 1 is the projection, more takes the readings beyond zero, 0 changes nothing. tolerance: t; 0 makes the
    readings exactly zero, which is possible for at most D less the number of preserved columns. Raises UserError if a
    concept is read like its anchor, like another concept, or like a preserved column.
    """
    differ = shifts.norm(dim=0) > 0  # a concept that is its own anchor must not change
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
            "By the denoiser's values, the concepts cannot be told from their anchors, from one another or from the "
            "preserved names: choose other anchors (anchor=...), or preserve fewer names (method.edit.keep)."
        )
    return -gain * shifts, torch.linalg.solve(system, scaled.T), {"condition": condition}


def _scaled(gram: Tensor) -> Tensor:
    return gram * (len(gram) / gram.trace())
