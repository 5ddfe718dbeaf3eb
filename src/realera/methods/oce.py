"""OCE (Orthogonal Concept Erasure, arXiv 2605.28902): the values of all texts are rotated, W <- Q W with Q^T Q = I.

A rotation preserves W^T W, and so the length of every text's value and the angle between any two values. For each layer
W (out, D) separately, P_E and P_G project onto the span of the concepts' values W c_i and of their guides' values
W a_i; the columns of E are an orthonormal basis of the first span. Q minimises

    2 s sum_b b^T Q (I - P_G) b                       turns the part of E outside the guides' span away from E, b in E
    + p sum_j ||Q W k_j - W k_j||^2                   preserved names k_j
    + q mean ||Q W k - W k||^2 + mu ||Q W - W||^2     rows k of captions, and all rows equally

which is a constant less 2 tr(Q^T M) with

    M = -s P_E (I - P_G) + W (p sum_j k_j k_j^T + q C + mu I) W^T,    C = mean k k^T,

so Q = U V^T, where M = U S V^T (Procrustes). M and W have the same range. Q is computed in this range; no value is
outside of it. From the official code (HansSunY/OCE, oce.py, commit 2609f3e). Float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera.contracts import Backbone, Edit, Neighbours, Pair, UserError
from realera.methods.priors import Preserve, kept_texts, prior
from realera.methods.texts import last_rows
from realera.setting_types import AnyText, NonNegative, Positive, Projections, Sums, Template

RANK = 1e-6  # singular values below this share of the largest count as zero, because text states are float32


class OrthogonalErasure:
    """OCE's closed form, layer by layer.

    projections: the weights to rotate, "values" (official), "keys" or "both". guide: the text whose value is not turned
    away; None = each concept's anchor. expand: more templates for each name and its guide, {} = the name (official:
    five, none for people). preserve: names to preserve, or "artists" (`priors.Preserve`), with weight preserve_scale,
    p. captions: "everyday" or a file made by python -m realera.cache, with weight caption_scale, q. erase_scale: s, in
    relation to squared lengths of values. ridge: mu. A text is represented by the row of its last sub-token.

    Raises UserError for preserved names with a weight of 0.
    """

    def __init__(
        self,
        projections: Projections = "values",
        guide: AnyText | None = None,
        expand: Sequence[Template] = (),
        preserve: Preserve = (),
        erase_scale: Positive = 2000.0,
        preserve_scale: NonNegative = 0.0,
        captions: Sums = "everyday",
        caption_scale: NonNegative = 10.0,
        ridge: Positive = 10.0,
    ) -> None:
        if preserve and preserve_scale == 0:
            raise UserError(
                "method.edit.preserve has no effect with method.edit.preserve_scale=0: set preserve_scale too "
                "(official: 1 for styles, 5 for people), or method.edit.preserve=[]."
            )
        self.projections = projections
        self.guide = guide
        self.expand = list(expand)
        self.preserve = preserve
        self.erase_scale = erase_scale
        self.preserve_scale = preserve_scale
        self.captions = captions
        self.caption_scale = caption_scale
        self.ridge = ridge

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """Weights (out, D) of every rotated layer. Only the pairs' names are used; neighbours are not used.

        info: captions_cosine, the cosine between the values of captions before and after, weighted by their squared
        lengths; the mean over the layers.
        """
        concepts = self._rows(backbone, [pair.concept.target for pair in pairs])
        guides = self._rows(backbone, [pair.concept.anchor if self.guide is None else self.guide for pair in pairs])
        captions, count = prior(backbone, self.captions)
        captions = captions / (count * backbone.max_length)
        kept = self.caption_scale * captions + self.ridge * torch.eye(backbone.width, dtype=torch.float64)
        if names := kept_texts(self.preserve, pairs):
            rows = _double(torch.cat(last_rows(backbone.encode(names, to_end=True))))
            kept += self.preserve_scale * rows.T @ rows
        weights: dict[str, Tensor] = {}
        cosines = []
        for name, layer in backbone.text_projections(self.projections).items():
            weight = _double(layer.weight)
            weights[name] = rotated(weight, concepts, guides, kept, self.erase_scale)
            cosines.append(float(((weights[name] @ captions) * weight).sum() / ((weight @ captions) * weight).sum()))
        counted = {"concepts": len(pairs), "names_preserved": len(names)}
        return Edit(weights=weights, info={**counted, "captions_cosine": sum(cosines) / len(cosines)})

    def _rows(self, backbone: Backbone, names: Sequence[str]) -> Tensor:
        """(n, D): the rows of all names' texts, each text once."""
        texts = dict.fromkeys(template.replace("{}", name) for name in names for template in ["{}", *self.expand])
        return _double(torch.cat(last_rows(backbone.encode(list(texts), to_end=True))))


def rotated(weight: Tensor, concepts: Tensor, guides: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Q W (out, D). weight: W (out, D); concepts, guides: rows (n, D); kept: p sum k k^T + q C + mu I (D, D), positive
    definite; scale: s."""
    basis = torch.linalg.qr(weight).Q  # of W's range; M and Q act only there
    inside = basis.T @ weight
    erased, guided = (span(inside @ rows.T) for rows in (concepts, guides))
    turned = erased @ (erased.T - (erased.T @ guided) @ guided.T)
    turn = rotation(inside @ kept @ inside.T - scale * turned, proper=len(weight) <= weight.shape[1])
    result: Tensor = basis @ (turn @ inside)
    return result


def span(values: Tensor) -> Tensor:
    """(r, m): an orthonormal basis of the columns (r, n), each scaled to length 1; m is their rank."""
    left, sizes, _ = torch.linalg.svd(values / values.norm(dim=0), full_matrices=False)
    result: Tensor = left[:, sizes > RANK * sizes[0]]
    return result


def rotation(moment: Tensor, proper: bool) -> Tensor:
    """The orthogonal Q (r, r) with the largest tr(Q^T M) for M = moment (r, r). proper: only Q with determinant 1; the
    direction of the least singular value is flipped if needed. If not proper, directions outside the r can fix the
    determinant."""
    left, _, right = torch.linalg.svd(moment)
    if proper and float(torch.linalg.det(left) * torch.linalg.det(right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    result: Tensor = left @ right
    return result


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
