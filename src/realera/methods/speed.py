"""SPEED (arXiv 2503.07392): W_V is changed only in the null space of the retained rows.

For each layer W separately, with t a concept's row and a its anchor's, as columns of width D:

    T = mean t t^T,   A = mean a t^T
    D0 = W (A - T) (I + T)^-1                          the change of W by an edit that preserves nothing
    K0 = the retained rows k with ||D0 k|| above their mean                            (prior filtering)
         and k + x v, x ~ N(0, 1), v the direction that W reads least, filtered too    (prior augmentation)
    N  = eigenvectors of mean k k^T over K0 with an eigenvalue below the threshold     (the null space)
    min over X = Y N^T   mean ||X t - W (a - t)||^2 + mu ||X||^2   subject to  X K2 = 0

K2 contains the begin row and the centres of the empty prompt's other rows (invariant equality constraints), because
these are the same for every image. With H = N (N^T T N + mu I)^-1 N^T the solution is

    X = W (A - T) (H - H K2 (K2^T H K2 + l I)^-1 K2^T H),

the official code's formula (Ouxiang-Li/SPEED, train_erase_null.py, commit 6d3df0c) in symmetric form. l = 0 preserves
K2 exactly; l > 0 adds the penalty ||X K2||^2 / l instead. Everything is float64 on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, Edit, Neighbours, Pair, UserError
from realera.methods.priors import Preserve, kept_texts
from realera.methods.texts import last_rows
from realera.setting_types import AnyText, NonNegative, Number, Positive, Projections, Seed

Rows = Literal["last", "all_but_bos"]
Few = Annotated[int, Number(0, 1000, whole=True)]
ITERATIONS = 100  # of k-means, at most


class NullSpaceErasure:
    """SPEED's closed form, layer by layer.

    projections: the weights to edit, "values" (official), "keys" or "both". rows: the rows of a bare name and of its
    guide, "last" = the last sub-token's, "all_but_bos" = all but the first (official for nudity). guide: the text that
    a concept is mapped to; None = its anchor. retain: names to preserve, or "artists" (`priors.Preserve`), each by the
    row of its last sub-token. A name that contains an erased name as a word is left out. () = the empty prompt's rows
    (official without a list). filter: use only the retained rows that the edit would move more than average. augment:
    number of noisy copies of each retained row; of these, only the ones that move more than average are used.
    threshold: eigenvalues of the retained rows' mean k k^T below it belong to the null space, in squared norms of a
    row. ridge: mu, weight of ||X||^2. centres: number of centres of the empty prompt's rows, preserved with the begin
    row. slack: l, 0 = these are preserved exactly. seed: of the noise.
    """

    def __init__(
        self,
        projections: Projections = "values",
        rows: Rows = "last",
        guide: AnyText | None = None,
        retain: Preserve = (),
        filter: bool = True,
        augment: Few = 10,
        threshold: Positive = 0.1,
        ridge: Positive = 1.0,
        centres: Few = 3,
        slack: NonNegative = 0.0,
        seed: Seed = 0,
    ) -> None:
        self.projections = projections
        self.rows = rows
        self.guide = guide
        self.retain = retain
        self.filter = filter
        self.augment = augment
        self.threshold = threshold
        self.ridge = ridge
        self.centres = centres
        self.slack = slack
        self.seed = seed

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """Weights (out, D) of every edited layer. Only the pairs' names are used; neighbours are not used.

        info: rows_retained and directions_free, means over the layers. Raises UserError if no direction is free.
        """
        target, cross = self._moments(backbone, pairs)
        retained = self._retained(backbone, pairs)
        empty = backbone.encode([""])
        rows_of_empty = _double(empty.states[0])
        held = invariants(rows_of_empty[empty.constant()], rows_of_empty[empty.varying()], self.centres)
        plain = torch.linalg.solve(target + torch.eye(len(target)), cross - target, left=False)
        generator = Generator().manual_seed(self.seed)
        weights: dict[str, Tensor] = {}
        counted, free = [], []
        for name, layer in backbone.text_projections(self.projections).items():
            weight = _double(layer.weight)
            rows = self._prior(weight, weight @ plain, retained, generator)
            basis = null_space(rows.T @ rows / len(rows), self.threshold)
            step = constrained(basis, target, held, self.ridge, self.slack)
            weights[name] = weight + weight @ (cross - target) @ step
            counted.append(len(rows))
            free.append(basis.shape[1])
        info = {"rows_retained": sum(counted) / len(counted), "directions_free": sum(free) / len(free)}
        return Edit(weights=weights, info={"concepts": len(pairs), **info})

    def _moments(self, backbone: Backbone, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """T and A (D, D): sums over a name's rows, means over the concepts."""
        names = [pair.concept.target for pair in pairs]
        guides = [pair.concept.anchor if self.guide is None else self.guide for pair in pairs]
        found = [backbone.encode(texts) for texts in (names, guides)]
        if self.rows == "last":
            keys, anchors = (_double(torch.cat(last_rows(states))) for states in found)
        else:
            keys, anchors = (_double(states.states[:, states.varying()].flatten(0, 1)) for states in found)
        return keys.T @ keys / len(pairs), anchors.T @ keys / len(pairs)

    def _retained(self, backbone: Backbone, pairs: Sequence[Pair]) -> Tensor:
        """(n, D): the retained rows, before filtering."""
        names = [pair.concept.target for pair in pairs if pair.concept.target]
        erased = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in names]
        texts = [text for text in kept_texts(self.retain, pairs) if not any(word.search(text) for word in erased)]
        if not texts:
            empty = backbone.encode([""])
            return _double(empty.states[0, empty.varying()])
        return _double(torch.cat(last_rows(backbone.encode(texts, to_end=True))))

    def _prior(self, weight: Tensor, change: Tensor, retained: Tensor, generator: Generator) -> Tensor:
        """K0 (m, D) of one layer. weight: W, change: D0, both (out, D)."""
        rows = most_moved(retained, change) if self.filter else retained
        if not self.augment:
            return rows
        return torch.cat([rows, most_moved(noisy(rows, weight, self.augment, generator), change)])


