"""The records that the parts of realera pass to each other: frozen dataclasses. `contracts` has them too, beside the
roles; import them from there. Shapes are those of `contracts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from realera.setting_types import Guidance, Pixels, Positive, Rank, SamplerSteps, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from realera.text_states import TextStates

Split = Literal["erase", "near", "keep", "associated", "unseen"]
"""The part of the evaluation that a prompt belongs to. erase: it names the erased concept. near: it uses a synonym.
keep: it names a concept to preserve. associated: it evokes the concept without naming it. unseen: it uses a word for
the concept that occurs in no training caption of the backbone."""

Scheduler = Literal["ddim", "dpm++", "euler"]
"""DDIM with eta 0 | DPM-Solver++ 2M | Euler steps of flow matching. The first two are for U-Nets, the last is for
diffusion transformers."""

# Suffixes of the U-Net's cross-attention layers that project the text states. On every backbone, a map names its
# projections by them; in a transformer all text rows pass one layer, and this layer takes every map.
KEYS, VALUES = "attn2.to_k", "attn2.to_v"


@dataclass(frozen=True)
class Concept:
    target: str  # the concept to erase
    anchor: str  # the harmless concept that replaces it


@dataclass(frozen=True)
class Prompt:
    """One image to generate and judge.

    id, seed: fixed by the task, and the same for every method. concept: the label that a judge looks for (for a synonym
    of the erased concept: the erased concept). caption: the text that a text-image score compares the image with;
    None = `text`. guidance_scale, size (height, width in pixels): None = those of the backbone's sampler.
    """

    id: str
    text: str
    concept: str
    split: Split
    seed: int
    caption: str | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Pair:
    """The training prompts of one concept, encoded by the original model: P that name the target, and the same P
    templates, in the same order, with the anchor's name."""

    concept: Concept
    target: TextStates
    anchor: TextStates


@dataclass(frozen=True)
class Moments:
    """The sums over mined points in exact expectation, for `m: .inf` / `n: .inf`; each (D, D) float64 or None.

    near = sum E[k k^T], near_cross = sum E[a k^T] (a: the target of the neighbour k), beyond = sum E[p p^T].
    """

    near: Tensor | None = None
    near_cross: Tensor | None = None
    beyond: Tensor | None = None


@dataclass(frozen=True)
class Neighbours:
    """The points mined around one concept: `near` is erased too, `beyond` is preserved.

    near, near_targets (S, T, D); near_rows (S, T) bool; beyond (S', T, D); beyond_rows (S', T) bool. `*_rows` marks the
    rows that count (for random points: the perturbed rows); the other rows equal the prompt's. A side that is taken in
    exact expectation has no points (S = 0); its sums are in `moments`.
    """

    near: Tensor
    near_targets: Tensor
    near_rows: Tensor
    beyond: Tensor
    beyond_rows: Tensor
    moments: Moments | None = None


@dataclass(frozen=True)
class Edit:
    """A closed-form edit of the layers that project text states (W_K and W_V of a U-Net): either `map` or `weights`.

    map (D, D) float64: W = W0 @ map in every layer. weights: {layer name: (out, D)}. info: numbers logged as `edit/*`
    (condition number, residuals, ...). factors: L (D, n) and R (n, D) float64 with map = I + L R, which are quicker to
    apply. projections: suffixes of the layers that take the map.
    """

    map: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[Tensor, Tensor] | None = None
    projections: Sequence[str] = (KEYS, VALUES)


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters h = W x + (alpha / rank) B A x on the denoiser's modules whose names end in one of `targets`
    ("attn2.to_k"). init: the distribution of A, "gaussian" N(0, 1/rank^2) or "kaiming" (PEFT's default); B starts at 0.
    per_concept: each erased concept has its own adapter; `Backbone.adapter_scale` weights them."""

    rank: Rank = 1
    alpha: Positive = 1.0
    targets: Targets = ("attn2.to_k", "attn2.to_v")
    init: Literal["gaussian", "kaiming"] = "gaussian"
    per_concept: bool = False


@dataclass(frozen=True)
class EraserSpec:
    """An eraser behind every cross-attention module: its output o becomes o + W2 gelu(W1 o + b1) + b2, where W1 has
    `rank` rows. W2 and b2 start at 0. It is not linear, so no file of plain weights can hold it."""

    rank: Rank = 128


Adapter = LoraSpec | EraserSpec


@dataclass(frozen=True)
class Sampler:
    """The settings that images are generated with."""

    scheduler: Scheduler = "ddim"
    steps: SamplerSteps = 50
    guidance_scale: Guidance = 7.5
    height: Pixels = 512  # pixels
    width: Pixels = 512


@dataclass(frozen=True)
class Course:
    """Another course of sampling than from a seed's noise through all steps. latents (1 or B, C, h, w): z_t before step
    `first`, in place of the noise. eta: DDIM's share of fresh noise (of the same seeds) in every step; above 1 it is
    more than the model was trained for. variance: factor on the fresh noise. change: (step, z_t) -> the z_t that the
    step takes; it is also called after the last step, with the number of steps."""

    latents: Tensor | None = None
    first: int = 0
    eta: float = 0.0
    variance: float = 1.0
    change: Callable[[int, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for one image.

    value: probability (0-1) of the prompt's concept; NaN = unscored, and the image is left out of the mean. label: the
    judge's first choice. detail: anything else that JSON can hold. Six keys mean the same for all judges: "score"
    (float, 100 cos of image and caption), "detected" (bool, the judge found what it detects), "boxes" ({class: count}),
    "whole" (bool, the image shows some class that the judge knows), "anchor" (bool, it shows the anchor of the prompt's
    concept), "moved" (float, added by `evaluation.moved` and not by a judge).
    """

    prompt_id: str
    value: float
    label: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingBatch:
    """The input of one training step: z_t (B, C, h, w), the backbone's timesteps (B,) and the step's number, from 1.
    known: further tensors (B, ...) that the latent source has for each z_t, by name ("mask", "noise")."""

    latents: Tensor
    timesteps: Tensor
    step: int
    known: Mapping[str, Tensor] = field(default_factory=dict)
