"""Stable Diffusion 1.x, 2.x, XL and the miniature: CLIP text encoders, a cross-attention U-Net and a KL autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from realera.backbones import adapters, autoencoder, folder, loading, sampling
from realera.backbones.base import BaseWeights
from realera.backbones.denoiser import DTYPES, Attention, Denoiser, Dtype
from realera.backbones.loading import Rows, TextFigures
from realera.contracts import Edit, Guide, LoraSpec, NamedPrompt, Sampler, TextStates, UserError
from realera.files import finite
from realera.setting_types import Checkpoint, Label

EDIT, LORA = "edit.", "lora."


class UNetBackbone:
    """`contracts.Backbone` over a diffusers folder or hub id; `pretrained` None is the built-in miniature.

    dtype: of the U-Net's weights, "float32", "bfloat16" (they cannot be trained, an adapter on them can) or "float16"
    (draws images, cannot be trained); text states, latents and the autoencoder are float32. text: the width and
    max_length that the config promises are held against the checkpoint (its row_norm serves the config's own checks).
    text_length: rows T, None = the tokenizer's limit. attention, compile: see `Denoiser`. gradient_checkpointing: a
    block's activations are computed again for the gradient instead of kept. vae_slicing: images are decoded, and
    encoded, one by one; vae_tiling: and in overlapping tiles, which shows faintly. Raises UserError for bad settings
    and for a checkpoint that is missing, torn, or not what `text` promises.
    """

    def __init__(
        self,
        name: Label,
        pretrained: Checkpoint | None,
        sampler: Sampler,
        dtype: Dtype = "float32",
        text: TextFigures | None = None,
        text_length: Rows | None = None,
        attention: Attention = "auto",
        channels_last: bool = False,
        compile: bool | Label = False,
        gradient_checkpointing: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"backbone.dtype={dtype!r} is not known; choose among {', '.join(DTYPES)}.")
        self.folder = folder.locate(pretrained)
        parts = loading.load(self.folder, DTYPES[dtype], channels_last)
        if gradient_checkpointing:
            parts.unet.enable_gradient_checkpointing()
        if vae_tiling:
            parts.vae.enable_tiling()
        self.vae_slicing = vae_slicing
        self._take(parts, name, sampler, text, text_length, attention, compile)

    def _take(
        self,
        parts: loading.Parts,
        name: str,
        sampler: Sampler,
        text: TextFigures | None,
        text_length: int | None = None,
        attention: Attention = "auto",
        compile: bool | str = False,
    ) -> None:
        """Makes the backbone of a checkpoint's components; the arguments are the constructor's."""
        self.name = name
        self.sampler = sampler
        self.text = loading.text_encoder(parts, text_length)
        self.unet: nn.Module = parts.unet
        self.vae = parts.vae
        self.scheduler_config = parts.scheduler_config
        self.width, self.max_length = self.text.width, self.text.length
        loading.refuse_other_text(name, dict(text or {}), self.text, parts.unet.config)
        self.latent_channels = int(parts.unet.config.in_channels)
        self.pixels_per_latent = autoencoder.pixels_per_latent(parts.vae)
        sampling.refuse_bad(sampler, self.pixels_per_latent)
        self._base = BaseWeights(self.unet, name)
        if not self._base.cross_attention:
            raise UserError(f"The U-Net of backbone {name} has no attn2.to_k / attn2.to_v; give a text-to-image U-Net.")
        self._denoise = Denoiser(parts.unet, attention, compile, self.pixels_per_latent, name)
        self._schedule = sampling.NoiseSchedule(self.scheduler_config)
        self._zeros = parts.xl and parts.zeros_for_no_prompt
        self._depth = 0  # of nested original()
        self._empty: TextStates | None = None

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @cached_property
    def fingerprint(self) -> str:
        """Content id of weights, configuration, tokenizer and text length; reads all weights on first use."""
        return folder.fingerprint(self.folder, text_length=self.max_length)

    @cached_property
    def text_fingerprint(self) -> str:
        """Content id of what the text states depend on: text encoders, tokenizers and text length."""
        return folder.fingerprint(self.folder, text_length=self.max_length, only_text=True)

    @property
    def device(self) -> torch.device:
        """Where the U-Net is now: a trainer may move it by itself, and everything else follows it."""
        return next(self.unet.parameters()).device

    # --- text --------------------------------------------------------------------------------------------------------

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """See `TextEncoder.__call__` and, for vectors, `with_vectors`; on the U-Net's device, in float32 always."""
        device = self.device
        self.text.to(device)
        with torch.autocast(device.type, enabled=False):
            if vectors is None:
                return self.text(texts, to_end)
            return self.text.with_vectors(texts, vectors.to(device))

    def refuse_cut(self, prompts: Sequence[NamedPrompt]) -> None:
        """See `TextEncoder.rows`."""
        for prompt in prompts:
            self.text.rows(prompt)

    def token_vectors(self, text: str) -> Tensor:
        return self.text.vectors(text)

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        return self.text.tokens(texts)

    def words(self) -> list[str]:
        return self.text.words()

    # --- weights -----------------------------------------------------------------------------------------------------

    def text_projections(self) -> dict[str, nn.Linear]:
        return dict(self._base.cross_attention)

    @torch.inference_mode(False)  # weights made in inference mode could never be trained
    @torch.no_grad()
    def apply(self, edit: Edit) -> None:
        """Folds W = W @ map (in float64, then rounded once) or the given weights; a second edit lands on the first."""
        self._refuse_inside_original()
        self._base.apply(edit)

    @contextmanager
    def original(self, edited: bool = False) -> Iterator[None]:
        """The model as loaded, adapters off, and no gradients recorded: they would be taken through the wrong weights.

        edited: the base weights stay. May be nested (the outermost decides), and an exception leaves all as it was.
        """
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                weights = nullcontext() if edited else self._base.swapped()
                with torch.no_grad(), adapters.disabled(self.unet), weights:
                    yield
        finally:
            self._depth -= 1

    @torch.inference_mode(False)
    def add_adapter(self, spec: LoraSpec, generator: Generator, concepts: int = 1) -> list[nn.Parameter]:
        """See `adapters.add`; in float32 whatever the U-Net's dtype, and one at a time."""
        self._refuse_inside_original()
        self._base.refuse_adapting_float16()
        if adapters.layers(self.unet):
            raise RuntimeError("an adapter is in place: call merge_adapter() or remove_adapter() first")
        return adapters.add(self.unet, spec, generator, self.name, concepts)

    def adapter_scale(self, scale: Tensor) -> AbstractContextManager[None]:
        """See `adapters.scaled`."""
        return adapters.scaled(self.unet, scale)

    @torch.inference_mode(False)
    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        """Makes the U-Net's own weights trainable, for methods without LoRA; see `BaseWeights.unfreeze`."""
        self._refuse_inside_original()
        return self._base.unfreeze(targets)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Folds (alpha / rank) B A into the base weights and takes the adapter away; images change by rounding only."""
        self._refuse_inside_original()
        deltas = adapters.deltas(self.unet)
        adapters.remove(self.unet)
        parameters = self._base.parameters
        self._base.set(
            {f"{n}.weight": parameters[f"{n}.weight"].double() + delta.double() for n, delta in deltas.items()}
        )

    def remove_adapter(self) -> None:
        """Takes the adapter away, unmerged."""
        self._refuse_inside_original()
        adapters.remove(self.unet)

    def erased_state(self) -> dict[str, Tensor]:
        """{"edit.<layer>.weight": changed base weight, "lora.<layer>.down|up|alpha": adapter}, copies on the CPU."""
        self._refuse_inside_original()
        state = {EDIT + name: value for name, value in self._base.changed().items()}
        return state | {LORA + name: value for name, value in adapters.state(self.unet).items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_erased(self, state: Mapping[str, Tensor]) -> None:
        """The original model plus exactly `state`: what was applied before is undone. Nothing of it is trainable.

        Raises UserError for a state of another model or one that is not finite, and is then the original.
        """
        self._refuse_inside_original()
        adapters.remove(self.unet)
        self._base.restore()
        if unknown := [key for key in state if not key.startswith((EDIT, LORA))]:
            raise UserError(
                f"The erased weights hold {unknown[0]!r}, which is no edit and no LoRA; give an erased.safetensors."
            )
        finite.refuse(state, "The erased weight", "erase again, with a larger ridge or a lower method.align.lr")
        try:
            self._base.set({key.removeprefix(EDIT): value for key, value in state.items() if key.startswith(EDIT)})
            lora = {key.removeprefix(LORA): value for key, value in state.items() if key.startswith(LORA)}
            adapters.load(self.unet, lora, self.name)
        except UserError:
            self._base.restore()
            raise

    def _refuse_inside_original(self) -> None:
        if self._depth:
            raise RuntimeError("inside original() the weights are on loan: leave it first")

    def attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        return self._denoise.recorded()

    @property
    def passes(self) -> int:
        """Images that went through the U-Net so far, the teacher's and the unconditional ones included."""
        return self._denoise.passes

    # --- noise -------------------------------------------------------------------------------------------------------

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) latents + sqrt(1 - abar_t) noise; timesteps (B,) in 0 .. 999 of the training schedule."""
        return self._schedule.noised(latents, noise, timesteps)

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The noise (B, C, h, w) float32 that the U-Net sees, gradients recorded; timesteps (B,) or (), pooled (B, E)
        where the U-Net takes one (SDXL).

        A checkpoint that predicts v is asked for v, which is then turned into noise: a loss on the noise weighs its
        timesteps as it does for one that predicts noise.
        """
        out = self._denoise(latents, timesteps, states, pooled)
        return self._schedule.noise_of(out, latents.to(out), timesteps)

    # --- images ------------------------------------------------------------------------------------------------------

    def timesteps(self, sampler: Sampler | None = None) -> Tensor:
        """(steps,) int64, falling: the training timestep of each step; `sample(stop_at=i)` ends at noise level [i]."""
        return sampling.scheduler_for(sampler or self.sampler, self.scheduler_config).timesteps.clone()

    @torch.no_grad()
    def sample(
        self,
        states: TextStates,
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        stop_at: int | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32; see `sampling.sample`. Raises UserError for a sampler that cannot run, and for
        latents that are not finite."""
        chosen = sampler or self.sampler
        sampling.refuse_bad(chosen, self.pixels_per_latent)
        if len(seeds) != len(states.states):
            raise ValueError(f"{len(states.states)} prompts but {len(seeds)} seeds")
        if stop_at is not None and not 0 <= stop_at <= chosen.steps:
            raise ValueError(f"stop_at={stop_at} is not among the steps 0 .. {chosen.steps}")
        size = (self.latent_channels, chosen.height // self.pixels_per_latent, chosen.width // self.pixels_per_latent)
        beside = self.encode(guide.prompts) if guide is not None and guide.prompts else None
        drawn = sampling.sample(
            self._denoise.of_same_texts(),
            self._schedule,
            sampling.scheduler_for(chosen, self.scheduler_config),
            sampling.start_noise(seeds, size).to(self.device),
            sampling.here(states, self.device),
            sampling.here(self._no_prompt(), self.device),
            chosen.guidance_scale,
            guide,
            beside,
            stop_at,
        )
        sampling.refuse_not_finite(drawn, seeds, self._base.dtype)
        return drawn

    def _no_prompt(self) -> TextStates:
        """What guidance leads away from (1 prompt): the encoded empty text, or zeros where SDXL's index says so."""
        if self._empty is None:  # the text encoder is never edited, so one serves all
            empty = self.encode([""])
            if self._zeros and empty.pooled is not None:
                empty = replace(empty, states=torch.zeros_like(empty.states), pooled=torch.zeros_like(empty.pooled))
            self._empty = empty
        return self._empty

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents, self.vae_slicing)

    def encode_images(self, images: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, images, self.vae_slicing)

    def generate(
        self, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler | None = None, guide: Guide | None = None
    ) -> Tensor:
        """uint8 (B, H, W, 3), all B at once: the caller chooses how many fit."""
        with nullcontext() if guide is None else guide.around(self, texts):
            latents = self.sample(self.encode(texts), seeds, sampler, guide)
        return self.decode(latents)

    # --- devices -----------------------------------------------------------------------------------------------------

    def to(self, device: Any) -> UNetBackbone:
        """Moves the U-Net; text encoder and autoencoder follow when they are next used."""
        self.unet.to(device)
        return self

    def park(self) -> None:
        """Text encoders and autoencoder to the CPU until they are used: the training loop needs none."""
        self.text.to("cpu")
        self.vae.to("cpu")