def most_moved(rows: Tensor, change: Tensor) -> Tensor:
    """The rows (n, D) with ||change k|| above the mean; all rows if none is above it, so the result is never empty.
    change: (out, D)."""
    norms = (rows @ change.T).norm(dim=1)
    kept = rows[norms > norms.mean()]
    return kept if len(kept) else rows


def noisy(rows: Tensor, weight: Tensor, copies: int, generator: Generator) -> Tensor:
    """(copies n, D): each row (n, D) plus x v, x ~ N(0, 1), v (D,) the right singular vector of the least of W's
    min(out, D) singular values: the copies differ in the direction that the layer reads least."""
    least = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    noise = torch.randn(copies * len(rows), 1, generator=generator, dtype=torch.float64)
    result: Tensor = rows.repeat(copies, 1) + noise * least
    return result


def invariants(begin: Tensor, rows: Tensor, centres: int) -> Tensor:
    """K2 (D, b + centres): the empty prompt's begin rows (b, D), and k-means centres of its other rows (n, D). k-means
    starts at rows spread evenly over the prompt."""
    means = rows[torch.linspace(0, len(rows) - 1, centres).long()]
    nearest = torch.full((len(rows),), -1)
    for _ in range(ITERATIONS if centres else 0):
        before, nearest = nearest, torch.cdist(rows, means).argmin(dim=1)
        if torch.equal(before, nearest):
            break
        own = [rows[nearest == one] for one in range(centres)]
        means = torch.stack([group.mean(dim=0) if len(group) else old for group, old in zip(own, means)])
    return torch.cat([begin, means]).T


def null_space(gram: Tensor, threshold: float) -> Tensor:
    """N (D, m): orthonormal eigenvectors of gram (D, D) with an eigenvalue below the threshold. Raises UserError if
    there is none."""
    values, vectors = torch.linalg.eigh(gram)
    if float(values[0]) >= threshold:
        raise UserError(
            f"method.edit.threshold={threshold:g} leaves no direction free: the least eigenvalue of the retained rows "
            f"is {float(values[0]):.3g}; give a larger threshold, or retain fewer names."
        )
    result: Tensor = vectors[:, values < threshold]
    return result


def constrained(basis: Tensor, target: Tensor, held: Tensor, ridge: float, slack: float) -> Tensor:
    """S (D, D) with X = W (A - T) S, as above. basis: N (D, m); target: T (D, D); held: K2 (D, c)."""
    system = basis.T @ target @ basis + ridge * torch.eye(basis.shape[1], dtype=torch.float64)
    free = basis @ torch.linalg.solve(system, basis.T)
    known = free @ held
    inner = held.T @ known + slack * torch.eye(held.shape[1], dtype=torch.float64)
    result: Tensor = free - known @ torch.linalg.pinv((inner + inner.T) / 2, hermitian=True) @ known.T
    return result


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
