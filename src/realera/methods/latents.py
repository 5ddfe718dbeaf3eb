"""The usual source of noisy latents for training: images of a concept or its anchor, noised at every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor

from realera.contracts import Backbone, Concept, Pair, Sampler, TextStates
from realera.files.cache_costs import cached
from realera.methods.texts import take
from realera.paths import printable
from realera.setting_types import Batch, Count
from realera.system.terminal import bars_hidden

FIRST_SEED = 1_000_000  # far from the small seeds of evaluation images
SEEDS = 2**63  # number of seeds that torch's generators accept; larger products wrap around
TIMESTEPS = 1000  # levels of noise that settings and papers count; a backbone has its own timesteps
Of = Literal["anchor", "target"]
Known = Literal["noise", "prompts"]


class AnchorBank:
    """Clean latents of images drawn from the anchor's training prompts, noised anew at every step (RealEra, §3.3).

    images: number per concept; image i uses prompt i mod P. batch: number of z_t per step. chunk: images drawn, and
    stored, at once. sampler: null = the backbone's own. of: whose training prompts are drawn, the anchor's or the
    target's. give: additional outputs for each z_t: "noise" (batch, C, h, w) = the noise in it, or the velocity if the
    model predicts one (`Backbone.target_of`), "prompts" (batch,) = the index of its image's prompt. flip: half of the
    images, chosen at random, are `mirrored`. The *original* model draws the bank once; see `drawn`.
    """

    def __init__(
        self,
        images: Count = 200,
        batch: Batch = 1,
        chunk: Batch = 8,
        sampler: Sampler | None = None,
        of: Of = "anchor",
        give: Sequence[Known] = (),
        flip: bool = False,
    ) -> None:
        self.images = images
        self.batch = batch
        self.chunk = chunk
        self.sampler = sampler
        self.of = of
        self.give = tuple(give)
        self.flip = flip
        self.banks: list[Tensor] = []  # one (images, C, h, w) per concept; with `flip` their mirror images after them
        self.prompts: list[int] = []  # P of each concept

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        side = "target" if settings.get("of") == "target" else "anchor"
        return images_of(settings, [getattr(concept, side) for concept in concepts], steps)

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Loads the bank of every pair and draws the images that are not in the cache."""
        self.banks, self.prompts = [], []
        for pair in pairs:
            states, name = (
                (pair.anchor, pair.concept.anchor) if self.of == "anchor" else (pair.target, pair.concept.target)
            )
            title = f"{self.of.capitalize()} images of '{name}'"
            bank = drawn(backbone, states, self.images, self.chunk, self.sampler, cache, seed, title)
            self.banks.append(torch.cat([bank, mirrored(backbone, bank, self.chunk)]) if self.flip else bank)
            self.prompts.append(len(states.states))

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(z_t (batch, C, h, w), t (batch,) as `Backbone.draw_timesteps`) of one concept, and the outputs in
        `give`."""
        bank = self.banks[concept]
        chosen = torch.randint(len(bank), (self.batch,), generator=generator)
        z_t, timesteps, noise = noised(backbone, bank, chosen, generator)
        known = {"noise": noise, "prompts": chosen % self.images % self.prompts[concept]}
        return (z_t, timesteps, {name: known[name] for name in self.give}) if self.give else (z_t, timesteps)


def images_of(settings: Mapping[str, Any], names: Sequence[str], steps: int) -> dict[str, float]:
    """{"images <name>": denoiser passes} for the images of each name, drawn with guidance. settings: of the part that
    draws them. steps: of the backbone's sampler, used if the part sets no steps."""
    own = settings.get("sampler") or {}
    each = 2.0 * int(own.get("steps") or settings.get("steps") or steps)
    return {f"images {name}": int(settings.get("images") or 0) * each for name in names}


def noised(backbone: Backbone, bank: Tensor, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t (B, C, h, w), t (B,) as `Backbone.draw_timesteps`, `Backbone.target_of` z_t: the noise in it, or the
    velocity) of the images `chosen` (B,) of a bank."""
    timesteps = backbone.draw_timesteps(len(chosen), generator).to(bank.device)
    noise = torch.randn(len(chosen), *bank.shape[1:], generator=generator).to(bank.device)
    clean = bank[chosen.to(bank.device)]
    target = backbone.target_of(clean, noise, timesteps)
    return backbone.noisy_latents(clean, noise, timesteps), timesteps, target


def at_level(backbone: Backbone, levels: Tensor) -> Tensor:
    """The backbone's timesteps for levels in 0 ... 999, of `TIMESTEPS`."""
    return backbone.timesteps_at(levels.double() / TIMESTEPS)


def mirrored(backbone: Backbone, latents: Tensor, chunk: int) -> Tensor:
    """Latents (images, C, h, w) of the images flipped left to right. The images are decoded, flipped and encoded,
    `chunk` at a time: a flipped latent is not the latent of a flipped image. The result is not cached."""
    images = (backbone.decode(part).permute(0, 3, 1, 2) / 127.5 - 1 for part in latents.split(chunk))
    return torch.cat([backbone.encode_images(image.flip(-1)) for image in images])


def drawn(
    backbone: Backbone,
    states: TextStates,
    images: int,
    chunk: int,
    sampler: Sampler | None,
    cache: Path,
    seed: int,
    title: str,
) -> Tensor:
    """Latents (images, C, h, w) on the denoiser's device, drawn by the original model. Image i uses prompt i mod P.

    They are cached in <cache>/latents/<hash of all inputs>/, one file per chunk, so a killed run continues with the
    next chunk. Each file records its cost (`cache_costs`).
    """
    folder = bank_folder(backbone, states, images, chunk, sampler, cache, seed)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    chunks = []
    with Progress(*columns, TimeRemainingColumn(), disable=bars_hidden()) as bar, torch.no_grad(), backbone.original():
        task = bar.add_task(printable(title), total=images)
        for start in range(0, images, chunk):
            numbers = range(start, min(start + chunk, images))
            file = folder / f"{start:05d}.safetensors"
            chunks.append(_chunk(backbone, states, numbers, sampler, file, seed))
            bar.update(task, completed=numbers.stop)
    return torch.cat(chunks).to(next(backbone.denoiser.parameters()).device)


def _chunk(
    backbone: Backbone, states: TextStates, numbers: range, sampler: Sampler | None, file: Path, seed: int
) -> Tensor:
    prompts = torch.tensor([number % len(states.states) for number in numbers])
    seeds = [(FIRST_SEED * (seed + 1) + number) % SEEDS for number in numbers]
    return cached(file, "latents", backbone, lambda: backbone.sample(take(states, prompts), seeds, sampler).float())


def bank_folder(
    backbone: Backbone,
    states: TextStates,
    images: int,
    chunk: int,
    sampler: Sampler | None,
    cache: Path,
    seed: int,
) -> Path:
    """The cache folder that `drawn` uses for these inputs; it may not exist yet."""
    parameter = next(backbone.denoiser.parameters())
    settings = {
        "backbone": backbone.fingerprint,
        "weights": [str(parameter.dtype), parameter.device.type],
        "sampler": asdict(sampler or backbone.sampler),
        "images": images,
        "chunk": chunk,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(states.states.detach().float().cpu().contiguous().numpy().tobytes())
    return cache / "latents" / digest.hexdigest()[:16]
