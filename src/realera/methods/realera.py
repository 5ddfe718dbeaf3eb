"""RealEra (arXiv 2410.09140): mine neighbours of a concept, edit W_K and W_V in closed form, align the noise with a
LoRA.

The paper has no public code. Where it is silent or contradicts itself, the setting's description states our choice.
Equation numbers are the paper's. Letters: p_c, p_a text states of the prompt with the concept and with the anchor, p' a
mined neighbour, p'' a point beyond the concept. Shapes: P prompts, T token rows, D text width, B latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.closed_form import NormalEquations
from realera.contracts import (
    PROJECTIONS,
    Backbone,
    Edit,
    LoraSpec,
    Miner,
    Moments,
    Neighbours,
    Pair,
    TextStates,
    TrainingBatch,
)
from realera.methods.priors import prior
from realera.methods.texts import join, one_of, predict, repeat
from realera.mining.band import Band, Rows
from realera.mining.sampling import align_rows, expected_moments, fit_band, mine_beyond, mine_near
from realera.setting_types import (
    AnyText,
    Count,
    CountOrInf,
    LearningRate,
    NonNegative,
    Positive,
    Projections,
    Sums,
    TrainingSteps,
    WholeOrInf,
)
from realera.value_space import metric, roots

Space = Literal["text", "value"]
GammaRole = Literal["loss_terms", "loss_terms_swapped", "step_mix", "none"]
Teacher = Literal["original", "closed_form"]
NoiseAnchor = Literal["anchor", "perturbed"]


class Mining:
    """Neighbour-Concept Mining and Beyond-Concept samples around every training prompt (Algorithm 1, lines 1-23).

    m, n: near and beyond points per prompt; n = 0 mines no points beyond. inf replaces sampling by its exact
    expectation, with the weight of m_weight (n_weight) points. space: "text", as in the paper, or "value": the band's
    distances and cosines are those of the denoiser's values of the text states (`value_space.roots`), where phrases
    that evoke a concept are near its name. The other settings are those of `Band`.

    A call raises UserError if the text states cannot reach the band.
    """

    def __init__(
        self,
        m: CountOrInf = 5,
        n: WholeOrInf = 25,
        m_weight: Positive = 5.0,
        n_weight: Positive = 25.0,
        space: Space = "text",
        **band: Any,
    ) -> None:
        self.m = m
        self.n = n
        self.m_weight = m_weight
        self.n_weight = n_weight
        self.space = space
        self.roots: tuple[Tensor, Tensor] | None = None
        self.band = Band(**band)

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair] = ()) -> None:
        """To be called before any edit, because value space uses the weights as loaded. The pairs are not used."""
        if self.space == "value":
            self.roots = value_roots(backbone)

    def __call__(
        self,
        pair: Pair,
        generator: Generator,
        m: float | None = None,
        n: float | None = None,
        prompts: Sequence[int] | None = None,
    ) -> Neighbours:
        """As `contracts.Miner`. If the setting n is 0, no points beyond are mined, whatever the argument `n` is."""
        m = self.m if m is None else m
        n = self.n if n is None or self.n == 0 else n
        e, e_star, mask = align_rows(pair, self.band.rows)
        if self.space == "value":
            if self.roots is None:
                raise RuntimeError("mining in value space needs prepare(backbone) first")
            e, e_star = (_transformed(states, self.roots[0]) for states in (e, e_star))
        found: Neighbours | None = None
        for part in pair.target.encoders():  # their rows have different norms, so each has a band of its own
            own = mask.clone()
            own[:, : part.start] = own[:, part.stop :] = False
            if not bool(own.any()):
                continue
            band = fit_band(self.band, e, own)  # on all prompts: a step's single prompt is mined in the same band
            some = slice(None) if prompts is None else list(prompts)
            mined = self._mined(e[some], e_star[some], own[some], band, m, n, generator)
            found = mined if found is None else _together(found, mined)
        assert found is not None
        return found if self.roots is None else _to_text_space(found, self.roots[1])

    def _mined(
        self, e: Tensor, e_star: Tensor, mask: Tensor, band: Band, m: float, n: float, generator: Generator
    ) -> Neighbours:
        near, near_targets, near_rows = e[:0], e_star[:0], mask[:0]
        beyond, beyond_rows = e[:0], mask[:0]
        if not math.isinf(m):
            near, near_targets, near_rows = mine_near(e, e_star, mask, band, int(m), generator)
        if n > 0 and not math.isinf(n):
            beyond, beyond_rows = mine_beyond(e, mask, band, int(n), generator)
        moments: Moments | None = None
        if math.isinf(m) or math.isinf(n):
            weights = (self.m_weight if math.isinf(m) else None, self.n_weight if math.isinf(n) else None)
            moments = expected_moments(e, e_star, mask, band, *weights)
        return Neighbours(near, near_targets, near_rows, beyond, beyond_rows, moments)


def _together(one: Neighbours, two: Neighbours) -> Neighbours:
    """The points of two text encoders, mined around the same prompts: rows of the second that count replace the
    first's."""

    def merged(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows[..., None], second, first)

    moments = one.moments
    if moments is not None and two.moments is not None:
        sums = zip(vars(moments).items(), vars(two.moments).values())
        moments = Moments(**{name: None if a is None else a + b for (name, a), b in sums})
    return Neighbours(
        merged(one.near, two.near, two.near_rows),
        merged(one.near_targets, two.near_targets, two.near_rows),
        one.near_rows | two.near_rows,
        merged(one.beyond, two.beyond, two.beyond_rows),
        one.beyond_rows | two.beyond_rows,
        moments,
    )


