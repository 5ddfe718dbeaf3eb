"""Measures which texts draw a concept, by the denoiser's values for a text and by the noise that it predicts for it.

A text encoder puts words that draw different things close together, and puts phrases that evoke a concept far from its
name. So texts are first ranked by their values, which takes one pass of the text encoder per text (`closeness`). For
the first texts, the distance between their predicted noise and the name's is then measured (`noise_distances`):

    noise_distance(k) = sum_t ||eps(z_t, k) - eps(z_t, e)||^2 / sum_t ||eps(z_t, e) - eps(z_t, "")||^2

z_t are noised images of the concept, e its name, "" the empty prompt. 0: the text draws the same as the name. 1: the
text is as far from the name as the empty prompt is.

Shapes: n texts, D text width, B images, C x h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, Guide, UserError
from realera.methods.latents import at_level

LEVELS = (800, 600, 400, 200)  # levels of 0 ... 999 at which noise is compared, in drawing order
TEXTS = 256  # texts encoded at once
PASSES = 64  # images per denoiser call
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Seen:
    """A text and how near it is to a concept: value as in `closeness`, noise_distance as in `noise_distances`."""

    text: str
    value: float
    noise_distance: float


def ends(backbone: Backbone, texts: Sequence[str], advance: Advance | None = None) -> Tensor:
    """(n, D) float32 on the CPU: each text's first end-of-text row, which attends to the whole text."""
    rows = [torch.zeros(0, backbone.width)]
    for start in range(0, len(texts), TEXTS):
        read = backbone.encode(texts[start : start + TEXTS], to_end=True)
        rows.append(read.states[torch.arange(len(read.states), device=read.states.device), read.length].float().cpu())
        if advance is not None:
            advance(len(read.states))
    return torch.cat(rows)


def closeness(rows: Tensor, name: Tensor, mean: Tensor, root: Tensor | None = None) -> Tensor:
    """(n,): cosines of rows (n, D) with the name's row (D,), each less the mean (D,), in coordinates root (D, D).

    root: the first result of `value_space.roots`, for cosines of the denoiser's values; None = of the text states.
    """
    rows, name = (x.double() - mean.double() for x in (rows, name))
    if root is not None:
        rows, name = rows @ root, name @ root
    return torch.cosine_similarity(rows, name[None], dim=1)


def nearest(cosines: Tensor, most: int) -> list[int]:
    """Indices of the `most` largest of cosines (n,), largest first; ties stay in order."""
    return torch.argsort(cosines, descending=True, stable=True)[:most].tolist()


@torch.no_grad()
def noise_distances(
    backbone: Backbone,
    images: Tensor,
    name: str,
    texts: Sequence[str],
    guide: Guide | None = None,
    advance: Advance | None = None,
    at_once: int = PASSES,
) -> Tensor:
    """(n,) float64: the distance defined above, between the current model's noise for each text and the original
    model's noise for the name.

    images (B, C, h, w): latents of the concept. guide: the method's guide, if it has one; the compared noise is then
    the conditional noise with which plain guidance would give the guide's result. Every text is compared on the same
    noised images. at_once: images per denoiser call, at least B. Raises UserError if the model predicts the same noise
    for the name as for the empty prompt.
    """
    noise = torch.randn(images.shape, generator=Generator().manual_seed(0)).to(images)
    with backbone.original():
        (own, empty) = _predicted(backbone, images, noise, [name, ""], None)
    unit = _squared_distance(empty, own)
    if not unit > 0:
        raise UserError(
            f"The model predicts the same noise for {name!r} as for the empty prompt, so no text can be compared with "
            "it: give a name that the model can draw."
        )
    step = max(1, at_once // len(images))
    found = []
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        found += [_squared_distance(each, own) / unit for each in _predicted(backbone, images, noise, part, guide)]
        if advance is not None:
            advance(len(part))
    return torch.tensor(found, dtype=torch.float64)


def _squared_distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().sum())


def _predicted(
    backbone: Backbone, images: Tensor, noise: Tensor, texts: Sequence[str], guide: Guide | None
) -> list[Tensor]:
    """For each text, the noise (levels, B, C, h, w) predicted on the noised images."""
    count = len(images)
    levels: list[Tensor] = []
    with nullcontext() if guide is None else guide.around(backbone, [text for text in texts for _ in range(count)]):
        for level in LEVELS:
            t = at_level(backbone, torch.full((count,), level)).to(images.device)
            z = backbone.noisy_latents(images, noise, t)
            given = z.repeat(len(texts), 1, 1, 1)
            own = _noise(backbone, given, t, texts, count)
            if guide is not None and (scale := backbone.sampler.guidance_scale) > 0:
                uncond = _noise(backbone, given, t, [""] * len(texts), count)
                beside = [_noise(backbone, given, t, [text] * len(texts), count) for text in guide.prompts]
                further = torch.stack(beside) if beside else own[None][:0]
                if not levels:
                    guide(uncond, own, further, given, 0, scale)  # step 0 tells the guide that a batch begins
                step = int((backbone.timesteps().to(t) > t[0]).sum())
                own = uncond + (guide(uncond, own, further, given, step, scale) - uncond) / scale
            levels.append(own.unflatten(0, (len(texts), count)))
    return list(torch.stack(levels, dim=1))


def _noise(backbone: Backbone, latents: Tensor, timesteps: Tensor, texts: Sequence[str], count: int) -> Tensor:
    """(n B, C, h, w) float32: the predicted noise on `count` images for each text; timesteps (count,)."""
    read = backbone.encode(texts)
    states, pooled = (
        x if x is None else x.to(latents.device).repeat_interleave(count, dim=0) for x in (read.states, read.pooled)
    )
    assert states is not None
    return backbone.predict_noise(latents, timesteps.repeat(len(texts)), states, pooled).float()
