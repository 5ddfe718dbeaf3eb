"""MACE (arXiv 2403.06135): a closed form removes the traces of a concept from the states of other words. A LoRA per
concept then unlearns the concept's own word. A second closed form fuses the LoRAs of all concepts into the weights.

Written from the paper's description. Letters: c the concept, a its anchor, k a row of text states, W0 the original W_K
or W_V of a layer. Shapes: B latents, P prompts, T token rows, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from realera.closed_form import NormalEquations, fuse
from realera.contracts import (
    Backbone,
    Concept,
    Edit,
    LoraSpec,
    Miner,
    NamedPrompt,
    Neighbours,
    Pair,
    Scheduler,
    TrainingBatch,
    UserError,
)
from realera.methods.fmn import Pooler, positions
from realera.methods.latents import TIMESTEPS, at_level, bank_folder, drawn, images_of
from realera.methods.masks import Masks, grid
from realera.methods.priors import Preserved
from realera.methods.texts import need_attention_maps, one_of, predict, repeat
from realera.setting_types import (
    Batch,
    Count,
    Guidance,
    LearningRate,
    NonNegative,
    SamplerSteps,
    Template,
    TrainingSteps,
)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of R, G, B from 0 to 1


class Refinement:
    """Stage 1 (section 4.1): in every training prompt of c, all rows except those of c are mapped to the same rows of
    the anchor's prompt,

        min_W  sum ||W k_c - W0 k_a||^2 + ridge ||W - W0||^2 + terms of the preserved captions,

    one map for all concepts and layers. These are the rows before the concept (including BOS, which is equal in both
    prompts) and the rows after it (end-of-text and pads), cut to the shorter prompt.

    ridge: in squared units of the text states (official: lamb). preserved: caches of preserved captions. scale_squared:
    apply their scale twice, as in the official code. refine: False skips this stage. prompts: the number of prompts per
    concept for which the ridge and the scale were chosen; the P prompts are weighted to count as that number. None = P.
    """

    idle_where: ClassVar = {"refine": False}  # then it erases nothing, but `Fusion` still uses its settings

    def __init__(
        self,
        ridge: NonNegative,
        preserved: Preserved | None = None,
        scale_squared: bool = False,
        refine: bool = True,
        prompts: Count | None = None,
    ) -> None:
        self.ridge = float(ridge)
        self.prompts = prompts
        self.preserved = preserved
        self.scale_squared = scale_squared
        self.refine = refine

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        if not self.refine:
            return Edit()
        sums = NormalEquations(backbone.width)
        count = 0
        for pair in pairs:
            weight = _prompt_weight(self.prompts, pair)
            for prompt in range(len(pair.target.states)):
                c, a = rows_around(pair, prompt)
                sums.add_pairs(pair.target.states[prompt, c], pair.anchor.states[prompt, a], weight)
                count += len(c)
        kept = None if self.preserved is None else self.preserved.gram(backbone, squared=self.scale_squared)
        if kept is not None:
            sums.add_moments(kept, kept)
        solution, info = sums.solve(self.ridge)
        return Edit(map=solution, info={**info, "rows_refined": count, "preserved": float(kept is not None)})


def rows_around(pair: Pair, prompt: int) -> tuple[list[int], list[int]]:
    """The indices of one prompt's rows outside the concept, and of the matching rows of the anchor's prompt."""
    own, other = list[int](), list[int]()
    for c, a in zip(pair.target.encoders(), pair.anchor.encoders(), strict=True):
        if c.begins == c.stop - c.start:
            continue
        (first_c, last_c), (first_a, last_a) = ((int(part.first[prompt]), int(part.last[prompt])) for part in (c, a))
        before = range(c.start, min(first_c, first_a))
        after = range(1, c.stop - max(last_c, last_a))
        own += [*before, *(last_c + i for i in after)]
        other += [*before, *(last_a + i for i in after)]
    return own, other


class ConceptImages:
    """Noised images of the concept, with masks of the concept's area.

    images: number per concept, drawn once by the original model for `prompt`, {} = the concept. chunk: images drawn,
    and stored, at once. scheduler, steps, guidance_scale: of the sampler that draws them; null = the backbone's own.
    batch: z_t per step. importance: timesteps follow `importance_law`, else they are uniform. masks: None = no masks.
    imagenet_norm: replace the drawn latents by `encoded_as_for_imagenet`, as in the official code; the masks are still
    made from the drawn images.
    """

    def __init__(
        self,
        images: Count = 8,
        batch: Batch = 1,
        chunk: Batch = 8,
        prompt: Template = "a photo of the {}",
        scheduler: Scheduler | None = None,
        steps: SamplerSteps | None = None,
        guidance_scale: Guidance | None = None,
        importance: bool = True,
        masks: Masks | None = None,
        imagenet_norm: bool = False,
    ) -> None:
        self.images = images
        self.batch = batch
        self.chunk = chunk
        self.prompt = prompt
        self.sampler: dict[str, Any] = {"scheduler": scheduler, "steps": steps, "guidance_scale": guidance_scale}
        self.probabilities = importance_law() if importance else torch.full((TIMESTEPS,), 1 / TIMESTEPS)
        self.masks = masks
        self.imagenet_norm = imagenet_norm
        self.banks: list[tuple[Tensor, Tensor | None]] = []  # (images, C, h, w) and (images, H, W) bool per concept

    @staticmethod
    def makes(settings: Mapping[str, Any], concepts: Sequence[Concept], steps: int) -> dict[str, float]:
        return images_of(settings, [concept.target for concept in concepts], steps)

    def prepare(self, backbone: Backbone, pairs: Sequence[Pair], cache: Path, seed: int) -> None:
        """Loads every concept's images and masks, and makes those that are not in the cache.

        Raises UserError if the models that make the masks cannot be loaded.
        """
        given = {name: value for name, value in self.sampler.items() if value is not None}
        drawing = (self.images, self.chunk, replace(backbone.sampler, **given), cache, seed)
        names = [pair.concept.target for pair in pairs]
        texts = [backbone.encode([NamedPrompt.of(self.prompt, name)]) for name in names]
        folders = [bank_folder(backbone, states, *drawing) for states in texts]
        if self.masks is not None:
            self.masks.load_for(folders, names)  # before any drawing, because it may fail
        self.banks = []
        for name, states, folder in zip(names, texts, folders):
            bank = drawn(backbone, states, *drawing, f"Images of '{name}'")
            masks = None if self.masks is None else self.masks.kept(backbone, states, bank, name, folder)
            self.banks.append((encoded_as_for_imagenet(backbone, bank) if self.imagenet_norm else bank, masks))
        if self.masks is not None:
            self.masks.unload()

    def __call__(
        self, backbone: Backbone, concept: int, generator: Generator
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """z_t (batch, C, h, w), t (batch,), and {"mask": (batch, H, W) bool} if there are masks."""
        bank, masks = self.banks[concept]
        chosen = torch.randint(len(bank), (self.batch,), generator=generator).to(bank.device)
        levels = torch.multinomial(self.probabilities, self.batch, replacement=True, generator=generator)
        noise = torch.randn(self.batch, *bank.shape[1:], generator=generator).to(bank.device)
        timesteps = at_level(backbone, levels).to(bank.device)
        z_t = backbone.noisy_latents(bank[chosen], noise, timesteps)
        return (z_t, timesteps) if masks is None else (z_t, timesteps, {"mask": masks[chosen]})


def encoded_as_for_imagenet(backbone: Backbone, latents: Tensor) -> Tensor:
    """The latents (images, C, h, w) of the same images, encoded again with pixels normalised by ImageNet's mean and
    standard deviation; the autoencoder expects [-1, 1]. The result is not cached. The official code samples from the
    encoder's distribution; this function takes its mode."""
    mean, deviation = (torch.tensor(value, device=latents.device)[:, None, None] for value in IMAGENET)
    images = backbone.decode(latents).permute(0, 3, 1, 2) / 255
    return backbone.encode_images((images - mean) / deviation)


