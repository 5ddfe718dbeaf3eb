"""LEACE (arXiv 2306.03819) on text states: the smallest map after which no linear classifier finds the concept's rows.

Rows x belong to several classes (z is one-hot: each concept's prompts are one class, the contrast is the last). They
have mean m, covariance S_xx and cross-covariance S_xz. The paper's map (theorem 4.3; EleutherAI/concept-erasure,
concept_erasure/leace.py) is

    r(x) = x - W^+ P W (x - m),    W = S_xx^(-1/2),  P the orthogonal projection onto the columns of W S_xz.

Of all affine maps that give every class the same mean, it minimises E ||r(x) - x||^2. The denoiser reads W_l x without
a bias, so only a linear map M can be folded into its weights, W_l <- W_l M. The mean can be treated in two ways:

    held    M m = m, so no bias is needed. With w = W m, U an orthonormal basis of the columns of W S_xz and
            B = U - w w^T U / w^T w:   M = I - W^+ U (B^T B)^-1 B^T W,
            the smallest such linear map (if S_xx is invertible, which shrinkage ensures)
    moved   M = I - W^+ P W, the paper's matrix without its bias, as in the official code with affine=False. The
            classes still have the same mean, but it is M m

S_xx is shrunk towards a multiple of I as in the official code, with the optimal weight for the number of rows (arXiv
1308.2608). Vectors of width D are columns; everything is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from realera import paths
from realera.closed_form import FEW
from realera.contracts import PROJECTIONS, Backbone, Edit, Neighbours, Pair, TextStates, UserError
from realera.methods.priors import caption_rows
from realera.mining.band import Rows
from realera.mining.sampling import counted_rows
from realera.setting_types import Projections, Sums

Contrast = Literal["captions", "anchor"]
Mean = Literal["held", "moved"]
SMALL = 1e-8  # smaller singular values of W S_xz (at most 1) count as zero: the classes do not differ there


class Moments(NamedTuple):
    """The rows of one class: their number, their sum (D,), and sum x x^T (D, D)."""

    rows: int
    total: Tensor
    gram: Tensor


class LinearErasure:
    """LEACE's closed form, one map for all layers.

    projections: the weights to edit, "values", "keys" or "both". rows: the rows of the training prompts that count (as
    in `Band.rows`), for the concept and the anchor. contrast: the class to separate the concepts from: "captions" (all
    their rows, including the begin row, which every prompt has) or "anchor" (the same prompts with the anchors' names).
    captions: "everyday" or a file made by python -m realera.cache. mean: "held" or "moved", see above. shrinkage: of
    the covariance; without it, directions that no row contains are unchanged.

    Raises UserError for a captions file with contrast="anchor".
    """

    def __init__(
        self,
        projections: Projections = "both",
        rows: Rows = "suffix",
        contrast: Contrast = "captions",
        captions: Sums = "everyday",
        mean: Mean = "held",
        shrinkage: bool = True,
    ) -> None:
        if contrast == "anchor" and captions != "everyday":
            raise UserError(
                f"method.edit.captions={captions} has no effect with method.edit.contrast=anchor: set "
                "method.edit.contrast=captions, or leave out method.edit.captions."
            )
        self.projections = projections
        self.rows = rows
        self.contrast = contrast
        self.captions = captions
        self.mean = mean
        self.shrinkage = shrinkage

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """One map (D, D). Neighbours are not used. info: rank of I - M. Raises UserError as `eraser`."""
        concepts = [self._moments([pair.target]) for pair in pairs]
        if self.contrast == "anchor":
            others = self._moments([pair.anchor for pair in pairs])
        else:
            others = _captions(backbone, self.captions)
        count, mean, covariance, cross = statistics([*concepts, others])
        covariance = shrunk(covariance, count) if self.shrinkage else covariance
        left, right = eraser(covariance, cross, mean if self.mean == "held" else None)
        return Edit(
            map=torch.eye(backbone.width, dtype=torch.float64) + left @ right,
            info={"concepts": len(pairs), "rows": count, "rank": left.shape[1]},
            factors=(left, right) if left.shape[1] <= backbone.width // FEW else None,
            projections=PROJECTIONS[self.projections],
        )

    def _moments(self, sides: Sequence[TextStates]) -> Moments:
        rows = torch.cat([states.states[counted_rows(states, self.rows)].double().cpu() for states in sides])
        return Moments(len(rows), rows.sum(dim=0), rows.T @ rows)


def statistics(classes: Sequence[Moments]) -> tuple[int, Tensor, Tensor, Tensor]:
    """(number of rows, m (D,), S_xx (D, D), S_xz (D, n - 1)); S_xz uses the indicators of all classes but the last."""
    count = sum(one.rows for one in classes)
    mean = torch.stack([one.total for one in classes]).sum(dim=0) / count
    covariance = torch.stack([one.gram for one in classes]).sum(dim=0) / count - torch.outer(mean, mean)
    cross = torch.stack([(one.total - one.rows * mean) / count for one in classes[:-1]], dim=1)
    return count, mean, covariance, cross


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """a S + (1 - a) (tr S / D) I of S = covariance (D, D) of `count` rows, with
    a = 1 - (tr S)^2 / (count (||S||^2 - (tr S)^2 / D)), at least 0: optimal linear shrinkage (arXiv 1308.2608)."""
    width, trace = len(covariance), float(covariance.trace())
    spread = float(covariance.square().sum()) - trace**2 / width
    share = max(0.0, 1 - trace**2 / (count * spread)) if spread > 0 else 0.0
    return share * covariance + (1 - share) * trace / width * torch.eye(width, dtype=torch.float64)


def eraser(covariance: Tensor, cross: Tensor, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L (D, r) and R (r, D) with M = I + L R; r is at most the number of classes less one.

    covariance: S_xx (D, D); if it is singular, W is the root of its pseudo-inverse. cross: S_xz (D, n). held: m (D,)
    with M m = m; None = the paper's matrix. Raises UserError if the classes differ only along m.
    """
    values, vectors = torch.linalg.eigh(covariance)
    seen = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    root = torch.where(seen, values, 0.0).sqrt()
    whiten = (vectors * torch.where(seen, 1 / root, 0.0)) @ vectors.T
    left, sizes, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)
    left = left[:, sizes > SMALL]
    back = (vectors * root) @ (vectors.T @ left)  # W^+ times an orthonormal basis of W S_xz's columns
    if held is None or not left.shape[1]:
        return -back, left.T @ whiten
    mean = whiten @ held
    across = left - torch.outer(mean, mean @ left) / (mean @ mean).clamp(min=1e-300)
    system = across.T @ across
    if float(torch.linalg.eigvalsh(system)[0]) < SMALL:
        raise UserError(
            "The concepts differ from the contrast only along the mean of all rows, so method.edit.mean=held has no "
            "solution: set method.edit.mean=moved, or another method.edit.contrast."
        )
    return -back, torch.linalg.solve(system, across.T @ whiten)


def _captions(backbone: Backbone, cache: Sums) -> Moments:
    """Moments of all rows of the captions, including each caption's begin row."""
    rows = caption_rows(backbone, cache, paths.cache_dir())
    begin, captions = rows.begin, rows.captions
    total = rows.mean * rows.count + captions * begin.sum(dim=0)
    return Moments(rows.count + captions * len(begin), total, rows.gram + captions * (begin.T @ begin))
