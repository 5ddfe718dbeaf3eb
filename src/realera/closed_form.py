"""Closed-form edits of linear layers: normal equations, accumulated and solved in float64.

An edit makes a layer W0 (out, D) map the key k_i to W0 a_i, the original output for an anchor state a_i (a preserved
state is its own anchor). It minimises sum_i w_i ||W k_i - W0 a_i||^2 + mu ||W - W0||^2 (UCE, arXiv 2308.14761, equation
7; RealEra, arXiv 2410.09140, equation 7). Since every target is an original projection, the solution is

    W = W0 M,    M = (sum_i w_i a_i k_i^T + mu I) (sum_i w_i k_i k_i^T + mu I)^-1,

one D x D matrix for all layers. D is the width of the text states; the rows of (n, D) tensors are states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from realera.contracts import UserError

FEW = 4  # up to width / FEW rows are solved by a system of their own size
RESIDUAL = 1e-8  # largest accepted relative residual of a solve; in float64 it is usually below 1e-12


class NormalEquations:
    """The two sums of an edit, (D, D) float64 on the CPU: cross = sum w a k^T and gram = sum w k k^T."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.cross = torch.zeros(width, width, dtype=torch.float64)
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.rows: list[tuple[Tensor, Tensor]] | None = []  # sqrt(w) (k, a - k) of all pairs, while they are few

    def add_pairs(self, keys: Tensor, anchors: Tensor, weight: float | Tensor = 1.0) -> NormalEquations:
        """Adds the goal W k = W0 a. keys, anchors (n, D); weight: one number, or (n,)."""
        keys, anchors = _double(keys), _double(anchors)
        if keys.shape != anchors.shape:
            raise ValueError(f"keys {tuple(keys.shape)} and anchors {tuple(anchors.shape)} must pair row by row")
        weighted = keys * _column(weight)
        rows = self.rows
        self.add_moments(anchors.T @ weighted, keys.T @ weighted)
        if rows is not None and sum(len(one) for one, _ in rows) + len(keys) <= self.width // FEW:
            root = keys * _column(weight) ** 0.5
            self.rows = [*rows, (root, (anchors - keys) * _column(weight) ** 0.5)]
        return self

    def add_preserved(self, keys: Tensor, weight: float | Tensor = 1.0) -> NormalEquations:
        """Adds the goal W k = W0 k. keys (n, D); weight: one number, or (n,)."""
        keys = _double(keys)
        gram = keys.T @ (keys * _column(weight))
        return self.add_moments(gram, gram)

    def add_moments(self, cross: Tensor, gram: Tensor, weight: float = 1.0) -> NormalEquations:
        """Adds precomputed sums: cross = sum a k^T and gram = sum k k^T, each (D, D)."""
        self.rows = None
        self.cross += _double(cross) if weight == 1 else weight * _double(cross)
        self.gram += _double(gram) if weight == 1 else weight * _double(gram)
        return self

    def merge(self, other: NormalEquations) -> NormalEquations:
        """Adds the sums of `other`. Accumulation in parts equals accumulation at once."""
        return self.add_moments(other.cross, other.gram)

    @property
    def mean_eigenvalue(self) -> float:
        """trace / D of gram: the scale of a ridge."""
        return float(self.gram.trace()) / self.width

    def factors(self, ridge: float) -> tuple[Tensor, Tensor] | None:
        """L (D, n) and R (n, D) float64 with M = I + L R if the sums have few rows, n <= D / 4; else None. M is that of
        `solve`, but the system has n unknowns instead of D, and applying the factors to a weight takes n / D of the
        time.

            L = (a - k)^T sqrt(w),    R = (sqrt(w) k k^T sqrt(w) + mu I)^-1 sqrt(w) k

        Raises UserError as `solve`.
        """
        few = self._few(ridge)
        return None if few is None else (few.left, few.right)

    def solve(self, ridge: float) -> tuple[Tensor, dict[str, float]]:
        """M (D, D) float64, and the system's condition number and relative residual.

        ridge: mu, in the units of a squared norm of a state; directions that no state determines are unchanged.

        Raises:
            UserError: a negative ridge, or a system that does not determine M without a (larger) ridge.
        """
        eye = torch.eye(self.width, dtype=torch.float64)
        wanted = self.cross + ridge * eye
        if (few := self._few(ridge)) is not None:
            residual = few.residual / float(torch.linalg.norm(wanted))
            if residual <= RESIDUAL:
                return eye + few.left @ few.right, {"condition": 1 + few.largest / ridge, "residual": residual}
        system = self.gram + ridge * eye
        lower, info = _factor(system, ridge)
        return _solve(lower, system, wanted, ridge, info)

    def _few(self, ridge: float) -> _Few | None:
        """The factors and the norm of their residual. With the rows k of K and a - k of S,

            M (gram + mu I) - (cross + mu I) = S^T E,    E = R K^T K + mu R - K,

        so the norm needs no product of two D x D matrices.
        """
        if not self.rows or not (ridge > 0 and math.isfinite(ridge)):
            return None
        keys, shifts = (torch.cat(part) for part in zip(*self.rows))
        _refuse_not_finite(keys)
        _refuse_not_finite(shifts)
        products = keys @ keys.T
        largest = float(torch.linalg.eigvalsh(products)[-1])
        if ridge <= self.width * torch.finfo(torch.float64).eps * largest:
            return None  # only the keys' directions would be determined
        system = products + ridge * torch.eye(len(keys), dtype=torch.float64)
        right = torch.cholesky_solve(keys, torch.linalg.cholesky(system))
        error = (right @ keys.T) @ keys + ridge * right - keys
        squared = float(((shifts @ shifts.T) * (error @ error.T)).sum())
        return _Few(shifts.T.contiguous(), right, largest, math.sqrt(max(0.0, squared)))