def importance_law(steepness: float = 0.05, early: int = 200, late: int = 400) -> Tensor:
    """(1000,): p(t) ~ s(steepness (t - early)) - s(steepness (t - late)), s the logistic function (section 4.2).
    Most timesteps are between early and late, where the content of an image is decided."""
    t = torch.arange(TIMESTEPS, dtype=torch.float64)
    law = torch.sigmoid(steepness * (t - early)) - torch.sigmoid(steepness * (t - late))
    return law / law.sum()


class AttentionSuppression:
    """Stage 2 (section 4.2): a LoRA per concept learns to suppress the cross-attention A to the concept's tokens in the
    concept's area of the image,

        L = sum over layers  || A_l[heads, pixels within the mask, tokens of c] ||_F,

    not squared, averaged over the latents. Without a mask all pixels count. A step uses one random training prompt.

    steps: optimiser steps of each concept. lr, weight_decay: of AdamW. lora: one adapter per concept. pooler: the rows
    that count besides the concept's own sub-tokens, as in `fmn.AttentionResteering`.

    Raises UserError for a LoRA that is not per concept.
    """

    parameters = ()  # only the LoRA is trained
    trains_lora = reads_attention = True

    def __init__(
        self,
        steps: TrainingSteps = 50,
        lr: LearningRate = 1e-5,
        weight_decay: NonNegative = 0.01,
        lora: LoraSpec | None = None,
        pooler: Pooler = "pads",
    ) -> None:
        if lora is not None and not lora.per_concept:
            raise UserError("method mace trains one LoRA per concept: set method.align.lora.per_concept=true.")
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.lora = None if lora is None else replace(lora, targets=tuple(lora.targets))  # yaml gives a list
        self.pooler: Pooler = pooler

    def loss(
        self,
        backbone: Backbone,
        pair: Pair,
        mine: Miner | None,
        batch: TrainingBatch,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """{"attention"}. known: "mask" (B, H, W) bool, of any size."""
        latents, timesteps, known = batch.latents, batch.timesteps, batch.known
        need_attention_maps(backbone, "mace")
        texts = repeat(pair.target, one_of(pair.target, generator), len(latents))
        tokens = positions(texts, self.pooler).to(latents.device)
        with backbone.attention() as maps:
            predict(backbone, latents, timesteps, texts)
            norms = [masked_norm(found, tokens, known.get("mask"), latents) for found in maps.values()]
        return {"attention": torch.stack(norms).sum(dim=0).mean()}


def masked_norm(attention: Tensor, tokens: Tensor, mask: Tensor | None, latents: Tensor) -> Tensor:
    """(B,): the Frobenius norm over heads, masked pixels and marked tokens of one layer's map (B, heads, pixels, T).

    tokens (B, T) bool; mask (B, H, W) bool, resized to the layer's grid by nearest neighbour.
    """
    counted = tokens[:, None, None]
    if mask is not None:
        size = grid(attention.shape[2], latents.shape[-2], latents.shape[-1])
        near = interpolate(mask[:, None].float(), size=size, mode="nearest")
        counted = counted & near.bool().flatten(2)[..., None]
    result: Tensor = torch.linalg.vector_norm(torch.where(counted, attention.float(), 0), dim=(1, 2, 3))
    return result


class Fusion:
    """Stage 3 (section 4.3): one W for every layer, whose output on each concept's prompts is that of the concept's own
    LoRA,

        min_W  sum_i sum ||W k - (W1 + dW_i) k||^2 + ridge ||W - W1||^2 + terms of the preserved captions,

    k all rows of concept i's training prompts, W1 the weights after stage 1. The fused weights replace the adapter, so
    drawing has no extra cost. ridge, preserved, prompts: as in `Refinement`; the scale is applied once.

    Raises UserError without a ridge, and for a LoRA on layers other than W_K and W_V.
    """

    def __init__(
        self, ridge: NonNegative | None, preserved: Preserved | None = None, prompts: Count | None = None
    ) -> None:
        if ridge is None:
            raise UserError("method.finish.ridge is missing: give a number of 0 or more.")
        self.ridge = float(ridge)
        self.prompts = prompts
        self.preserved = preserved

    def __call__(self, backbone: Backbone, pairs: Sequence[Pair], neighbours: Sequence[Neighbours]) -> Edit:
        """An empty edit if no LoRA was trained."""
        learnt = changes(backbone.erased_state(), len(pairs))
        if not learnt:
            return Edit()
        layers = backbone.text_projections()
        if other := [name for name in learnt if name not in layers]:
            raise UserError(
                f"The LoRA is on {other[0]}, but only the cross-attention's keys and values can be fused: set "
                "method.align.lora.targets='[attn2.to_k,attn2.to_v]', or method.finish=null."
            )
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        kept = None if self.preserved is None else self.preserved.gram(backbone)
        originals = None
        if kept is not None:
            with backbone.original():
                originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        keys = [pair.target.states.flatten(0, 1).cpu().double() for pair in pairs]
        grams = [_prompt_weight(self.prompts, pair) * (k.T @ k) for pair, k in zip(pairs, keys)]
        fused, info = fuse(weights, learnt, grams, self.ridge, kept, originals)
        return Edit(weights=fused, info={**info, "rows": sum(map(len, keys)), "preserved": float(kept is not None)})


def changes(state: Mapping[str, Tensor], concepts: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """{layer: [(B, A) per concept]} from a backbone's erased state, alpha / rank folded into B; {} without a LoRA."""
    found = {}
    for key, up in state.items():
        if key.startswith("lora.") and key.endswith(".up"):
            stem = key.removesuffix(".up")
            down = state[f"{stem}.down"]
            scale = float(state[f"{stem}.alpha"]) / len(down)
            parts = zip((scale * up).flatten(1).chunk(concepts, dim=1), down.flatten(1).chunk(concepts, dim=0))
            found[stem.removeprefix("lora.")] = list(parts)
    return found


def _prompt_weight(prompts: int | None, pair: Pair) -> float:
    """The weight of one prompt of a concept, so that all of them count as `prompts`; None = 1."""
    return 1.0 if prompts is None else prompts / len(pair.target.states)
