"""AdamW over adapters that stand side by side in one tensor and are trained one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW


class AdamWInTurns(AdamW):
    """One AdamW for each concept's part of every tensor: what a concept learns does not depend on who learns beside it.

    AdamW over the whole tensors would not stand still in the others' steps: its moments would go on moving their parts,
    and would shrink in between, so that a hundred concepts moved ten times as far as one.

    whole: low-rank factors in pairs A, B of one layer after another, as `Backbone.add_adapter` returns them:
    A (concepts x rank, in, ...), B (out, concepts x rank, ...). The settings are AdamW's.
    """

    def __init__(self, whole: Iterable[nn.Parameter], concepts: int, **settings: Any) -> None:
        self.whole = list(whole)
        self.concepts = concepts
        assert all(a.shape[0] == b.shape[1] for a, b in zip(self.whole[::2], self.whole[1::2], strict=True))
        # Views: stepping on a part moves the whole.
        parts = [[nn.Parameter(part) for part in self._cut(i, p.detach())] for i, p in enumerate(self.whole)]
        super().__init__([part for some in parts for part in some], **settings)
        self.parts = parts

    def _cut(self, i: int, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.concepts, dim=i % 2)

    @torch.no_grad()
    def hand_over(self, concept: int) -> None:
        """Gives one concept's parts their gradients, and the whole tensors none: after every backward."""
        for i, (whole, parts) in enumerate(zip(self.whole, self.parts)):
            if whole.grad is not None:
                parts[concept].grad = self._cut(i, whole.grad)[concept]
                whole.grad = None
