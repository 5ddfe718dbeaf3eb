"""Stable Diffusion 3 and 3.5, FLUX.1, the built-in transformer: joint attention of text and image, flow matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn

from realera.backbones import (
    autoencoder,
    fitting,
    flow,
    folder,
    kinds,
    reading,
    sampling,
    text_marks,
    transformer_parts,
)
from realera.backbones.base import BaseWeights
from realera.backbones.common import DiffusersBackbone
from realera.backbones.denoiser import DTYPES, Dtype
from realera.backbones.loading import Rows, TextFigures
from realera.backbones.mmdit import PACK, BlockOffload, JointDenoiser
from realera.backbones.reading import Reading
from realera.backbones.transformer_parts import T5, TransformerParts
from realera.contracts import JOINT, Course, Guide, Read, Sampler, TextStates, UserError
from realera.setting_types import Checkpoint, Label

Own = TypeVar("Own", bound="TransformerBackbone")
Offload = Literal["none", "sequential"]


class TransformerBackbone(DiffusersBackbone):
    """`contracts.Backbone` for a diffusers folder or hub id; `pretrained` "mini-dit" is the built-in transformer.

    Timesteps are noise levels sigma in (0, 1], and `predict_noise` is the velocity noise - x (see `flow`). All rows of
    the text pass one layer, context_embedder, which closed forms edit: W_ctx <- W_ctx M. The pooled text state, which
    the network reads besides the rows, is not edited.

    like: names under which methods and tasks look up their defaults for this backbone, after its own name and before
    `default`; one of them must be the checkpoint's kind, "sd3" or "flux". dtype: of the transformer's weights; text
    states, latents and the autoencoder are float32. text: width and max_length are compared with the checkpoint. t5:
    precision of the T5 encoder; int8 = weights of eight bits; False = left out, as rows of zeros (Stable Diffusion 3
    only); None = bfloat16 if there is one. t5_length: its token rows; None = 256, FLUX 512. reading: what
    `text_readers` returns, see `reading`. offload: "sequential" = only one block's weights are on the GPU at a time;
    it turns gradient checkpointing on. gradient_checkpointing, vae_slicing, vae_tiling: as in `UNetBackbone`.

    Raises UserError for bad settings, and for a checkpoint that is missing, torn, or does not match them.
    """

    _denoise: JointDenoiser
    _offload: BlockOffload | None = None
    joint_attention = True  # text and image attend to each other in one softmax: there are no cross-attention maps

    def __init__(
        self,
        name: Label,
        pretrained: Checkpoint,
        sampler: Sampler,
        like: Sequence[Label],
        dtype: Dtype = "float32",
        text: TextFigures | None = None,
        t5: T5 | None = None,
        t5_length: Rows | None = None,
        reading: Reading = "first",
        offload: Offload = "none",
        gradient_checkpointing: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"backbone.dtype={dtype!r} is not known; choose among {', '.join(DTYPES)}.")
        self.folder = folder.locate(pretrained)
        parts = transformer_parts.load(self.folder, DTYPES[dtype], t5)
        if gradient_checkpointing or offload == "sequential":
            parts.transformer.enable_gradient_checkpointing()
        if vae_tiling:
            parts.vae.enable_tiling()
        self.vae_slicing = vae_slicing
        self._init_from_parts(parts, name, sampler, like, text, t5_length, reading)
        self._without = "text_encoder_3" if t5 is False else ""
        self._t5 = "" if parts.t5 is None else f" t5 {t5 or 'bfloat16'}"
        if offload == "sequential":
            self._offload = BlockOffload(self.network)

    def _init_from_parts(
        self,
        parts: TransformerParts,
        name: str,
        sampler: Sampler,
        like: Sequence[str],
        text: TextFigures | None = None,
        t5_length: int | None = None,
        reading: Reading = "first",
    ) -> None:
        """Initialises the backbone from loaded components; the other arguments are the constructor's."""
        self.name = name
        self.sampler = sampler
        self.flux = parts.kind == kinds.FLUX
        fitting.refuse_other_kind(parts.kind, like)
        self.network: nn.Module = parts.transformer
        self.text = transformer_parts.text_encoder(parts, t5_length)
        self.vae = parts.vae
        self.width, self.max_length = self.text.width, self.text.length
        fitting.refuse_other_text(dict(text or {}), {"width": self.width, "max_length": self.max_length})
        self.latent_channels = int(parts.vae.config.latent_channels)
        self.pixels_per_latent = autoencoder.pixels_per_latent(parts.vae)
        self.patch = self.pixels_per_latent * (PACK if self.flux else int(parts.transformer.config.patch_size))
        sampling.refuse_bad(sampler, self.patch, ("euler",))
        self._base = BaseWeights(self.network, name, JOINT)
        self._denoise = JointDenoiser(self.network, self.flux, name)
        self._schedule = flow.FlowSchedule(parts.scheduler_config, self.patch, even=self.flux)
        self._reading: Reading = reading
        self._init_weights(parts.text_models)

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    @property
    def device(self) -> torch.device:
        return self._base.parameters[f"{JOINT}.weight"].device

    @cached_property
    def fingerprint(self) -> str:
        """Content id of weights, configuration, tokenizers, T5's precision and the text length."""
        return folder.fingerprint(self.folder, self.max_length, also=self._t5, without=self._without)

    @cached_property
    def _text_as_loaded(self) -> str:
        return folder.fingerprint(self.folder, self.max_length, True, also=self._t5, without=self._without)

    def text_marks(self) -> dict[str, str]:
        """See `backbones.text_marks`; reads the text encoders' files."""
        return text_marks.of_folder(self.folder, self._without)

    def text_readers(self, read: Read = "values") -> list[Tensor]:
        """See `reading.readers`."""
        if self._reading == "embedder":
            return [layer.weight for layer in self.text_projections(read).values()]
        return reading.readers(self, self.network, read, self._reading)

    def attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        raise UserError(
            f"Backbone {self.name} has no cross-attention maps: text and image attend to each other in one softmax, "
            "and after the first block a row of the text no longer stands for its word alone. Choose a method without "
            "attention maps, such as realera, esd-x or uce."
        )

    def _refuse_erasers(self) -> None:
        raise UserError(
            f"Erasers stand behind cross-attention modules, and backbone {self.name} has none: text and image attend "
            "to each other in one softmax. Choose a method such as realera, esd-x or uce."
        )

    @torch.inference_mode(False)
    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        if self._offload is not None and self.trained is self.network:
            raise UserError(
                "backbone.offload=sequential keeps the transformer's weights in the CPU's memory, where they cannot be "
                "trained: choose a method that trains a LoRA or none, or set backbone.offload=none."
            )
        return super().unfreeze(targets)

    # --- noise -------------------------------------------------------------------------------------------------------

    def noisy_latents(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) latents + sigma noise; timesteps: sigma (B,)."""
        return flow.noised(latents, noise, timesteps)

    def predict_noise(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The velocity (B, C, h, w) float32, with gradients; timesteps: sigma (B,) or (). FLUX dev reads the guidance
        scale of the backbone's sampler."""
        return self._denoise(latents, timesteps, states, pooled, self.sampler.guidance_scale)

    def target_of(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def timesteps(self, sampler: Sampler | None = None) -> Tensor:
        """(steps,) float32, falling: sigma of each step."""
        return self._schedule.sigmas(sampler or self.sampler)[:-1]

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """(count,) float32; see `FlowSchedule.draw`."""
        return self._schedule.draw(count, self.sampler, generator)

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """float32; see `FlowSchedule.at`."""
        return self._schedule.at(levels, self.sampler)

    # --- images ------------------------------------------------------------------------------------------------------

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
        """Latents (B, C, h, w) float32; see `flow.sample`. FLUX dev reads the guidance scale as an input, so its
        prediction is guided already: there is no second pass for the empty prompt, and a guide gets the scale 1.

        Raises UserError for a sampler or course that cannot run, for a negative prompt that nothing reads, and for
        latents that are not finite.
        """
        chosen, course = sampler or self.sampler, course or sampling.USUAL
        sampling.refuse_bad(chosen, self.patch, ("euler",))
        sampling.refuse_call(course, chosen, len(states.states), seeds, stop_at)
        scale = 1.0 if self._denoise.reads_guidance else chosen.guidance_scale
        guided = guide is not None or scale > 1
        if negative and not guided:
            raise UserError(
                f"A negative prompt has no effect with backbone {self.name}, which predicts no noise without a prompt: "
                "leave it out."
            )
        size = self._latent_size(chosen)
        nothing = None
        if guided:
            nothing = sampling.here(self.encode([negative]) if negative else self._no_prompt(), self.device)
        drawn = flow.sample(
            lambda z, sigma, text, pooled: self._denoise(z, sigma, text, pooled, chosen.guidance_scale),
            self._schedule.sigmas(chosen),
            sampling.start_noise(seeds, size).to(self.device),
            sampling.here(states, self.device),
            nothing,
            scale,
            guide,
            sampling.here(self.encode(guide.prompts), self.device) if guide is not None and guide.prompts else None,
            stop_at,
            each_step,
            course,
        )
        sampling.refuse_not_finite(drawn, seeds, self._base.dtype)
        return drawn

    def to(self: Own, device: Any) -> Own:
        """Moves the transformer; with offload=sequential, all of it but the blocks' weights."""
        if self._offload is not None:
            self._offload.to(self.network, device)
        else:
            self.network.to(device)
        return self
