"""SLD (Safe Latent Diffusion, arXiv 2211.05105): while images are drawn, each element is guided away from an unsafe
text. Nothing is trained.

With u, p, s the noise predictions for the empty prompt, the prompt and the safety text, at every step

    w   = min(1, s_S |p - s|)  where p - s < lambda, else 0                    (equations 5 and 6)
    g_S = w (s - u) + s_m nu,       nu <- beta nu + (1 - beta) g_S             (equations 7 and 8)
    noise = u + s_g (p - u - g_S)                                              (equation 3)

with g_S = 0 in equation 3 for steps below delta; nu grows from the first step on. lambda is compared with the signed
difference, as in the paper and the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from realera.contracts import Backbone, UserError
from realera.setting_types import AnyText, Finite, Name, NonNegative, Number, SamplerSteps

# The paper's twenty kinds of inappropriate content, as one text.
INAPPROPRIATE = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, obscene "
    "gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)
Strength = Literal["weak", "medium", "strong", "max"]
Warmup = Annotated[int, Number(0, 1000, whole=True)]
Beta = Annotated[float, Number(0, 1, below=True)]
PRESET_STEPS = 50  # sampler steps that the paper's warm-ups are counted in
# Section 3: warm-up delta, s_S, lambda, s_m, beta_m. Weak's s_S is 200 in the paper; diffusers' SafetyConfig says 20.
PRESETS = {
    "weak": (15, 200.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass
class SafetyGuidance:
    """`contracts.Guide`. A setting that is None takes its value from the preset.

    concepts: names of the erased concepts. safety_text: the text to guide away from: None = the concepts' names,
    "paper" = the paper's twenty kinds of inappropriate content, or any text. strength: the preset: weak, medium, strong
    or max. steps: of the sampler; a preset's warm-up, counted in 50 steps, is scaled to them. warmup: steps without
    safety guidance. scale: s_S. threshold: lambda, in units of the noise. momentum_scale, momentum_beta: s_m and
    beta_m.

    Raises UserError if there is no text to guide away from.
    """

    concepts: Name | Sequence[Name] | None = ()
    safety_text: AnyText | None = None
    strength: Strength = "medium"
    steps: SamplerSteps = PRESET_STEPS
    warmup: Warmup | None = None
    scale: NonNegative | None = None
    threshold: Finite | None = None
    momentum_scale: NonNegative | None = None
    momentum_beta: Beta | None = None
    prompts: Sequence[str] = field(default=(), init=False)
    momentum: Tensor | None = field(default=None, init=False, repr=False)  # nu (B, C, h, w): of the batch being drawn

    def __post_init__(self) -> None:
        given = [self.concepts] if isinstance(self.concepts, str | int) else list(self.concepts or ())
        self.concepts = tuple(map(str, given))
        if self.safety_text is None:
            self.safety_text = ", ".join(map(str, given))
        elif self.safety_text == "paper":
            self.safety_text = INAPPROPRIATE
        if not self.safety_text.strip():
            raise UserError(
                "method.guide has no text to guide away from: name a concept, or set method.guide.safety_text=paper."
            )
        self.prompts = (self.safety_text,)
        names = ("warmup", "scale", "threshold", "momentum_scale", "momentum_beta")
        for name, value in zip(names, PRESETS[self.strength]):
            if getattr(self, name) is None:
                setattr(self, name, round(value * self.steps / PRESET_STEPS) if name == "warmup" else value)

    def around(self, backbone: Backbone, texts: Sequence[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(
        self, uncond: Tensor, cond: Tensor, beside: Tensor, latents: Tensor, step: int, guidance_scale: float
    ) -> Tensor:
        """As `contracts.Guide`. Step 0 begins a batch and resets the momentum."""
        assert self.warmup is not None and self.scale is not None and self.threshold is not None
        assert self.momentum_scale is not None and self.momentum_beta is not None
        if step == 0 or self.momentum is None:
            self.momentum = torch.zeros_like(cond)
        safety = beside[0]
        difference = cond - safety
        weight = (self.scale * difference.abs()).clamp(max=1.0)
        weight = torch.where(difference < self.threshold, weight, 0.0)
        away = weight * (safety - uncond) + self.momentum_scale * self.momentum
        self.momentum = self.momentum_beta * self.momentum + (1 - self.momentum_beta) * away
        towards = cond - uncond
        return uncond + guidance_scale * (towards - away if step >= self.warmup else towards)
