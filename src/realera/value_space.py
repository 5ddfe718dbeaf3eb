"""Closed-form edits in the space where a U-Net reads text: the values W_l k of its cross-attention layers l.

Two texts that draw the same thing lie close together in their values, however far apart the text encoder puts them, so
what is to be erased is taken from there. Letters: k a row of text states, a column vector of width D; e a concept's
mean row, a its anchor's; mu, C the mean and covariance of rows of plain captions, which stand for all that is to stay.

    G = sum_l c_l W_l^T W_l                     the metric in which the U-Net sees text
    Q = G (G C G + r I)^-1 G                    the quiet readings, below
    U = Q (E - mu 1^T),  then  U^T H = 0        one reading per concept, blind to what is held (columns of H)
    M = I - g X (U^T X)^-1 U^T,   X = E - A     the map: W = W0 M (`further` adds columns to X, and their readings to U)

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
    G below `least` (their mean is 1) count as so much, for what the U-Net hardly reads must still have a way back; with
    0 there may be none, and R^-1 is not finite."""
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


def further(differences: Tensor, shift: Tensor, metric: Tensor, count: int) -> Tensor:
    """(D, count): directions besides a concept's mean shift x (D,) in which its values differ most from the anchor's.

    differences: rows d_i (n, D), of the concept less the anchor's row beside it, so that what their template and place
    do to both is not in them. x alone takes the mean of the values R d_i away, R = G^(1/2). The space of 1 + count
    directions that comes nearest to all of them, x being one, minimises sum_i ||R c_i - P R c_i||^2 over orthogonal
    projections P, with c_i = d_i - x (x^T G d_i) / (x^T G x) what R x does not span of R d_i. So P is onto the leading
    eigenvectors v of R S R, S = sum_i c_i c_i^T, and x_j = S R v_j / lambda_j: the combination of the c_i whose values
    are R x_j = v_j. R is not inverted, so that G may be singular: what the U-Net does not read is not chosen.

    Zeros, where the concept is its own anchor. Raises UserError where the rows differ in fewer directions.
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
            f"method.edit.directions={1 + count} is more than the {1 + there} in which the U-Net reads the concept's "
            "prompts apart from its anchor's: give fewer directions, or more prompts (task.templates=...)."
        )
    return scatter @ root @ vectors[:, -count:].flip(1) / values[-count:].flip(0)


def beside(quiet: Tensor, held: Tensor) -> Tensor:
    """Q - Q H (H^T Q H)^+ H^T Q, (D, D): the quiet readings among those that are blind to held (D, m)."""
    known = quiet @ held
    return quiet - known @ torch.linalg.pinv(held.T @ known, hermitian=True) @ known.T


def blind(quiet: Tensor, readings: Tensor, held: Tensor, keep: float = math.inf) -> Tensor:
    """Readings (D, n) made blind to held (D, m): U <- U - Q H (H^T Q H)^+ H^T U, the nearest ones in Q^-1 with
    U^T H = 0; the pseudo-inverse, for names that are held may depend on one another.

    keep: inf = exactly; else a price on what is read of them, (keep / d) ||U^T h||^2 for each h against the distance,
    d the mean of h^T Q h: (H^T Q H + d I / keep)^-1 in place of the pseudo-inverse. Where others are held exactly as
    well, the readings are already blind to these and quiet is `beside` them, or the two would undo one another.
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
    return readings - known @ torch.linalg.solve(system, held.T @ readings)


def fitted(seen: Tensor, columns: Tensor, goals: Tensor, price: float) -> Tensor:
    """(D,): a reading that gives 1 on a concept and comes near its goal on each of further texts.

    columns B (D, 1 + m): the concept's e - mu and the texts', less mu. seen (D, 1 + m): their readings, Q B made blind
    to what is held. goals y (m,): 1 for a text that draws the concept, 0 for one that does not. With S = B^T seen and
    s = S_00 / price, so that price means the same whatever the scale of Q, the blind reading that minimises

        u^T Q^-1 u + (1 / s) sum_j (u^T b_j - y_j)^2    with u^T (e - mu) = 1

    is u = seen (S + diag(0, s, ..., s))^-1 (1, y). price 0: seen's first column, which reads the concept alone; so too
    where that is zero, because the concept is held itself.
    """
    system = columns.T @ seen
    system = (system + system.T) / 2
    if price == 0 or columns.shape[1] == 1 or not bool(system[0, 0] > 0):
        return seen[:, 0]
    system[1:, 1:] += torch.eye(len(goals), dtype=torch.float64) * (system[0, 0] / price)
    return seen @ torch.linalg.solve(system, torch.cat([torch.ones(1, dtype=torch.float64), goals]))


def projection(
    readings: Tensor, shifts: Tensor, gain: float = 1.0, tolerance: float = 0.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Of readings U and shifts X = E - A, both (D, n): L = -g X and R = (U^T X + t I)^-1 U^T (n, D) with M = I + L R,
    each reading scaled to u^T x = 1, and the system's condition number.

    gain: g; 1 is the projection, more takes the readings beyond zero, 0 changes nothing. tolerance: t; 0 takes them
    away entirely, which more concepts than D less what is held cannot be. Raises UserError where a concept is read like
    its anchor, like another concept, or like what is held.
    """
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
