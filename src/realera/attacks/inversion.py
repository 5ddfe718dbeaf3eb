"""Concept inversion (arXiv 2308.01508): a new token's vector is learned on the erased model, by textual inversion
(arXiv 2208.01618) on images of the concept, and takes the place of the concept's name in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.attack_contract import Attacked, Attempt, Case
from realera.contracts import PASSES_OF_A_GRADIENT, NamedPrompt
from realera.files import finite
from realera.methods.texts import predict, repeat
from realera.paths import printable
from realera.setting_types import AnyText, Batch, Count, LearningRate, NonNegative, Number, TrainingSteps
from realera.system.terminal import bars_hidden

Tokens = Annotated[int, Number(1, 64, whole=True)]


class Inversion:
    """steps, lr, weight_decay, batch: of AdamW on the noise loss ||noise - eps(x_t, t, prompt)||^2, mean over x_t.
    images: of the concept, drawn by the unedited model. tokens: number of vectors; each starts as the mean token vector
    of `start` (None = the concept's anchor). In a step the prompt is one of the task's training prompts. together:
    prompts drawn at once."""

    counts_plain = False
    learns_vectors = True

    def __init__(
        self,
        steps: TrainingSteps = 1000,
        lr: LearningRate = 5e-3,
        weight_decay: NonNegative = 0.01,
        batch: Batch = 4,
        images: Count = 25,
        tokens: Tokens = 1,
        start: AnyText | None = None,
        together: Batch = 1,
    ) -> None:
        self.steps, self.lr, self.weight_decay, self.batch = steps, lr, weight_decay, batch
        self.images = images
        self.tokens = tokens
        self.start = start
        self.together = together

    @staticmethod
    def passes(settings: Mapping[str, Any], per_image: float) -> float:
        return per_image

    @staticmethod
    def passes_of_search(settings: Mapping[str, Any], per_image: float) -> float:
        gradients = int(settings.get("steps") or 0) * int(settings.get("batch") or 4)
        return PASSES_OF_A_GRADIENT * gradients + int(settings.get("images") or 25) * per_image

    def search(self, attacked: Attacked) -> Mapping[str, Tensor]:
        """{"vectors" (tokens, D)}. Raises UserError if the loss is not finite."""
        backbone, draw = attacked.backbone, attacked.generator
        latents = attacked.latents(self.images)
        own = backbone.token_vectors(attacked.concept.anchor if self.start is None else self.start).float()
        vectors = own.mean(0, keepdim=True).repeat(self.tokens, 1).to(latents.device).requires_grad_(True)
        optimizer = torch.optim.AdamW([vectors], lr=self.lr, weight_decay=self.weight_decay)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        with (
            Progress(*columns, TimeRemainingColumn(), disable=bars_hidden()) as bar,
            torch.enable_grad(),
        ):
            task = bar.add_task(printable(f"Inverting '{attacked.concept.target}'"), total=self.steps)
            for step in range(1, self.steps + 1):
                loss = self.loss(attacked, latents, vectors, draw)
                if not loss.isfinite():
                    raise finite.NotFinite(
                        f"The loss of the attack is {float(loss)} at step {step}: lower attack.lr, or use a run of "
                        "backbone.dtype=float32."
                    )
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                optimizer.step()
                bar.advance(task)
        return {"vectors": vectors.detach()}

    def loss(self, attacked: Attacked, latents: Tensor, vectors: Tensor, draw: Generator) -> Tensor:
        """The noise loss of one step, on `batch` images."""
        backbone = attacked.backbone
        chosen = torch.randint(len(latents), (self.batch,), generator=draw)
        named = attacked.names[int(torch.randint(len(attacked.names), (1,), generator=draw))]
        timesteps = backbone.draw_timesteps(self.batch, draw).to(latents.device)
        noise = torch.randn(self.batch, *latents.shape[1:], generator=draw).to(latents.device)
        clean = latents[chosen.to(latents.device)]
        z_t, target = (made(clean, noise, timesteps) for made in (backbone.noisy_latents, backbone.target_of))
        texts = repeat(backbone.encode([named], vectors=vectors), 0, self.batch)
        with attacked.acting([without_name(named)] * self.batch, texts):
            return mse_loss(predict(backbone, z_t, timesteps, texts), target)

    def __call__(self, case: Case) -> Mapping[str, Any]:
        return self.attack_together([case])[0]

    def attack_together(self, cases: Sequence[Case]) -> Sequence[Mapping[str, Any]]:
        vectors = cases[0].searched["vectors"]
        attempts = []
        for case in cases:
            named = placed(case)
            said = named.text[: named.start] + "<new token>" + named.text[named.end :]
            attempts.append(Attempt(named, vectors=vectors, said=said))
        cases[0].draw_all(cases, attempts, step=self.steps)
        return [{} for _ in cases]


def placed(case: Case) -> NamedPrompt:
    """The prompt with the place of the concept's name in it; without the name in it, the task's first training
    prompt."""
    text, name = case.prompt.text, case.concept.target
    at = text.casefold().find(name.casefold())
    return case.names[0] if at < 0 else NamedPrompt(text, at, at + len(name))


def without_name(named: NamedPrompt) -> str:
    return named.text[: named.start] + named.text[named.end :]
