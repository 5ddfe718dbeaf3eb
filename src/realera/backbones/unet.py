"""Stable Diffusion 1.x, 2.x, XL and the miniature: CLIP text encoders, a cross-attention U-Net and a KL autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from realera.backbones import autoencoder, configs, folder, loading, sampling, text_marks
from realera.backbones.base import BaseWeights
from realera.backbones.common import EDIT as EDIT
from realera.backbones.common import ERASER as ERASER
from realera.backbones.common import LORA as LORA
from realera.backbones.common import DiffusersBackbone
from realera.backbones.denoiser import DTYPES, Attention, Denoiser, Dtype
from realera.backbones.loading import Rows, TextFigures
from realera.backbones.text import PairedTextEncoder, TextEncoder
from realera.contracts import Course, Guide, Read, Sampler, TextStates, UserError
from realera.setting_types import Checkpoint, Label


class UNetBackbone(DiffusersBackbone):
    """`contracts.Backbone` for a diffusers folder or hub id; `pretrained` None is the built-in miniature.

    dtype: of the U-Net's weights: "float32", "bfloat16" (an adapter can be trained, the weights cannot) or "float16"
    (generates images, cannot be trained); text states, latents and the autoencoder are float32. text: width and
    max_length are compared with the checkpoint; row_norm is only used to check the config. text_length: rows T, None =
    the tokenizer's limit. attention, compile: see `Denoiser`. gradient_checkpointing: recompute a block's activations
    for the gradient instead of storing them. vae_slicing: decode and encode images one by one. vae_tiling: use
    overlapping tiles, whose seams may be faintly visible.

    Raises UserError for bad settings, and for a checkpoint that is missing, torn, or does not match `text`.
    """

    text: TextEncoder | PairedTextEncoder
    _denoise: Denoiser
    joint_attention = False

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
        self._init_from_parts(parts, name, sampler, text, text_length, attention, compile)

    def _init_from_parts(
        self,
        parts: loading.Parts,
        name: str,
        sampler: Sampler,
        text: TextFigures | None,
        text_length: int | None = None,
        attention: Attention = "auto",
        compile: bool | str = False,
    ) -> None:
        """Initialises the backbone from loaded components; the other arguments are the constructor's."""
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
        if not self._base.readers:
            raise UserError(f"The U-Net of backbone {name} has no attn2.to_k / attn2.to_v; give a text-to-image U-Net.")
        self._denoise = Denoiser(parts.unet, attention, compile, self.pixels_per_latent, name)
        self._schedule = sampling.NoiseSchedule(self.scheduler_config)
        self._zeros = parts.xl and parts.zeros_for_no_prompt
        self._init_weights(parts.text_models)

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @cached_property
    def fingerprint(self) -> str:
        """Content id of weights, configuration, tokenizer and text length; reads all weights on first use."""
        return folder.fingerprint(self.folder, text_length=self.max_length)

    @cached_property
    def _text_as_loaded(self) -> str:
        return folder.fingerprint(self.folder, text_length=self.max_length, only_text=True)

    def text_marks(self) -> dict[str, str]:
        """See `backbones.text_marks`; reads the text encoders' files."""
        return text_marks.of_folder(self.folder)

    def text_readers(self, read: Read = "values") -> list[Tensor]:
        return [layer.weight for layer in self.text_projections(read).values()]

    def attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        return self._denoise.recorded()

    # --- noise -------------------------------------------------------------------------------------------------------

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) latents + sqrt(1 - abar_t) noise; timesteps (B,) in 0 .. 999 of the training schedule."""
        return self._schedule.noised(latents, noise, timesteps)

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The noise prediction (B, C, h, w) float32, with gradients; timesteps (B,) or (), pooled (B, E) if the U-Net
        takes one (SDXL).

        The output of a v-prediction checkpoint is converted to noise, so a loss on the noise weights the timesteps as
        it does for a checkpoint that predicts noise.
        """
        out = self._denoise(latents, timesteps, states, pooled)
        return self._schedule.noise_of(out, latents.to(out), timesteps)

    def target_of(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    # --- images ------------------------------------------------------------------------------------------------------

    def timesteps(self, sampler: Sampler | None = None) -> Tensor:
        """(steps,) int64, falling: the training timestep of each step; `sample(stop_at=i)` ends at timestep [i]."""
        result: Tensor = sampling.scheduler_for(sampler or self.sampler, self.scheduler_config).timesteps.clone()
        return result

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """(count,) int64, uniform in 0 .. 999."""
        return torch.randint(configs.TIMESTEPS, (count,), generator=generator)

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """int64: the nearest timesteps in 0 .. 999 to 1000 levels."""
        return (levels.double() * configs.TIMESTEPS).round().long().clamp(0, configs.TIMESTEPS - 1)

    @torch.no_grad()
    def sample(
        self,
        states: TextStates,
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        stop_at: int | None = None,
        negative: str = "",
        each_step: Callable[[int], None] | None = None,
        course: Course | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) float32; see `sampling.sample`. Raises UserError for a sampler or course that cannot
        run, and for latents that are not finite."""
        chosen, course = sampler or self.sampler, course or sampling.USUAL
        sampling.refuse_bad(chosen, self.pixels_per_latent)
        sampling.refuse_call(course, chosen, len(states.states), seeds, stop_at)
        size = self._latent_size(chosen)
        beside = self.encode(guide.prompts) if guide is not None and guide.prompts else None
        noise = sampling.SeededNoise(seeds, size)
        drawn = sampling.sample(
            self._denoise.with_cached_text(),
            self._schedule,
            sampling.scheduler_for(chosen, self.scheduler_config),
            lambda: noise().to(self.device),
            sampling.here(states, self.device),
            sampling.here(self.encode([negative]) if negative else self._no_prompt(), self.device),
            chosen.guidance_scale,
            guide,
            beside,
            stop_at,
            each_step,
            course,
        )
        sampling.refuse_not_finite(drawn, seeds, self._base.dtype)
        return drawn

    def _encoded_empty(self) -> TextStates:
        """The encoded empty text, or zeros if SDXL's index says so."""
        empty = super()._encoded_empty()
        if self._zeros and empty.pooled is not None:
            return replace(empty, states=torch.zeros_like(empty.states), pooled=torch.zeros_like(empty.pooled))
        return empty
