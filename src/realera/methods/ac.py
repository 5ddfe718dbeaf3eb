"""AC (Concept Ablation, arXiv 2303.13516): on noised images of the anchor, the denoiser learns to predict the same
noise for the concept's prompt as for the anchor's prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from realera.contracts import Backbone, LoraSpec, Miner, Pair, TrainingBatch, UserError
from realera.methods.texts import predict, take
from realera.setting_types import LearningRate, NonNegative, Targets, TrainingSteps

Variant = Literal["model", "noise"]


class Ablation:
    """|| eps(z_t, t, p_c) - y ||^2, as a mean, on noised images of the anchor's prompt p_a. p_c is the same prompt with
    the concept in place of the anchor.

    variant: "model" = y is eps(z_t, t, p_a) of the model in training, without gradient (the paper's equation 5, as in
    its code); "noise" = y is the noise in z_t (equation 4). prior: weight of || eps(z_t, t, p_a) - the noise in
    z_t ||^2, for concepts that are a kind of their anchor (the official code uses other images of that kind).
    parameters: the denoiser weights to train, as `Backbone.unfreeze` takes them. detach_bos: the keys and values of
    BOS, which all prompts share, give the weights no gradient (official). steps, lr, weight_decay: of AdamW.
    """

    lora: LoraSpec | None = None

    def __init__(
        self,
        parameters: Targets,
        steps: TrainingSteps = 100,
        lr: LearningRate = 1.6e-5,
        weight_decay: NonNegative = 0.01,
        variant: Variant = "model",
        prior: NonNegative = 0.0,
        detach_bos: bool = True,
    ) -> None:
        self.parameters = list(parameters)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.noise_based = variant == "noise"
        self.prior = float(prior)
        self.detach_bos = detach_bos

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"ablate"}, and {"prior"} if `prior` > 0. known: "noise" (B, C, h, w) in z_t, and "prompts" (B,), the indices
        of its prompts."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        if lacking := [name for name in ("noise", "prompts") if name not in known]:
            raise UserError(
                f"method ac needs the {lacking[0]} of its latents: set method.latents.give='[noise,prompts]'."
            )
        noise = known["noise"].float()
        p_c, p_a = (take(texts, known["prompts"]) for texts in (pair.target, pair.anchor))
        terms: dict[str, Tensor] = {}
        with _detached_bos(backbone) if self.detach_bos else nullcontext():
            target = noise
            # One pass per text, all of the same shape: the same text then gives bit-identical noise.
            if self.prior > 0 or not self.noise_based:
                with nullcontext() if self.prior > 0 else torch.no_grad():
                    anchored = predict(backbone, latents, timesteps, p_a)
                if self.prior > 0:
                    terms["prior"] = self.prior * mse_loss(anchored, noise)
                if not self.noise_based:
                    target = anchored.detach()
            return {"ablate": mse_loss(predict(backbone, latents, timesteps, p_c), target), **terms}


@contextmanager
def _detached_bos(backbone: Backbone) -> Iterator[None]:
    """Inside the context, row 0 of the keys and values has no gradient. Raises UserError if a backbone's text rows do
    not become keys and values directly, so that this would detach nothing."""
    if getattr(backbone, "joint_attention", False):
        raise UserError(
            f"method.align.detach_bos has no meaning with backbone {backbone.name}, where the first row of the text is "
            "mixed with the others: set it to false."
        )
    # Checkpointing recomputes the layers after the hooks are removed.
    if getattr(backbone.denoiser, "is_gradient_checkpointing", False):
        raise UserError(
            "method.align.detach_bos does not work with backbone.gradient_checkpointing: set one of them to false."
        )

    def detach(layer: nn.Module, inputs: object, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1)

    hooks = [layer.register_forward_hook(detach) for layer in backbone.text_projections().values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