class _Few(NamedTuple):
    """The factors of M, the largest eigenvalue of gram, and the norm of the residual."""

    left: Tensor  # L (D, n)
    right: Tensor  # R (n, D)
    largest: float
    residual: float


def fuse(
    weights: Mapping[str, Tensor],
    changes: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    grams: Sequence[Tensor],
    ridge: float,
    preserved: Tensor | None = None,
    originals: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One W per layer that equals W1 + B_i A_i on the keys of each group i (MACE, arXiv 2403.06135):

        W = (sum_i (W1 + B_i A_i) G_i + W0 P + mu W1) (sum_i G_i + P + mu I)^-1

    The targets differ per layer but the keys do not, so the system is factored once and used for all layers.

    weights: {layer: W1 (out, D)}. changes: {layer: [(B_i (out, r), A_i (r, D))]}; a layer without changes has B A = 0.
    grams: G_i = sum k k^T (D, D) of each group. ridge: mu, as in `NormalEquations.solve`. preserved: P (D, D),
    sum k k^T of states whose output by originals, {layer: W0}, is preserved.
    Returns {layer: W (out, D) float64}, and the condition number and the largest relative residual.

    Raises:
        UserError: as `NormalEquations.solve`.
    """
    assert (preserved is None) == (originals is None)
    groups = [_double(gram) for gram in grams]
    keys = torch.stack(groups).sum(dim=0)
    eye = torch.eye(len(keys), dtype=torch.float64)
    kept = torch.zeros_like(keys) if preserved is None else _double(preserved)
    system = keys + kept + ridge * eye
    lower, info = _factor(system, ridge)
    fused: dict[str, Tensor] = {}
    residual = 0.0
    for name, weight in weights.items():
        right = _double(weight) @ (keys + ridge * eye)
        if originals is not None:
            right += _double(originals[name]) @ kept
        for (up, down), gram in zip(changes.get(name, ()), groups):
            right += _double(up) @ (_double(down) @ gram)
        fused[name], measured = _solve(lower, system, right, ridge, info)
        residual = max(residual, measured["residual"])
    return fused, {**info, "residual": residual}


# --- maps ------------------------------------------------------------------------------------------------------------


def spectrum(map: Tensor) -> Tensor:
    """Singular values of a map (D, D), largest first, (D,) float64: 1 is a preserved direction, 0 an erased one."""
    result: Tensor = torch.linalg.svdvals(_double(map))
    return result


def relative_change(weight: Tensor, map: Tensor) -> float:
    """||W0 M - W0|| / ||W0|| (Frobenius) of a layer (out, D)."""
    original = _double(weight)
    return float(torch.linalg.norm(original @ _double(map) - original) / torch.linalg.norm(original))


def interpolate(map: Tensor, strength: float) -> Tensor:
    """I + strength (M - I), (D, D) float64: 0 is the original model, 1 the edit, above 1 exaggerates it."""
    eye = torch.eye(len(map), dtype=torch.float64)
    return eye + strength * (_double(map) - eye)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """The map of two successive edits of the weights: (W0 M1) M2, so M1 M2, (D, D) float64."""
    return _double(first) @ _double(second)


# --- one solve -------------------------------------------------------------------------------------------------------


def _factor(system: Tensor, ridge: float) -> tuple[Tensor, dict[str, float]]:
    """The Cholesky factor of a symmetric positive definite system (D, D), and its condition number."""
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise UserError(f"ridge={ridge} is not a weight: give a finite number of 0 or more.")
    _refuse_not_finite(system)
    eigenvalues = torch.linalg.eigvalsh(system)
    largest = float(eigenvalues[-1])
    determined = eigenvalues > len(system) * torch.finfo(torch.float64).eps * largest  # the usual numerical rank
    if not determined.all():
        raise _singular(ridge, f"{int(determined.sum())} of {len(system)} directions")
    return torch.linalg.cholesky(system), {"condition": largest / float(eigenvalues[0])}


def _solve(
    lower: Tensor, system: Tensor, right: Tensor, ridge: float, info: dict[str, float]
) -> tuple[Tensor, dict[str, float]]:
    """X with X @ system = right, X and right (out, D)."""
    _refuse_not_finite(right)
    solution = torch.cholesky_solve(right.T, lower).T.contiguous()
    residual = float(torch.linalg.norm(solution @ system - right) / torch.linalg.norm(right).clamp(min=1e-300))
    if not residual <= RESIDUAL:
        raise _singular(ridge, f"the solution only to a relative residual of {residual:.0e}")
    return solution, {**info, "residual": residual}


def _refuse_not_finite(sums: Tensor) -> None:
    if not torch.isfinite(sums).all():
        raise UserError(
            "The text states or their sums have values that are not finite, so the edit cannot be solved: check the "
            "text encoder's weights, and the weights and scales of method.edit."
        )


def _singular(ridge: float, determined: str) -> UserError:
    return UserError(
        f"The closed form is singular at ridge={ridge:g} (the states determine {determined}): give a larger ridge, "
        f"such as 0.1."
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _column(weight: float | Tensor) -> float | Tensor:
    return _double(weight)[:, None] if isinstance(weight, Tensor) else weight
