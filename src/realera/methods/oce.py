"""OCE (Orthogonal Concept Erasure, arXiv 2605.28902): the values of all texts are rotated, W <- Q W with Q^T Q = I.

A rotation keeps W^T W, and with it the length of every text's value and the angle between any two. For each layer W
(out, D) by itself, P_E and P_G project onto the span of the concepts' values W c_i and of their guides' W a_i; the
columns of E are an orthonormal basis of the first. Q minimises

    2 s sum_b b^T Q (I - P_G) b                       what E has beyond the guides is turned away from E, b in E
    + p sum_j ||Q W k_j - W k_j||^2                   names that are kept
    + q mean ||Q W k - W k||^2 + mu ||Q W - W||^2     rows k of captions, and all rows alike

which is a constant less 2 tr(Q^T M) with

    M = -s P_E (I - P_G) + W (p sum_j k_j k_j^T + q C + mu I) W^T,    C = mean k k^T,

so that Q = U V^T where M = U S V^T (Procrustes). M and W have the same range: there Q is found, and outside of it Q
acts on nothing. From the official code (HansSunY/OCE, oce.py, commit 2609f3e). Float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realera.contracts import PROJECTIONS, Backbone, Edit, Neighbours, Pair, UserError
from realera.methods.priors import Preserve, kept_texts, prior
from realera.methods.texts import last_rows
from realera.setting_types import AnyText, NonNegative, Positive, Projections, Sums, Template

RANK = 1e-6  # of the largest singular value, below which values are not told apart: text states are float32


class OrthogonalErasure:
    """OCE's closed form, layer by layer.

    projections: which weights are rotated, "values" (official), "keys" or "both". guide: the text whose value is no
    part of what is turned away; None = each concept's anchor. expand: further texts of each name and its guide, {} = it
    (official: five, but for people). preserve: names to keep, or "artists" (`priors.Preserve`), with preserve_scale p.
    captions: "everyday" or a file of python -m realera.cache, with caption_scale q. erase_scale: s, against squared
    lengths of values. ridge: mu. A text counts by the row of its last sub-token.

    Raises UserError for names that are kept with a weight of 0.
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
                "method.edit.preserve counts for nothing with method.edit.preserve_scale=0: set the scale too (the "
                "official code: 1 for styles, 5 for people), or preserve=[]."
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
        """Weights (out, D) of every rotated layer. Of the pairs only the names are read; neighbours are not used.

        info: captions_cosine, between the values of captions before and after, weighed by their squared lengths; the
        mean over the layers.
        """
        concepts = self._rows(backbone, [pair.concept.target for pair in pairs])
        guides = self._rows(backbone, [pair.concept.anchor if self.guide is None else self.guide for pair in pairs])
        captions, count = prior(backbone, self.captions)
        captions = captions / (count * backbone.max_length)
        kept = self.caption_scale * captions + self.ridge * torch.eye(backbone.width, dtype=torch.float64)
        if names := kept_texts(self.preserve, pairs):
            rows = _double(last_rows(backbone.encode(names, to_end=True)))
            kept += self.preserve_scale * rows.T @ rows
        weights: dict[str, Tensor] = {}
        cosines = []
        for name, layer in backbone.text_projections().items():
            if not name.endswith(PROJECTIONS[self.projections]):
                continue
            weight = _double(layer.weight)
            weights[name] = rotated(weight, concepts, guides, kept, self.erase_scale)
            cosines.append(float(((weights[name] @ captions) * weight).sum() / ((weight @ captions) * weight).sum()))
        counted = {"concepts": len(pairs), "names_preserved": len(names)}
        return Edit(weights=weights, info={**counted, "captions_cosine": sum(cosines) / len(cosines)})

    def _rows(self, backbone: Backbone, names: Sequence[str]) -> Tensor:
        """(n, D): of every name's texts, each text once."""
        texts = dict.fromkeys(template.replace("{}", name) for name in names for template in ["{}", *self.expand])
        return _double(last_rows(backbone.encode(list(texts), to_end=True)))


def rotated(weight: Tensor, concepts: Tensor, guides: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Q W (out, D). weight: W (out, D); concepts, guides: rows (n, D); kept: p sum k k^T + q C + mu I (D, D), positive
    definite; scale: s."""
    basis = torch.linalg.qr(weight).Q  # of W's range, which M and Q do not leave
    inside = basis.T @ weight
    erased, guided = (span(inside @ rows.T) for rows in (concepts, guides))
    turned = erased @ (erased.T - (erased.T @ guided) @ guided.T)
    turn = rotation(inside @ kept @ inside.T - scale * turned, proper=len(weight) <= weight.shape[1])
    return basis @ (turn @ inside)


def span(values: Tensor) -> Tensor:
    """(r, m): an orthonormal basis of the columns (r, n), each scaled to length 1; m is their rank."""
    left, sizes, _ = torch.linalg.svd(values / values.norm(dim=0), full_matrices=False)
    return left[:, sizes > RANK * sizes[0]]


def rotation(moment: Tensor, proper: bool) -> Tensor:
    """The orthogonal Q (r, r) with the largest tr(Q^T M) for M = moment (r, r). proper: among those with determinant 1,
    for which the direction of the least singular value is turned round where need be. Without, the determinant is left
    to directions outside of the r."""
    left, _, right = torch.linalg.svd(moment)
    if proper and float(torch.linalg.det(left) * torch.linalg.det(right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    return left @ right


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