def value_roots(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """`value_space.roots` of the values of a backbone's text states."""
    return roots(metric(backbone.text_readers("values")))


def _transformed(states: Tensor, matrix: Tensor) -> Tensor:
    """Rows (..., D) multiplied by a symmetric matrix (D, D)."""
    return (states.double() @ matrix.to(states.device)).to(states.dtype)


def _to_text_space(found: Neighbours, root: Tensor) -> Neighbours:
    """Neighbours mined in value space, as text states. root: R^-1 of `value_roots`."""
    moments = found.moments
    if moments is not None:
        sums = {name: None if m is None else root @ m @ root for name, m in vars(moments).items()}
        moments = Moments(**sums)
    points = {name: _transformed(getattr(found, name), root) for name in ("near", "near_targets", "beyond")}
    return replace(found, **points, moments=moments)


class ClosedForm:
    """Equation 7: W e = W0 e* for every row e of the concept's prompts and every mined neighbour, and W p = W0 p for
    every point p beyond the concept, in one map for all concepts and layers.

    lambda_preserve: weight of a row beyond (the paper: 0.1, against 1 for an erased row). relative_ridge: weight of
    ||W - W0||^2 (the paper has none), as a multiple of the mean eigenvalue of the summed k k^T, so it means the same
    for every text encoder and number of rows. ridge: that weight in squared units of the text states, as in UCE and
    MACE; None = use relative_ridge. rows: the rows of the training prompts to erase (choices as in `Band.rows`; the
    paper: "the concept's token and its subsequent tokens"). space: "text", as in the paper, or "value", with distances
    of the values (see `Mining`). projections: the weights to edit; None = "both" in text space, "values" in value
    space. preserve_prompts: texts whose rows except BOS are preserved, each with lambda_preserve (the paper adds a set
    of preserved concepts, but does not name them). prior_cache, prior_weight: preserved captions, as a file made by
    python -m realera.cache or "everyday" (see `priors.prior`), and the weight of each of their rows.
    """

    def __init__(
        self,
        lambda_preserve: NonNegative = 0.1,
        relative_ridge: NonNegative = 0.1,
        ridge: NonNegative | None = None,
        rows: Rows = "suffix",
        preserve_prompts: Sequence[AnyText] = (),
        prior_cache: Sums | None = None,
        prior_weight: NonNegative = 1e-4,
        space: Space = "text",
        projections: Projections | None = None,
    ) -> None:
        self.space = space
        self.projections = projections or ("values" if space == "value" else "both")
        self.lambda_preserve = lambda_preserve
        self.relative_ridge = relative_ridge
        self.ridge = ridge
        self.rows = rows
        self.preserve_prompts = list(preserve_prompts)
        self.prior_cache = prior_cache
        self.prior_weight = prior_weight

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        sums = NormalEquations(backbone.width)
        erased = near = beyond = 0
        for i, pair in enumerate(pairs):  # neighbours[i] in the same pass: both are made on access
            e, e_star, mask = align_rows(pair, self.rows)
            sums.add_pairs(e[mask], e_star[mask])
            erased += int(mask.sum())
            if not neighbours:
                continue
            mined = neighbours[i]
            sums.add_pairs(mined.near[mined.near_rows], mined.near_targets[mined.near_rows])
            sums.add_preserved(mined.beyond[mined.beyond_rows], self.lambda_preserve)
            near += int(mined.near_rows.sum())
            beyond += int(mined.beyond_rows.sum())
            if (q := mined.moments) is not None:
                if q.near is not None and q.near_cross is not None:
                    sums.add_moments(q.near_cross, q.near)
                if q.beyond is not None:
                    sums.add_moments(q.beyond, q.beyond, self.lambda_preserve)
        if self.preserve_prompts:
            texts = backbone.encode(self.preserve_prompts)
            sums.add_preserved(texts.states[:, texts.varying()].flatten(0, 1), self.lambda_preserve)
        if self.prior_cache is not None:
            captions, _ = prior(backbone, self.prior_cache)
            sums.add_moments(captions, captions, self.prior_weight)
        root, inverse = value_roots(backbone) if self.space == "value" else (None, None)
        if root is not None:
            sums = NormalEquations(backbone.width).add_moments(root @ sums.cross @ root, root @ sums.gram @ root)
        ridge = self.relative_ridge * sums.mean_eigenvalue if self.ridge is None else self.ridge
        solution, info = sums.solve(ridge)
        info |= {"ridge": ridge, "rows_erased": erased, "rows_near": near, "rows_beyond": beyond}
        if root is not None and inverse is not None:
            solution = inverse @ solution @ root
        return Edit(map=solution, info=info, projections=PROJECTIONS[self.projections])


class NoiseAlignment:
    """Equations 8 and 9: trains a LoRA over the edited denoiser, with the original denoiser as teacher (Algorithm 1,
    lines 26-32).

        odd steps    || eps(z_t, t, p_c) - eps0(z_t, t, p_a) ||^2
        even steps   || eps(z_t, t, p')  - eps0(z_t, t, p_a) ||^2  and  || eps(z_t, t, p'') - eps0(z_t, t, p'') ||^2

    with means in place of norms. A step uses one random training prompt and mines its points anew. Without a miner
    every step is odd. Without points beyond the concept, equation 9 has one term.

    steps: optimiser steps; the first is odd (the paper: 200 "epochs"). lr, weight_decay: of AdamW (the paper: lr 1e-5,
    optimiser not named). lora: required if steps > 0 (the paper gives no rank). gamma1, gamma2, gamma_role: the paper
    gives 0.3 and 0.7 but not their use. They weight the two terms of equation 9 ("loss_terms"), the same terms swapped
    ("loss_terms_swapped"), equations 8 and 9 as wholes ("step_mix"), or nothing ("none"). teacher: eps0 is the model as
    loaded ("original"), or the model with the closed form but without the LoRA ("closed_form"). noise_anchor: the text
    of equation 9's first target is p_a, as printed ("anchor"), or the neighbour's own target of Algorithm 1's line 28
    ("perturbed"). m_step, n_step: points mined per step; latent i of the batch uses point i mod m_step.
    """

    parameters = ()  # only the LoRA is trained
    trains_lora = True

    def __init__(
        self,
        steps: TrainingSteps = 200,
        lr: LearningRate = 1e-5,
        weight_decay: NonNegative = 0.01,
        lora: LoraSpec | None = None,
        gamma1: NonNegative = 0.3,
        gamma2: NonNegative = 0.7,
        gamma_role: GammaRole = "loss_terms",
        m_step: Count = 1,
        n_step: Count = 1,
        teacher: Teacher = "original",
        noise_anchor: NoiseAnchor = "anchor",
    ) -> None:
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.lora = lora if lora is None else replace(lora, targets=tuple(lora.targets))  # yaml gives a list
        self.m_step = m_step
        self.n_step = n_step
        weights = {
            "loss_terms": (1.0, gamma1, gamma2),
            "loss_terms_swapped": (1.0, gamma2, gamma1),
            "step_mix": (gamma1, gamma2, gamma2),
            "none": (1.0, 1.0, 1.0),
        }
        self.weights = dict(zip(("align", "near", "beyond"), weights[gamma_role]))
        self.from_closed_form = teacher == "closed_form"
        self.perturbed_anchor = noise_anchor == "perturbed"

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"align"} on odd steps, {"near", "beyond"} on even ones, and the unweighted value of each weighted term,
        without gradient."""
        latents, timesteps, step = batch.latents, batch.timesteps, batch.step
        count = len(latents)
        prompt = one_of(pair.target, generator)
        p_c, p_a = (repeat(texts, prompt, count) for texts in (pair.target, pair.anchor))

        if step % 2 == 1 or mine is None:  # equation 8
            target = self._teacher_noise(backbone, latents, timesteps, p_a)
            return self._weighted({"align": mse_loss(predict(backbone, latents, timesteps, p_c), target)})

        with torch.autocast("cpu", enabled=False):  # mine in full precision, also under autocast
            mined = mine(pair, generator, m=self.m_step, n=self.n_step, prompts=[prompt])
        near = replace(p_c, states=_cycle(mined.near, count))
        if self.perturbed_anchor:
            p_a = replace(p_a, states=_cycle(mined.near_targets, count))
        if len(mined.beyond) == 0:
            target = self._teacher_noise(backbone, latents, timesteps, p_a)
            terms = {"near": mse_loss(predict(backbone, latents, timesteps, near), target)}
        else:  # equation 9: both terms in one pass of each network
            beyond = replace(p_c, states=_cycle(mined.beyond, count))
            z_t, t = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
            targets = self._teacher_noise(backbone, z_t, t, join(p_a, beyond, latents.device)).chunk(2)
            outputs = predict(backbone, z_t, t, join(near, beyond, latents.device)).chunk(2)
            terms = {name: mse_loss(out, to) for name, out, to in zip(("near", "beyond"), outputs, targets)}
        return self._weighted(terms)

    def _teacher_noise(self, backbone: Backbone, latents: Tensor, timesteps: Tensor, texts: TextStates) -> Tensor:
        with torch.no_grad(), backbone.original(edited=self.from_closed_form):
            return predict(backbone, latents, timesteps, texts)

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {f"{name}_unweighted": term.detach() for name, term in terms.items() if self.weights[name] != 1}
        return {**{name: self.weights[name] * term for name, term in terms.items()}, **plain}


def _cycle(points: Tensor, count: int) -> Tensor:
    """(S, T, D) -> (B, T, D): point i mod S."""
    return points[torch.arange(count, device=points.device) % len(points)]
