"""Textual inversion (arXiv 2208.01618) as in FMN: token vectors that replace a concept's name, learned with the noise
loss on images of the concept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn.functional import mse_loss, normalize

from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, Concept, NamedPrompt, Pair, TextStates, UserError
from realera.files import finite
from realera.files.cache_costs import cached
from realera.methods.latents import AnchorBank
from realera.methods.texts import on_cpu, predict, repeat
from realera.paths import printable
from realera.setting_types import LearningRate, NonNegative, Number, Share, Template, TrainingSteps
from realera.system.terminal import bars_hidden

Tokens = Annotated[int, Number(1, 64, whole=True)]


class TextualInversion:
    """images: the source of the concept's noised images; it must give their noise. prompt: the vectors replace {}.
    tokens: number of vectors. The first ones start as the token vectors of the name, the others at random, with the
    average length of the name's. steps: 0 = no inversion. lr, weight_decay: of AdamW. pull: after each step, the length
    of every vector moves by this share towards that average (official: min(1, 100 lr) towards 0.4, SD's average).

    Raises UserError if the images do not give their noise.
    """

    def __init__(
        self,
        images: AnchorBank,
        steps: TrainingSteps = 500,
        tokens: Tokens = 4,
        prompt: Template = "a photo of {}",
        lr: LearningRate = 1e-3,
        weight_decay: NonNegative = 0.1,
        pull: Share = 0.1,
    ) -> None:
        if steps > 0 and "noise" not in images.give:
            raise UserError(
                "method.align.inversion needs the noise of its images: set method.latents.give='[noise,prompts]'."
            )
        self.images = images
        self.steps = steps
        self.tokens = tokens
        self.prompt = prompt
        self.lr = lr
        self.weight_decay = weight_decay
        self.pull = pull

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        if not (own := int(settings.get("steps") or 0)):
            return {}
        batch = int((settings.get("images") or {}).get("batch") or 1)
        names = ", ".join(concept.target for concept in concepts)
        return {f"inversion {names}": float(PASSES_OF_A_GRADIENT * own * batch * len(concepts))}

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> list[TextStates]:
        """One prompt per concept with its learned vectors, on the CPU. The vectors are cached in <cache>/inversion/."""
        self.images.prepare(backbone, pairs, cache, seed)
        found = []
        for i, pair in enumerate(pairs):
            name = pair.concept.target
            file = cache / "inversion" / f"{self._key(backbone, name, i, seed)}.safetensors"
            vectors = cached(
                file, "vectors", backbone, partial(self.invert, backbone, name, i, Generator().manual_seed(seed))
            )
            with torch.no_grad():
                found.append(self._prompt(backbone, name, vectors))
        self.images.banks = []
        return [on_cpu(texts) for texts in found]

    def invert(self, backbone: Backbone, name: str, concept: int, generator: Generator) -> Tensor:
        """(tokens, D) on the CPU."""
        own = backbone.token_vectors(name).cpu()
        goal = own.norm(dim=-1).mean()
        random = goal * normalize(torch.randn(self.tokens, own.shape[-1], generator=generator), dim=-1)
        vectors = torch.cat([own, random])[: self.tokens].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([vectors], lr=self.lr, weight_decay=self.weight_decay)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        with (
            Progress(*columns, TimeRemainingColumn(), disable=bars_hidden()) as bar,
            backbone.original(),
            torch.enable_grad(),
        ):
            task = bar.add_task(printable(f"Inverting '{name}'"), total=self.steps)
            for step in range(1, self.steps + 1):
                z_t, timesteps, *more = self.images(backbone, concept, generator)
                texts = repeat(self._prompt(backbone, name, vectors), 0, len(z_t))
                loss = mse_loss(predict(backbone, z_t, timesteps, texts), more[0]["noise"].float())
                if not loss.isfinite():
                    raise finite.NotFinite(
                        f"The inversion loss of {name!r} is {float(loss)} at step {step}: lower "
                        "method.align.inversion.lr, or set backbone.dtype=float32."
                    )
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                optimizer.step()
                with torch.no_grad():
                    length = vectors.norm(dim=-1, keepdim=True)
                    vectors.copy_(normalize(vectors, dim=-1) * (length + self.pull * (goal - length)))
                bar.advance(task)
        return vectors.detach()

    def _prompt(self, backbone: Backbone, name: str, vectors: Tensor) -> TextStates:
        return backbone.encode([NamedPrompt.of(self.prompt, name)], vectors=vectors)

    def _key(self, backbone: Backbone, name: str, concept: int, seed: int) -> str:
        settings = {name: value for name, value in vars(self).items() if name != "images"}
        bank = self.images.banks[concept]
        about = [backbone.fingerprint, bank.device.type, settings, name, seed, self.images.batch]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(bank.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]
