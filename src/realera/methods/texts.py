"""Helpers for encoded prompts."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, TextStates, UserError


def take(texts: TextStates, index: Tensor) -> TextStates:
    """The prompts at `index` (B,), repeats allowed."""
    index = index.to(texts.states.device)
    return TextStates(
        states=texts.states[index],
        first=texts.first[index],
        last=texts.last[index],
        length=texts.length[index],
        pooled=None if texts.pooled is None else texts.pooled[index],
        parts=None if texts.parts is None else texts.parts[index],
    )


def repeat(texts: TextStates, row: int, count: int) -> TextStates:
    """One prompt, `count` times."""
    return take(texts, torch.full((count,), row))


def one_of(texts: TextStates, generator: Generator) -> int:
    """The index of a random prompt."""
    return int(torch.randint(len(texts.states), (1,), generator=generator))


def on_cpu(texts: TextStates) -> TextStates:
    """All tensors on the CPU, so that rows of different prompts can be compared."""
    moved = {field.name: getattr(texts, field.name) for field in fields(texts)}
    return replace(texts, **{name: value.cpu() for name, value in moved.items() if value is not None})


def last_rows(texts: TextStates) -> list[Tensor]:
    """For each text encoder (B, D): the row of each text's last sub-token; the encoder's first row (BOS) if a text has
    none. An encoder that is left out has no rows."""
    number = torch.arange(len(texts.states), device=texts.states.device)
    read = [part for part in texts.encoders() if part.begins < part.stop - part.start]
    return [texts.states[number, (part.end - 1).clamp(min=part.start)] for part in read]


def join(first: TextStates, second: TextStates, device: torch.device) -> TextStates:
    """Both sets of prompts concatenated, for one pass."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a.to(device), b.to(device)])

    return TextStates(
        states=both(first.states, second.states),
        first=both(first.first, second.first),
        last=both(first.last, second.last),
        length=both(first.length, second.length),
        pooled=None if first.pooled is None or second.pooled is None else both(first.pooled, second.pooled),
        parts=None if first.parts is None or second.parts is None else both(first.parts, second.parts),
    )


def predict(backbone: Backbone, latents: Tensor, timesteps: Tensor, texts: TextStates) -> Tensor:
    """The noise prediction (B, C, h, w) for B prompts, in float32: under bfloat16 autocast, a mean over many small
    squares would be too inexact."""
    pooled = None if texts.pooled is None else texts.pooled.to(latents.device)
    return backbone.predict_noise(latents, timesteps, texts.states.to(latents.device), pooled).float()


def need_attention_maps(backbone: Backbone, method: str) -> None:
    """Raises UserError if the network drops the attention maps that the method's loss reads."""
    if getattr(backbone.denoiser, "is_gradient_checkpointing", False):
        raise UserError(
            f"method {method} reads the attention maps, which gradient checkpointing drops: set "
            "backbone.gradient_checkpointing=false."
        )
