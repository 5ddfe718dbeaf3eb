"""Which texts draw a concept, told by the model itself: how it reads them, and which noise it predicts for them.

A text encoder puts words side by side that draw different things, and far from a name the phrases that evoke it. So
texts are first put in order by their values, which takes one pass of the text encoder for each (`closeness`), and of
the first ones it is measured how far the noise that they predict lies from the name's (`apart`):

    apart(k) = sum_t ||eps(z_t, k) - eps(z_t, e)||^2 / sum_t ||eps(z_t, e) - eps(z_t, "")||^2

z_t are noised images of the concept, e its name, "" the empty prompt. 0: the text draws what the name draws; 1: it lies
as far from the name as the empty prompt does.

Shapes: n texts, D text width, B images, C x h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from realera.contracts import Backbone, Guide, UserError

LEVELS = (800, 600, 400, 200)  # timesteps at which noise is compared, in the order in which images are drawn
TEXTS = 256  # encoded at once
PASSES = 64  # images of one call of the U-Net
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Seen:
    """A text and how near it lies to a concept: value as in `closeness`, apart as in `apart`."""

    text: str
    value: float
    apart: float


def ends(backbone: Backbone, texts: Sequence[str], advance: Advance | None = None) -> Tensor:
    """(n, D) float32 on the CPU: each text's row of the first end of text, which has read all of it."""
    rows = [torch.zeros(0, backbone.width)]
    for start in range(0, len(texts), TEXTS):
        read = backbone.encode(texts[start : start + TEXTS], to_end=True)
        rows.append(read.states[torch.arange(len(read.states), device=read.states.device), read.length].float().cpu())
        if advance is not None:
            advance(len(read.states))
    return torch.cat(rows)


def closeness(rows: Tensor, name: Tensor, mean: Tensor, root: Tensor | None = None) -> Tensor:
    """(n,): cosines of rows (n, D) with the name's row (D,), each less the mean (D,), in coordinates root (D, D).

    root: `value_space.roots`' first, for what the U-Net reads; None = the text states as they are.
    """
    rows, name = (x.double() - mean.double() for x in (rows, name))
    if root is not None:
        rows, name = rows @ root, name @ root
    return torch.cosine_similarity(rows, name[None], dim=1)


def nearest(cosines: Tensor, most: int) -> list[int]:
    """Numbers of the largest of cosines (n,), at most so many; equal ones in their order."""
    return torch.argsort(cosines, descending=True, stable=True)[:most].tolist()


@torch.no_grad()
def apart(
    backbone: Backbone,
    images: Tensor,
    name: str,
    texts: Sequence[str],
    guide: Guide | None = None,
    advance: Advance | None = None,
    at_once: int = PASSES,
) -> Tensor:
    """(n,) float64: see above, by the model as it now is, against the original one's noise for the name.

    images (B, C, h, w): latents of the concept. guide: what the noise goes through while images are drawn, where a
    method has such a part; noise is then the one that plain guidance would need to be led as far. Every text is
    compared on the same noised images. at_once: images of one call of the U-Net, at least B. Raises UserError where the
    name means nothing to the model.
    """
    noise = torch.randn(images.shape, generator=Generator().manual_seed(0)).to(images)
    with backbone.original():
        (own, empty) = _predicted(backbone, images, noise, [name, ""], None)
    unit = _square(empty, own)
    if not unit > 0:
        raise UserError(
            f"The model predicts the same noise for {name!r} as for no text: it does not draw it, and nothing can be "
            "told by it."
        )
    step = max(1, at_once // len(images))
    found = []
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        found += [_square(each, own) / unit for each in _predicted(backbone, images, noise, part, guide)]
        if advance is not None:
            advance(len(part))
    return torch.tensor(found, dtype=torch.float64)


def _square(some: Tensor, other: Tensor) -> float:
    return float((some.double() - other.double()).square().sum())


def _predicted(
    backbone: Backbone, images: Tensor, noise: Tensor, texts: Sequence[str], guide: Guide | None
) -> list[Tensor]:
    """For each text the noise (levels, B, C, h, w) that is predicted for it on the noised images."""
    count = len(images)
    levels: list[Tensor] = []
    with nullcontext() if guide is None else guide.around(backbone, [text for text in texts for _ in range(count)]):
        for level in LEVELS:
            t = torch.full((count,), level, device=images.device)
            z = backbone.noisy_latents(images, noise, t)
            given = z.repeat(len(texts), 1, 1, 1)
            own = _noise(backbone, given, level, texts, count)
            if guide is not None and (scale := backbone.sampler.guidance_scale) > 0:
                none = _noise(backbone, given, level, [""] * len(texts), count)
                beside = [_noise(backbone, given, level, [text] * len(texts), count) for text in guide.prompts]
                further = torch.stack(beside) if beside else own[None][:0]
                if not levels:
                    guide(none, own, further, given, 0, scale)  # by which a guide knows that a batch begins
                step = int((backbone.timesteps() > level).sum())
                own = none + (guide(none, own, further, given, step, scale) - none) / scale
            levels.append(own.unflatten(0, (len(texts), count)))
    return list(torch.stack(levels, dim=1))


def _noise(backbone: Backbone, latents: Tensor, level: int, texts: Sequence[str], count: int) -> Tensor:
    """(n B, C, h, w) float32: of `count` images for each text."""
    read = backbone.encode(texts)
    states, pooled = (
        x if x is None else x.to(latents.device).repeat_interleave(count, dim=0) for x in (read.states, read.pooled)
    )
    assert states is not None
    t = torch.full((len(latents),), level, device=latents.device)
    return backbone.predict_noise(latents, t, states, pooled).float()
