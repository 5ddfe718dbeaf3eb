"""Token vectors learned so that they stand for a concept: textual inversion (arXiv 2208.01618) on a model as it is now.

Letters: B latents, D width of a token vector, P prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera import paths
from realera.contracts import PASSES_OF_A_GRADIENT, Backbone, Concept, Edit, NamedPrompt, Pair, TextStates, UserError
from realera.files import finite
from realera.files.cache_costs import cached
from realera.methods.latents import AnchorBank, noised
from realera.methods.texts import predict, repeat, take
from realera.paths import printable
from realera.setting_types import Label, LearningRate, NonNegative, Number, Share, Template, TrainingSteps
from realera.system.terminal import bars_hidden

Rounds = Annotated[int, Number(1, 64, whole=True)]
Images = Callable[[Generator], tuple[Tensor, Tensor, Tensor]]  # z_t (B, C, h, w), t (B,), the noise in z_t
STREAMS = 1_000_003  # the seeds of the rounds are this far apart
MEASURING = 64  # in place of a round's number, the seed of `won_back`
MEASURED = 4  # timesteps of an image in `won_back`


def learned_vector(
    backbone: Backbone,
    name: str,
    images: Images,
    templates: Sequence[str],
    start: str,
    steps: int,
    lr: float,
    weight_decay: float,
    generator: Generator,
    setting: str,
    bar: Progress | None = None,
) -> Tensor:
    """One token vector (1, D) that takes the place of `name`: `steps` steps of AdamW on the mean of
    ||noise - eps(z_t, t, prompt)||^2. In a step the prompt is one of `templates`. The vector starts as the last token
    vector of `start`.

    setting: of the learning rate, for the error. Raises NotFinite if a loss is not finite.
    """
    vector = backbone.token_vectors(start)[-1:].clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([vector], lr=lr, weight_decay=weight_decay)
    task = None if bar is None else bar.add_task(printable(f"Inverting '{name}'"), total=steps)
    for step in range(1, steps + 1):
        z_t, t, noise = images(generator)
        template = templates[int(torch.randint(len(templates), (1,), generator=generator))]
        with torch.enable_grad():
            texts = backbone.encode([NamedPrompt.of(template, name)], vectors=vector)
            loss = mse_loss(predict(backbone, z_t, t, repeat(texts, 0, len(z_t))), noise.float())
            if not loss.isfinite():
                raise finite.NotFinite(f"A loss of the search is {float(loss)} at step {step}: lower {setting}.")
            (vector.grad,) = torch.autograd.grad(loss, [vector])
        optimizer.step()
        if bar is not None and task is not None:
            bar.advance(task)
    return vector.detach()


class AdversarialRounds:
    """What a closed form leaves readable, found by attack: in each of `rounds` rounds the denoiser takes the edit made
    so far, and for every concept one token vector is learned that brings the concept back, on images of the concept by
    the original model. The text states of its prompts are then erased as well (`ValueSpaceErasure`).

    images: of the concept. steps, lr, weight_decay, start, templates: see `learned_vector`. until: a round whose
    vectors win back at most this share of every concept (`won_back`) is the last one, and its states are not erased;
    None = all rounds. The criterion knows no judge. The vectors are cached in <cache>/rounds/.
    """

    learns_vectors: ClassVar[bool] = True

    def __init__(
        self,
        images: AnchorBank,
        rounds: Rounds = 1,
        steps: TrainingSteps = 1000,
        lr: LearningRate = 5e-3,
        weight_decay: NonNegative = 0.01,
        start: Label = "object",
        templates: Sequence[Template] = ("a photo of a {}",),
        until: Share | None = None,
    ) -> None:
        self.images = images
        self.rounds, self.steps, self.until = rounds, steps, until
        self.lr, self.weight_decay = lr, weight_decay
        self.start, self.templates = start, list(templates)
        if not self.templates:
            raise UserError("method.edit.search.templates is empty: give texts with {} where the vector goes.")

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        images, rounds = settings.get("images") or {}, int(settings.get("rounds") or 0)
        searched = PASSES_OF_A_GRADIENT * int(images.get("batch") or 1) * float(settings.get("steps") or 0)
        measured = 3.0 * MEASURED * int(images.get("images") or 0)
        return {f"search {concept.target}": rounds * (searched + measured) for concept in concepts}

    def __call__(
        self, backbone: Backbone, pairs: Sequence[Pair], edit: Edit, number: int, seed: int
    ) -> list[TextStates]:
        """The prompts of each concept with the vector that round `number` found on the model with `edit`, on the
        backbone's device. The model is as before afterwards."""
        backbone.token_vectors(self.start)  # a backbone without them refuses here, before images are drawn
        cache = paths.cache_dir()
        self.images.prepare(backbone, pairs, cache, seed)
        found = []
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        with Progress(*columns, TimeRemainingColumn(), disable=bars_hidden()) as bar, edited(backbone, edit):
            for i, pair in enumerate(pairs):
                name = pair.concept.target
                file = cache / "rounds" / f"{self._key(backbone, name, i, edit, number, seed)}.safetensors"
                vector = cached(file, "vector", backbone, partial(self._vector, backbone, name, i, number, seed, bar))
                with torch.no_grad():
                    named = [NamedPrompt.of(template, name) for template in self.templates]
                    found.append(backbone.encode(named, vectors=vector))
        self.images.banks = []
        return found

    @torch.no_grad()
    def won_back(
        self, backbone: Backbone, pairs: Sequence[Pair], edit: Edit, found: Sequence[TextStates], seed: int
    ) -> Tensor:
        """(n,): for each concept the share of the way back that the prompts `found` (as `__call__` returns them) go,

            (l(anchor) - l(found)) / (l(anchor) - l(name)),

        l the mean noise loss on the concept's images: l(name) of the original model for the templates with the
        concept's name, the others of the model with `edit`, for the templates with the anchor's name and for `found`. 1
        = the found vectors explain the images as well as the name did, 0 = no better than the anchor. All losses are on
        the same noised images, `MEASURED` timesteps of each. 0 if the name is no better than the anchor: then nothing
        can be won back."""
        self.images.prepare(backbone, pairs, paths.cache_dir(), seed)
        shares = []
        for pair, bank, texts in zip(pairs, self.images.banks, found, strict=True):
            loss = partial(self._loss, backbone, bank, seed=seed)
            named, anchored = (
                backbone.encode([template.replace("{}", word) for template in self.templates])
                for word in (pair.concept.target, pair.concept.anchor)
            )
            with backbone.original():
                of_name = loss(named)
            with edited(backbone, edit):
                of_anchor, of_found = loss(anchored), loss(texts)
            shares.append((of_anchor - of_found) / (of_anchor - of_name) if of_anchor > of_name else 0.0)
        self.images.banks = []
        return torch.tensor(shares, dtype=torch.float64)

    def _loss(self, backbone: Backbone, bank: Tensor, texts: TextStates, seed: int) -> float:
        """The mean noise loss of a bank's images, each at `MEASURED` timesteps. The prompts take turns."""
        draw = Generator().manual_seed((seed * STREAMS + MEASURING) % 2**63)
        total = 0.0
        numbers = torch.arange(len(bank) * MEASURED)
        for part in numbers.split(self.images.chunk):
            z_t, t, noise = noised(backbone, bank, part % len(bank), draw)
            predicted = predict(backbone, z_t, t, take(texts, part % len(texts.states)))
            total += float((predicted - noise.float()).double().square().mean(dim=(1, 2, 3)).sum())
        return total / len(numbers)

    def _vector(self, backbone: Backbone, name: str, concept: int, number: int, seed: int, bar: Progress) -> Tensor:
        bank = self.images.banks[concept]

        def images(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
            chosen = torch.randint(len(bank), (self.images.batch,), generator=generator)
            return noised(backbone, bank, chosen, generator)

        return learned_vector(
            backbone,
            name,
            images,
            self.templates,
            self.start,
            self.steps,
            self.lr,
            self.weight_decay,
            Generator().manual_seed((seed * STREAMS + number) % 2**63),
            "method.edit.search.lr",
            bar,
        )

    def _key(self, backbone: Backbone, name: str, concept: int, edit: Edit, number: int, seed: int) -> str:
        own = {key: value for key, value in vars(self).items() if key not in ("images", "rounds", "until")}
        bank = self.images.banks[concept]
        about = [
            backbone.fingerprint,
            bank.device.type,
            own,
            name,
            number,
            seed,
            self.images.batch,
            list(edit.projections),
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(bank.cpu().numpy().tobytes())
        assert edit.map is not None
        digest.update(edit.map.float().numpy().tobytes())  # its last digits differ with the number of threads
        return digest.hexdigest()[:16]


@contextmanager
def edited(backbone: Backbone, edit: Edit) -> Iterator[None]:
    """The cross-attention has `edit` inside this context, and its own weights again afterwards."""
    weights = [layer.weight for layer in backbone.text_projections().values()]
    before = [weight.detach().clone() for weight in weights]
    backbone.apply(edit)
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(backbone.text_projections().values(), before, strict=True):
                layer.weight.copy_(weight)
