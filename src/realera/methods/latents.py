"""Where the noisy latents of the gradient part come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from realera.contracts import Backbone, Pair, Sampler, TextStates, UserError
from realera.paths import whole

FIRST_SEED = 1_000_000  # far from the small seeds that evaluation draws its images with
TIMESTEPS = 1000  # of the noise schedule of every Stable Diffusion


class AnchorBank:
    """Clean latents of images drawn from the anchor's training prompts, noised afresh at every step (RealEra, §3.3).

    images: how many per concept; image i takes anchor prompt i mod P. batch: how many z_t a step is given. chunk: how
    many images are drawn, and stored, at once. sampler: null = the backbone's own. The bank is made once by the
    *original* model and kept under <cache>/latents/<hash of all it depends on>/, one file a chunk, so that a killed run
    goes on with the next chunk.
    """

    def __init__(self, images: int = 200, batch: int = 1, chunk: int = 8, sampler: Sampler | None = None) -> None:
        for name, value in (("images", images), ("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"method.latents.{name}={value} cannot be: give a whole number from 1 on.")
        self.images = images
        self.batch = batch
        self.chunk = chunk
        self.sampler = sampler
        self.banks: list[Tensor] = []  # one (images, C, h, w) per concept

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Loads the bank of every pair's anchor, drawing what is not in the cache."""
        self.banks = []
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
        )
        with bar, torch.no_grad(), backbone.original():
            for pair in pairs:
                task = bar.add_task(f"Anchor images of '{pair.concept.anchor}'", total=self.images)
                folder = cache / "latents" / self._key(backbone, pair.anchor, seed)
                chunks = []
                for start in range(0, self.images, self.chunk):
                    numbers = range(start, min(start + self.chunk, self.images))
                    chunks.append(
                        self._chunk(backbone, pair.anchor, numbers, folder / f"{start:05d}.safetensors", seed)
                    )
                    bar.update(task, completed=numbers.stop)
                self.banks.append(torch.cat(chunks).to(next(backbone.unet.parameters()).device))

    def __call__(self, backbone: Backbone, concept: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """(z_t (batch, C, h, w), t (batch,) uniform in 0 ... 999) from images of one concept's anchor."""
        bank = self.banks[concept]
        chosen = torch.randint(len(bank), (self.batch,), generator=generator)
        timesteps = torch.randint(TIMESTEPS, (self.batch,), generator=generator).to(bank.device)
        noise = torch.randn(self.batch, *bank.shape[1:], generator=generator).to(bank.device)
        return backbone.noisy_latents(bank[chosen.to(bank.device)], noise, timesteps), timesteps

    def _chunk(self, backbone: Backbone, anchor: TextStates, numbers: range, file: Path, seed: int) -> Tensor:
        if file.is_file():
            try:
                return load_file(file)["latents"]
            except (SafetensorError, KeyError):  # a cache is never worth an error: the chunk is drawn again
                pass
        prompts = torch.tensor([number % len(anchor.states) for number in numbers])
        drawn = backbone.sample(_rows(anchor, prompts), _seeds(numbers, seed), self.sampler).float().cpu().contiguous()
        with whole(file) as beside:
            save_file({"latents": drawn}, beside)
        return drawn

    def _key(self, backbone: Backbone, anchor: TextStates, seed: int) -> str:
        parameter = next(backbone.unet.parameters())
        settings = {
            "backbone": backbone.fingerprint,
            "weights": [str(parameter.dtype), parameter.device.type],
            "sampler": asdict(self.sampler or backbone.sampler),
            "images": self.images,
            "chunk": self.chunk,
            "seed": seed,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(anchor.states.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _seeds(numbers: range, seed: int) -> list[int]:
    return [FIRST_SEED * (seed + 1) + number for number in numbers]


def _rows(states: TextStates, index: Tensor) -> TextStates:
    index = index.to(states.states.device)
    return TextStates(
        states=states.states[index],
        first=states.first[index],
        last=states.last[index],
        length=states.length[index],
        pooled=None if states.pooled is None else states.pooled[index],
    )
