"""STEREO (arXiv 2408.16807): first it searches for token vectors that bring the concept back, on a copy of the denoiser
that is erased again after each of them; then it erases the name and all of them from the original denoiser at once,
beside anchors.

Letters: B latents, K found vectors, T token rows, D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from realera.contracts import (
    PASSES_OF_A_GRADIENT,
    Backbone,
    Concept,
    LoraSpec,
    Miner,
    NamedPrompt,
    Pair,
    Scheduler,
    TextStates,
    TrainingBatch,
    UserError,
)
from realera.files import finite
from realera.files.cache_costs import cached
from realera.methods.esd import NORMS
from realera.methods.inverted import learned_vector
from realera.methods.latents import AnchorBank, noised
from realera.methods.rollout import Rollout
from realera.methods.texts import join, predict, repeat, take
from realera.paths import printable
from realera.setting_types import (
    Batch,
    Count,
    Guidance,
    Label,
    LearningRate,
    NonNegative,
    Number,
    Positive,
    SamplerSteps,
    Targets,
    Template,
    TrainingSteps,
)
from realera.system.terminal import bars_hidden

Rounds = Annotated[int, Number(0, 64, whole=True)]
Scale = Annotated[float, Number(0, 1000)]
Anchors = Literal["target", "anchor"]
STREAMS = 1_000_003  # the seeds of a search's parts are this far apart


class ThoroughSearch:
    """Stage 1. Each of `rounds` rounds

    1. erases the name, or the vector of the round before, from the copy: `erase_steps` steps of AdamW (erase_lr) on
       || eps(z_t, c) - (eps1(z_t, c) - (scale - 1) (eps1(z_t, c) - eps1(z_t, ''))) ||^2, where eps1 is the copy at the
       beginning of the round, and z_t an image of c that the copy has drawn partway (`rollout`);
    2. learns one token vector that stands for the concept in `templates`, by `invert_steps` steps of AdamW (invert_lr)
       with the noise loss on images of the concept by the original model, another 1 / rounds of `images` in each round.
       It starts as the last token vector of `start`.

    scale: negative_guidance of the official code; at 2 the first target is eps1(z_t, ''). The found vectors are cached
    in <cache>/search/, so a search that was stopped repeats only its erasing steps.
    """

    learns_vectors: ClassVar[bool] = True
    idle_where: ClassVar = {"rounds": 0}

    def __init__(
        self,
        images: AnchorBank,
        rollout: Rollout,
        rounds: Rounds = 2,
        erase_steps: TrainingSteps = 200,
        erase_lr: LearningRate = 5e-6,
        scale: Scale = 2.0,
        invert_steps: TrainingSteps = 3000,
        invert_lr: LearningRate = 5e-3,
        weight_decay: NonNegative = 0.01,
        start: Label = "object",
        templates: Sequence[Template] = ("a photo of a {}",),
    ) -> None:
        self.images, self.rollout = images, rollout
        self.rounds, self.erase_steps, self.erase_lr, self.scale = rounds, erase_steps, erase_lr, scale
        self.invert_steps, self.invert_lr, self.weight_decay = invert_steps, invert_lr, weight_decay
        self.start, self.templates = start, list(templates)
        if rounds and not self.templates:
            raise UserError("method.latents.search.templates is empty: give texts with {} where the vector goes.")

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        rollout = settings.get("rollout") or {}
        drawn = Rollout.passes(rollout, steps)
        erase = int(settings.get("erase_steps") or 0) * (
            drawn + int(rollout.get("batch") or 1) * (2 + PASSES_OF_A_GRADIENT)
        )
        batch = int((settings.get("images") or {}).get("batch") or 1)
        invert = int(settings.get("invert_steps") or 0) * batch * PASSES_OF_A_GRADIENT
        rounds = int(settings.get("rounds") or 0)
        return {f"search {concept.target}": rounds * (erase + invert) for concept in concepts} if rounds else {}

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> list[list[Tensor]]:
        """The found vectors of each concept, (1, D) each, on the CPU. The trained weights of the backbone are the
        original ones before and after."""
        if not self.rounds:
            return [[] for _ in pairs]
        backbone.token_vectors(self.start)  # a backbone without them refuses here, before images are drawn
        self.images.prepare(backbone, pairs, cache, seed)
        self.rollout.prepare(backbone, pairs, cache, seed)
        found = []
        for i, pair in enumerate(pairs):
            with original_weights_after(backbone):
                found.append(self._search(backbone, i, pair.concept.target, cache, seed))
        self.images.banks = []
        return found

    def _search(self, backbone: Backbone, concept: int, name: str, cache: Path, seed: int) -> list[Tensor]:
        folder = cache / "search" / self._key(backbone, concept, name, seed)
        files = [folder / f"{number}.safetensors" for number in range(self.rounds)]
        vectors: list[Tensor] = []
        erased = 0  # rounds whose erasing the copy has
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
        )
        with Progress(*columns, TimeRemainingColumn(), disable=bars_hidden()) as bar:
            for number, file in enumerate(files):

                def make(number: int = number) -> Tensor:
                    nonlocal erased
                    for done in range(erased, number + 1):
                        self.erase(backbone, concept, token(backbone, name, ([None, *vectors])[done]), done, seed, bar)
                    erased = number + 1
                    return self.invert(backbone, concept, name, number, seed, bar)

                vectors.append(cached(file, "vector", backbone, make))
        return vectors

    def erase(
        self, backbone: Backbone, concept: int, texts: TextStates, number: int, seed: int, bar: Progress | None = None
    ) -> None:
        """The erasing half of a round: trains the copy, the trainable weights of the backbone. texts: c."""
        weights = {n: w for n, w in backbone.trained.named_parameters() if w.requires_grad}
        teacher = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=self.erase_lr, weight_decay=self.weight_decay)
        generator = Generator().manual_seed((seed * STREAMS + 2 * number) % 2**63)
        self.rollout.texts[concept] = texts
        self.rollout.stages, self.rollout.uses = {}, {}
        with backbone.original():
            empty = backbone.encode([""])
        task = None if bar is None else bar.add_task(printable(f"Erasing, round {number + 1}"), total=self.erase_steps)
        for step in range(1, self.erase_steps + 1):
            z_t, t = self.rollout(backbone, concept, generator)
            c, none = (repeat(one, 0, len(z_t)) for one in (texts, empty))
            with torch.no_grad(), replaced(weights, teacher):
                cond, uncond = predict(backbone, z_t, t, c), predict(backbone, z_t, t, none)
            with torch.enable_grad():
                target = cond - (self.scale - 1) * (cond - uncond)
                loss = mse_loss(predict(backbone, z_t, t, c), target)
                self._refuse_bad(loss, step, "erase_lr")
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
            if bar is not None and task is not None:
                bar.advance(task)

    def invert(
        self, backbone: Backbone, concept: int, name: str, number: int, seed: int, bar: Progress | None = None
    ) -> Tensor:
        """The attacking half of a round: the vector (1, D)."""
        generator = Generator().manual_seed((seed * STREAMS + 2 * number + 1) % 2**63)
        bank = self.images.banks[concept]
        whole = self.images.images  # with `flip` the mirrored images follow
        share = max(1, whole // self.rounds)

        def images(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
            chosen = (number * share + torch.randint(share, (self.images.batch,), generator=generator)) % whole
            if self.images.flip:
                chosen = chosen + whole * torch.randint(2, (len(chosen),), generator=generator)
            return noised(backbone, bank, chosen, generator)

        return learned_vector(
            backbone,
            name,
            images,
            self.templates,
            self.start,
            self.invert_steps,
            self.invert_lr,
            self.weight_decay,
            generator,
            "method.latents.search.invert_lr",
            bar,
        )

    @staticmethod
    def _refuse_bad(loss: Tensor, step: int, setting: str) -> None:
        if not loss.isfinite():
            raise finite.NotFinite(
                f"A loss of the search is {float(loss)} at step {step}: lower method.latents.search.{setting}."
            )

    def _key(self, backbone: Backbone, concept: int, name: str, seed: int) -> str:
        own = {key: value for key, value in vars(self).items() if key not in ("images", "rollout")}
        rollout = self.rollout
        drawn = [rollout.settings, rollout.timestep, rollout.extra_steps, rollout.first_stop]
        drawn += [rollout.batch, rollout.renew, rollout.chains]
        trained = [n for n, weight in backbone.trained.named_parameters() if weight.requires_grad]
        bank = self.images.banks[concept]
        about = [
            backbone.fingerprint,
            bank.device.type,
            own,
            drawn,
            trained,
            name,
            seed,
            self.images.batch,
            self.images.flip,
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(bank.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class SearchedRollout(Rollout):
    """z_t of stage 2: images of the name or of a found vector, drawn partway by the model in training, each equally
    often on average. search: stage 1. anchors: the prompts that the model is led to, one at random for each z_t: the
    training prompts that name the target (as the official list, whose scenes all show the concept) or the anchor, or a
    list of texts, {} = the target. The others: see `Rollout`.
    """

    def __init__(
        self,
        search: ThoroughSearch,
        anchors: Anchors | Sequence[Label] = "target",
        scheduler: Scheduler = "ddim",
        steps: SamplerSteps = 50,
        guidance_scale: Guidance = 3.0,
        batch: Batch = 1,
        renew: Count = 1,
        chains: Batch = 8,
    ) -> None:
        super().__init__(
            scheduler, steps, guidance_scale, "trained", "concept", "list", 0, min(1, steps - 1), batch, renew, chains
        )
        self.search = search
        self.anchors = anchors if isinstance(anchors, str) else list(anchors)
        self.anchored: list[TextStates] = []

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Searches, and reads the texts."""
        super().prepare(backbone, pairs, cache, seed)
        found = self.search(backbone, pairs, cache, seed)
        with torch.no_grad():
            self.texts = [
                erased_texts(backbone, pair.concept.target, own) for pair, own in zip(pairs, found, strict=True)
            ]
            self.anchored = [self._anchors(backbone, pair) for pair in pairs]
        self.prompts = {}

    def _anchors(self, backbone: Backbone, pair: Pair) -> TextStates:
        if isinstance(self.anchors, str):
            return pair.target if self.anchors == "target" else pair.anchor
        return backbone.encode([text.replace("{}", pair.concept.target) for text in self.anchors])

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(z_t, t, known). known: prompts (B,) = which of the K + 1 texts z_t shows, erase_states (B, K + 1, T, D) and
        anchor_states (B, T, D); for SDXL erase_pooled, anchor_pooled."""
        z_t, timesteps, prompts = self.with_prompts(backbone, concept, generator)
        texts, anchors = self.texts[concept], self.anchored[concept]
        anchors = take(anchors, torch.randint(len(anchors.states), (self.batch,), generator=generator))
        known = {"prompts": prompts, "anchor_states": anchors.states}
        known["erase_states"] = texts.states.expand(self.batch, *texts.states.shape)
        if texts.pooled is not None and anchors.pooled is not None:
            known |= {
                "erase_pooled": texts.pooled.expand(self.batch, *texts.pooled.shape),
                "anchor_pooled": anchors.pooled,
            }
        return z_t, timesteps, known

    def state_dict(self) -> dict[str, Tensor]:
        """Also the text of each chain, as float32."""
        return {**super().state_dict(), **{f"{c}.prompts": p.float() for c, p in self.prompts.items()}}

    def state_form(self, calls: Sequence[int]) -> dict[str, tuple[int, ...]]:
        stages = super().state_form(calls)
        return {**stages, **{f"{concept}.prompts": (self.chains,) for concept in stages}}

    def load_state_dict(self, state: Mapping[str, Tensor], calls: Sequence[int]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if "." not in key}, calls)
        named = {int(key.partition(".")[0]): value for key, value in state.items() if "." in key}
        texts = {concept: len(self.texts[concept].states) for concept in named}
        self.prompts = {c: value.long().clamp(0, texts[c] - 1) for c, value in named.items()}


class RobustErasing:
    """Stage 2: || eps(z_t, t, c_j) - y ||^2, as a mean, where

        y = eps0(z_t, t, '') + (scale - 1) (eps0(z_t, t, a) - eps0(z_t, t, ''))
            - (scale + 1) mean_i (eps0(z_t, t, c_i) - eps0(z_t, t, '')),

    c_0 is the concept's name and c_1 ... c_K the found vectors, c_j the one that z_t shows, a an anchor, and eps0 the
    original model. scale: the official compositional_guidance_scale; with its 2 the concept counts three times as much
    as the anchor. parameters: the denoiser weights to train, as `Backbone.unfreeze` takes them. norms: whether to train
    the normalisation layers among them. steps, lr, weight_decay: of AdamW. clip: upper bound of the gradient's norm,
    None = unbounded.
    """

    lora: LoraSpec | None = None

    def __init__(
        self,
        parameters: Targets,
        steps: TrainingSteps = 200,
        lr: LearningRate = 2e-5,
        weight_decay: NonNegative = 0.01,
        scale: Scale = 2.0,
        norms: bool = False,
        clip: Positive | None = None,
    ) -> None:
        self.parameters = [*parameters, *(() if norms else NORMS)]
        self.steps, self.lr, self.weight_decay, self.scale, self.clip = steps, lr, weight_decay, scale, clip
        self.empty: TextStates | None = None

    @staticmethod
    def passes(settings: Mapping[str, Any], steps: int) -> float:
        """Denoiser passes for each latent: of the teacher for '', the anchor, the name and K = 2 vectors, and a
        gradient."""
        return 5.0 + PASSES_OF_A_GRADIENT

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        self.empty = backbone.encode([""])

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"erase"}; known: as `SearchedRollout` gives it."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        if "erase_states" not in known or self.empty is None:
            raise UserError(
                "method stereo needs the texts of its search: set "
                "method.latents._target_=realera.methods.stereo.SearchedRollout."
            )
        empty = repeat(self.empty, 0, len(latents))

        def noise(states: Tensor, pooled: Tensor | None) -> Tensor:
            texts = TextStates(states, empty.first, empty.last, empty.length, pooled)
            return predict(backbone, latents, timesteps, texts)

        erase, pooled = known["erase_states"], known.get("erase_pooled")
        with torch.no_grad(), backbone.original():
            uncond = noise(empty.states, empty.pooled)
            led = noise(known["anchor_states"], known.get("anchor_pooled")) - uncond
            each = [
                noise(erase[:, i], None if pooled is None else pooled[:, i]) - uncond for i in range(erase.shape[1])
            ]
        target = uncond + (self.scale - 1) * led - (self.scale + 1) * torch.stack(each).mean(0)
        rows = torch.arange(len(latents), device=erase.device), known["prompts"].to(erase.device)
        made = noise(erase[rows], None if pooled is None else pooled[rows])
        return {"erase": mse_loss(made, target)}


def token(backbone: Backbone, name: str, vector: Tensor | None) -> TextStates:
    """The bare name, or the vector (1, D) alone, as a prompt."""
    with torch.no_grad():
        if vector is None:
            return backbone.encode([name])
        return backbone.encode([NamedPrompt.of("{}", name)], vectors=vector)


def erased_texts(backbone: Backbone, name: str, vectors: Sequence[Tensor]) -> TextStates:
    """The K + 1 texts that are erased: the bare name, and each vector alone."""
    texts = token(backbone, name, None)
    for vector in vectors:
        texts = join(texts, token(backbone, name, vector), texts.states.device)
    return texts


@contextmanager
def replaced(weights: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Uses other values of the weights inside this context."""
    now = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = values[name]
        yield
    finally:
        for name, weight in weights.items():
            weight.data = now[name]


@contextmanager
def original_weights_after(backbone: Backbone) -> Iterator[None]:
    """Restores the trainable weights' values at the end."""
    weights = {name: weight for name, weight in backbone.trained.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
                weight.grad = None
