"""How many steps a method trains, which concept each step is for, and how processes divide its batch."""

from __future__ import annotations

import math

from realera.contracts import Adapter, Aligner, Clipped, UserError
from realera.method_roles import TrainsErasers

CLIP = 1.0  # MACE's gradient norm; also used for RealEra and the others whose papers give none


def trains(align: Aligner | None) -> bool:
    """Whether the aligner has steps to train."""
    return align is not None and align.steps > 0


def adapter_of(align: Aligner | None) -> Adapter | None:
    """What the aligner trains beside the weights; None: weights."""
    part: object = align
    if isinstance(part, TrainsErasers):
        return part.eraser
    return None if align is None else align.lora


def has_adapter_per_concept(align: Aligner | None) -> bool:
    """Whether each concept has its own adapter."""
    return align is not None and align.lora is not None and align.lora.per_concept


def steps_of(align: Aligner | None, concepts: int) -> int:
    """Number of optimiser steps: `align.steps`, times the number of concepts if each has its own adapter."""
    return 0 if align is None else align.steps * (concepts if has_adapter_per_concept(align) else 1)


def clip_of(align: Aligner | None) -> float | None:
    """The norm that gradients are clipped to: the aligner's `clip` (None = no clipping) if it has one, else `CLIP`.

    Raises UserError for an invalid norm.
    """
    part: object = align
    clip = part.clip if isinstance(part, Clipped) else CLIP
    if clip is not None and not 0 < clip < math.inf:
        raise UserError(f"method.align.clip={clip} is not possible: give a number above 0, or null for no clipping.")
    return clip


def concept_of_step(step: int, concepts: int) -> int:
    """The index of the concept that is trained in a step; steps count from 1. Each concept gets two steps in a row,
    because some aligners do different things in odd and even steps."""
    return ((step - 1) // 2) % concepts


def steps_per_concept(steps: int, concepts: int) -> list[int]:
    """For each concept, the number of its steps among the first `steps`."""
    rounds, rest = divmod(steps, 2 * concepts)
    return [2 * rounds + min(2, max(0, rest - 2 * concept)) for concept in range(concepts)]


def step_of_concept(step: int, concepts: int) -> int:
    """A step's number among the steps of its own concept; both count from 1."""
    return (step - 1) // (2 * concepts) * 2 + (step - 1) % 2 + 1


def part_of(batch: int, rank: int, world: int) -> slice:
    """The part of a batch that process `rank` of `world` computes: one of gcd(batch, world) equal parts.

    So every process computes a batch of 1, and each of four processes computes 2 of a batch of 8. Each part is computed
    equally often, so the mean over all processes is the mean over the batch.
    """
    parts = math.gcd(batch, world)
    size = batch // parts
    return slice(rank % parts * size, (rank % parts + 1) * size)
