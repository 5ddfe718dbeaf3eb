"""Receler (arXiv 2311.17717): erasers behind the cross-attention learn to steer away from the concept, where the
attention sees it and against an adversarial prompt that is learned beside them.

Letters: B latents, T token rows, D text width, N adversarial rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, mse_loss

from realera.contracts import (
    PASSES_OF_A_GRADIENT,
    Backbone,
    EraserSpec,
    LoraSpec,
    Miner,
    NamedPrompt,
    Pair,
    Scheduler,
    TextStates,
    TrainingBatch,
    UserError,
)
from realera.methods.rollout import Rollout
from realera.methods.texts import need_attention_maps, predict, repeat
from realera.setting_types import (
    Batch,
    Count,
    Finite,
    Guidance,
    LearningRate,
    NonNegative,
    Number,
    Positive,
    SamplerSteps,
    Share,
    TrainingSteps,
    Whole,
)

Rows = Annotated[int, Number(1, 512, whole=True)]
Shrink = Annotated[int, Number(1, 64, whole=True)]
KEPT = ("prompt", "mean", "square", "steps")  # of an adversarial prompt: its rows, and the state of its Adam


class AttackedRollout(Rollout):
    """`Rollout` of the concept's bare name by the model in training, and the adversarial prompt of each concept: N rows
    of text states, which stand behind the name's rows. They start uniform in [0, 1) and carry over from step to step.

    In each step, `attacks` steps of Adam (lr, and weight_decay as a penalty) lead eps(z_t, t, name and rows) to
    eps0(z_t, t, name). The loss sees the rows before the last of them, as in the official code. rows: N. The others:
    see `Rollout`.

    Raises UserError if the rows do not fit behind a name.
    """

    def __init__(
        self,
        attacks: Whole = 50,
        rows: Rows = 16,
        attack_lr: LearningRate = 0.1,
        attack_decay: NonNegative = 0.1,
        scheduler: Scheduler = "ddim",
        steps: SamplerSteps = 50,
        guidance_scale: Guidance = 3.0,
        batch: Batch = 1,
        renew: Count = 1,
        chains: Batch = 8,
    ) -> None:
        super().__init__(
            scheduler, steps, guidance_scale, "trained", "concept", "bin", batch=batch, renew=renew, chains=chains
        )
        self.attacks, self.rows, self.attack_lr, self.attack_decay = attacks, rows, attack_lr, attack_decay
        self.attackers: dict[int, dict[str, Tensor]] = {}  # {concept: `KEPT`}
        self.width = 0

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes of a step: of the roll-out, and of the attack one of the teacher and a gradient for each of
        its steps."""
        attacks = int(settings.get("attacks") or 0)
        own = int(settings.get("batch") or 1) * (bool(attacks) + attacks * PASSES_OF_A_GRADIENT)
        return Rollout.passes(settings, steps) + own

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        super().prepare(backbone, pairs, cache, seed)
        self.attackers, self.width = {}, backbone.width
        names = [pair.concept.target for pair in pairs]
        self.texts = [backbone.encode([NamedPrompt.of("{}", name) if name else ""]) for name in names]
        for name, texts in zip(names, self.texts):
            if self.attacks and int(texts.last[0]) + self.rows >= texts.states.shape[1]:
                raise UserError(
                    f"{self.rows} adversarial rows do not fit behind {name!r} in {texts.states.shape[1]} token "
                    "rows: lower method.latents.rows."
                )

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(z_t, t, known). known: "rows" (B, N, D), the adversarial rows; {} without attacks."""
        attacked = self.attacks > 0 and int(self.texts[concept].last[0]) >= 0  # the empty name has no rows behind it
        if attacked and concept not in self.attackers:
            start = torch.rand(self.rows, self.width, generator=generator)
            zeros = torch.zeros(start.shape)
            self.attackers[concept] = dict(zip(KEPT, (start, zeros, zeros, torch.zeros(1))))
        z_t, timesteps, _ = self.with_prompts(backbone, concept, generator)
        if not attacked:
            return z_t, timesteps, {}
        rows = self._attack(backbone, concept, z_t, timesteps)
        return z_t, timesteps, {"rows": rows.expand(len(z_t), -1, -1)}

    def _attack(self, backbone: Backbone, concept: int, z_t: Tensor, timesteps: Tensor) -> Tensor:
        """Carries the adversarial prompt on, and returns its rows (N, D) before the last step."""
        attacker = self.attackers[concept]
        rows = attacker["prompt"].to(z_t.device).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([rows], lr=self.attack_lr, weight_decay=self.attack_decay)
        if attacker["steps"]:
            moments = {"exp_avg": attacker["mean"].clone(), "exp_avg_sq": attacker["square"].clone()}
            moments["step"] = attacker["steps"][0].clone()
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": {0: moments}, "param_groups": groups})
        name = repeat(self.texts[concept], 0, len(z_t))
        with torch.no_grad(), backbone.original():
            goal = predict(backbone, z_t, timesteps, name)
        before = rows.detach().clone()
        with torch.enable_grad():
            for _ in range(self.attacks):
                before = rows.detach().clone()
                made = predict(backbone, z_t, timesteps, with_rows(name, rows))
                (rows.grad,) = torch.autograd.grad(mse_loss(made, goal), [rows])
                optimizer.step()
        state = optimizer.state[rows]
        found = (rows.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"].reshape(1))
        self.attackers[concept] = {key: value.detach().cpu().float().clone() for key, value in zip(KEPT, found)}
        return before

    def state_dict(self) -> dict[str, Tensor]:
        own = {f"{key}.{concept}": value for concept, one in self.attackers.items() for key, value in one.items()}
        return {**super().state_dict(), **own}

    def state_form(self, calls: Sequence[int]) -> dict[str, tuple[int, ...]]:
        shapes = dict(zip(KEPT, [(self.rows, self.width)] * 3 + [(1,)]))
        used = [c for c, count in enumerate(calls) if count and self.attacks and int(self.texts[c].last[0]) >= 0]
        return {**super().state_form(calls), **{f"{key}.{c}": shapes[key] for c in used for key in KEPT}}

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if "." not in key}, calls)
        self.attackers = {}
        for key, value in state.items():
            kind, dot, concept = key.partition(".")
            if dot:
                self.attackers.setdefault(int(concept), {})[kind] = value


class ReliableErasing:
    """|| eps(z_t, t, c') - (eps0(z_t, t, '') - eta (eps0(z_t, t, c) - eps0(z_t, t, ''))) ||^2 + reg_weight L_reg, as
    means.

    c is the concept's bare name, c' its states with the adversarial rows behind the name; the weights are those of the
    erasers (`eraser`). L_reg is the mean over the erasers of sum over pixels outside the concept of (the mean over the
    channels of what the eraser adds, squared), divided by the number of these pixels. The concept's pixels are those
    where eps0's attention to the name's rows, averaged over the heads and over the maps that are `mask_shrink` times
    smaller than the latents, and scaled to 0 ... 1, is at least `mask_threshold`.

    negative_guidance: eta. steps, lr, weight_decay: of AdamW, which is Adam at weight_decay 0. clip: upper bound of the
    gradient's norm, None = unbounded.
    """

    lora: LoraSpec | None = None
    parameters = ()  # only the erasers are trained
    reads_attention = True

    def __init__(
        self,
        eraser: EraserSpec,
        steps: TrainingSteps = 500,
        lr: LearningRate = 3e-4,
        weight_decay: NonNegative = 0.0,
        negative_guidance: Finite = 1.0,
        reg_weight: NonNegative = 0.1,
        mask_threshold: Share = 0.1,
        mask_shrink: Shrink = 4,
        clip: Positive | None = None,
    ) -> None:
        self.eraser = eraser
        self.steps, self.lr, self.weight_decay, self.clip = steps, lr, weight_decay, clip
        self.negative_guidance, self.reg_weight = negative_guidance, reg_weight
        self.mask_threshold, self.mask_shrink = mask_threshold, mask_shrink
        self.texts: dict[str, TextStates] = {}

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes for each latent: two of the teacher and a gradient."""
        return 2.0 + PASSES_OF_A_GRADIENT

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Reads the names and the empty prompt."""
        names = [pair.concept.target for pair in pairs]
        self.texts = {name: backbone.encode([NamedPrompt.of("{}", name)]) for name in names if name}
        self.texts[""] = backbone.encode([""])

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"erase", "outside"}; known: "rows" (B, N, D), as `AttackedRollout` gives it."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        need_attention_maps(backbone, "receler")
        c, empty = (repeat(self.texts[text], 0, len(latents)) for text in (pair.concept.target, ""))
        with torch.no_grad(), backbone.original():
            uncond = predict(backbone, latents, timesteps, empty)
            with backbone.attention() as maps:
                cond = predict(backbone, latents, timesteps, c)
                attention = {name: found.float() for name, found in maps.items()}
        target = uncond - self.negative_guidance * (cond - uncond)
        read = with_rows(c, known["rows"].to(c.states)) if "rows" in known else c
        with backbone.eraser_outputs() as added:
            made = predict(backbone, latents, timesteps, read)
            changes = {name: found.float() for name, found in added.items()}
        terms = {"erase": mse_loss(made, target)}
        if self.reg_weight > 0 and pair.concept.target:
            mask = self.concept_pixels(attention, c, latents.shape[-2:])
            each = [outside(change, mask) for change in changes.values()]
            terms["outside"] = self.reg_weight * torch.stack(each).mean()
        return terms

    def concept_pixels(self, maps: Mapping[str, Tensor], texts: TextStates, size: Sequence[int]) -> Tensor:
        """(B, h', w') bool: the pixels that attend to the name. size: (h, w) of the latents. Raises UserError if no map
        is `mask_shrink` times smaller than the latents."""
        first, last = int(texts.first[0]), int(texts.last[0])
        sides = {name: side(found.shape[2], size) for name, found in maps.items()}
        wanted = tuple(one // self.mask_shrink for one in size)
        chosen = [
            found[..., first : last + 1].mean((1, 3)).unflatten(1, wanted)
            for name, found in maps.items()
            if sides[name] == wanted
        ]
        if not chosen:
            known = sorted({size[0] // height for height, _ in sides.values()})
            raise UserError(
                f"No attention map is {self.mask_shrink} times smaller than the latents: set "
                f"method.align.mask_shrink to one of {', '.join(map(str, known))}."
            )
        mean = torch.stack(chosen).mean(0)
        low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        return (mean - low) / (high - low).clamp(min=1e-12) >= self.mask_threshold


def side(pixels: int, size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of an attention map of `pixels`, for latents of `size`."""
    shrink = math.sqrt(size[0] * size[1] / pixels)
    return round(size[0] / shrink), round(size[1] / shrink)


def outside(change: Tensor, mask: Tensor) -> Tensor:
    """The mean over the samples of L_reg's term of one eraser. change (B, pixels, channels), mask (B, h', w') bool."""
    height, width = side(change.shape[1], mask.shape[1:])
    there = interpolate(mask[:, None].float(), (height, width))[:, 0].flatten(1)
    other = 1 - there
    return ((change.square().mean(2) * other).sum(1) / (other.sum(1) + 1e-9)).mean()


def with_rows(texts: TextStates, rows: Tensor) -> TextStates:
    """The texts (B) with `rows` (N, D) or (B, N, D) in place of the states behind their name, with gradients."""
    start, count = int(texts.last[0]) + 1, rows.shape[-2]
    rows = rows.expand(len(texts.states), -1, -1).to(texts.states)
    states = torch.cat([texts.states[:, :start], rows, texts.states[:, start + count :]], dim=1)
    return replace(texts, states=states)
