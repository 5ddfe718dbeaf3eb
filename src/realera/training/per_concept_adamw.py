"""AdamW for the adapters of several concepts, which are joined in one tensor and trained one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW


class PerConceptAdamW(AdamW):
    """AdamW with its own state for each concept's part of every tensor. So a concept's training does not depend on the
    other concepts.

    AdamW on the whole tensors would also move the parts of concepts whose step it is not: its moments would continue to
    move them, and would shrink in between, so that a hundred concepts moved ten times as far as one.

    whole: low-rank factors in pairs A, B, layer by layer, as `Backbone.add_adapter` returns them:
    A (concepts x rank, in, ...), B (out, concepts x rank, ...). The settings are AdamW's.
    """

    def __init__(self, whole: Iterable[nn.Parameter], concepts: int, **settings: Any) -> None:
        self.whole = list(whole)
        self.concepts = concepts
        assert all(a.shape[0] == b.shape[1] for a, b in zip(self.whole[::2], self.whole[1::2], strict=True))
        # The parts are views, so a step on a part changes the whole tensor.
        parts = [[nn.Parameter(part) for part in self._split(i, p.detach())] for i, p in enumerate(self.whole)]
        super().__init__([part for some in parts for part in some], **settings)
        self.parts = parts

    def _split(self, i: int, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.concepts, dim=i % 2)

    @torch.no_grad()
    def hand_over(self, concept: int) -> None:
        """Moves the gradients from the whole tensors to one concept's parts. Call it after every backward pass."""
        for i, (whole, parts) in enumerate(zip(self.whole, self.parts)):
            if whole.grad is not None:
                parts[concept].grad = self._split(i, whole.grad)[concept]
                whole.grad = None
