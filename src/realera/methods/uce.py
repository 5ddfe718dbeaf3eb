"""UCE (Unified Concept Editing, arXiv 2308.14761): edits W_K and W_V in closed form on the bare names of the concepts.

The official code has changed. Today's code maps one row per concept. The code of 2023, which made the tables of MACE
and RealEra, maps the row of the last sub-token and all rows after it. `rows` selects one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from realera.closed_form import NormalEquations
from realera.contracts import Backbone, Edit, Neighbours, Pair, TextStates
from realera.methods.priors import Preserve, gram_of, kept_texts, prior
from realera.methods.texts import last_rows
from realera.setting_types import AnyText, NonNegative, Positive, Sums, Template

Rows = Literal["last", "suffix_2023"]


class UnifiedConceptEdit:
    """One map that takes each concept to its guide and preserves other names.

    rows: "last" = the row of the name's last sub-token; "suffix_2023" = that row and all rows after it; concept and
    guide are shifted so that their last sub-tokens are paired, and cut to equal length. expand: more templates in which
    every name is mapped to its guide, {} = the name (official: "painting by {}" and four more, optional).
    guide: the text that the concept is mapped to; None = each concept's anchor. A blank guide has no sub-token and
    gives the BOS row, as in the official code. preserve: names to preserve, or "artists" (`priors.Preserve`); with
    "last" by the row of the last sub-token, with "suffix_2023" by all rows, always including those of ''. erase_scale:
    weight of an erased row (official: 1). preserve_scale: weight of a preserved row; None = the official 1 for "last"
    and max(0.1, 1 / number of preserved names) for "suffix_2023". ridge: weight of ||W - W0||^2 (official: 0.5).
    prior_cache, prior_weight: preserved captions, as a file made by python -m realera.cache or "everyday" (see
    `priors.prior`), and the weight of each of their rows.
    """

    def __init__(
        self,
        rows: Rows = "last",
        guide: AnyText | None = None,
        preserve: Preserve = (),
        erase_scale: Positive = 1.0,
        preserve_scale: NonNegative | None = None,
        ridge: NonNegative = 0.5,
        prior_cache: Sums | None = None,
        prior_weight: NonNegative = 1e-4,
        expand: Sequence[Template] = (),
    ) -> None:
        self.rows = rows
        self.guide = guide
        self.preserve = preserve
        self.expand = list(expand)
        self.erase_scale = erase_scale
        self.preserve_scale = preserve_scale
        self.ridge = ridge
        self.prior_cache = prior_cache
        self.prior_weight = prior_weight

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """Neighbours and the pairs' prompts are not used: UCE encodes the bare names."""
        sums = NormalEquations(backbone.width)
        names = [pair.concept.target for pair in pairs]
        guides = [pair.concept.anchor if self.guide is None else self.guide for pair in pairs]
        templates = ["{}", *self.expand]
        erased = [(t.replace("{}", c), t.replace("{}", a)) for c, a in zip(names, guides) for t in templates]
        texts = list(dict.fromkeys(text for both in erased for text in both))  # many names may share a guide
        place = {text: row for row, text in enumerate(texts)}
        states = backbone.encode(texts, to_end=self.rows == "last")
        for keys, anchors in self._rows(states, [(place[target], place[guide]) for target, guide in erased]):
            sums.add_pairs(keys, anchors, self.erase_scale)
        kept = kept_texts(self.preserve, pairs)
        if self.rows == "suffix_2023":
            kept = ["", *kept]
            gram = gram_of(backbone, kept)
            sums.add_moments(gram, gram, self._preserve_scale(len(kept)))
        elif kept:
            rows = torch.cat(last_rows(backbone.encode(kept, to_end=True)))
            sums.add_preserved(rows, self._preserve_scale(len(kept)))
        if self.prior_cache is not None:
            captions, _ = prior(backbone, self.prior_cache)
            sums.add_moments(captions, captions, self.prior_weight)
        solution, info = sums.solve(self.ridge)
        counted = {"names_erased": len(pairs), "texts_erased": len(erased), "names_preserved": len(kept)}
        return Edit(map=solution, info={**info, **counted}, factors=sums.factors(self.ridge))

    def _rows(self, states: TextStates, erased: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and their anchors (n, D), from texts and their guides: all at once for "last", else text by text."""
        if self.rows == "last":
            targets, guides = zip(*erased)
            for rows in last_rows(states):
                yield rows[list(targets)], rows[list(guides)]
            return
        for part in states.encoders():
            if part.begins == part.stop - part.start:
                continue
            last = (part.end - 1).clamp(min=part.start).tolist()  # row of the last sub-token; BOS if there is none
            for target, guide in erased:
                c, a = last[target], last[guide]
                count = part.stop - max(c, a)
                yield states.states[target, c : c + count], states.states[guide, a : a + count]

    def _preserve_scale(self, names: int) -> float:
        if self.preserve_scale is not None:
            return self.preserve_scale
        return 1.0 if self.rows == "last" else max(0.1, 1 / names)
