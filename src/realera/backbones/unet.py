"""Stable Diffusion 1.x, 2.x, XL and the miniature: CLIP text encoders, a cross-attention U-Net and a KL autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from realera.backbones import adapters, autoencoder, configs, erasers, folder, loading, sampling, text_marks
from realera.backbones.base import BaseWeights
from realera.backbones.changed_text import ChangedText
from realera.backbones.denoiser import DTYPES, Attention, Denoiser, Dtype
from realera.backbones.loading import Rows, TextFigures
from realera.contracts import (
    Adapter,
    Course,
    Edit,
    EraserSpec,
    Guide,
    NamedPrompt,
    Network,
    Sampler,
    TextStates,
    UserError,
)
from realera.files import finite
from realera.setting_types import Checkpoint, Label

EDIT, LORA, ERASER = "edit.", "lora.", "eraser."


class UNetBackbone:
    """`contracts.Backbone` for a diffusers folder or hub id; `pretrained` None is the built-in miniature.

    dtype: of the U-Net's weights: "float32", "bfloat16" (an adapter can be trained, the weights cannot) or "float16"
    (generates images, cannot be trained); text states, latents and the autoencoder are float32. text: width and
    max_length are compared with the checkpoint; row_norm is only used to check the config. text_length: rows T, None =
    the tokenizer's limit. attention, compile: see `Denoiser`. gradient_checkpointing: recompute a block's activations
    for the gradient instead of storing them. vae_slicing: decode and encode images one by one. vae_tiling: use
    overlapping tiles, whose seams may be faintly visible.

    Raises UserError for bad settings, and for a checkpoint that is missing, torn, or does not match `text`.
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
        if not self._base.cross_attention:
            raise UserError(f"The U-Net of backbone {name} has no attn2.to_k / attn2.to_v; give a text-to-image U-Net.")
        self._denoise = Denoiser(parts.unet, attention, compile, self.pixels_per_latent, name)
        self._schedule = sampling.NoiseSchedule(self.scheduler_config)
        self._zeros = parts.xl and parts.zeros_for_no_prompt
        self._depth = 0  # nesting level of original()
        self._changed_text = ChangedText(parts.text_models, name)
        self._trained: nn.Module = self.unet
        self._empty: dict[str, TextStates] = {}  # states of the empty prompt, by the state of the text encoders

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def trained(self) -> nn.Module:
        return self._trained

    def choose(self, network: Network) -> None:
        self._trained = self._changed_text.network if network == "text_encoder" else self.unet

    @cached_property
    def fingerprint(self) -> str:
        """Content id of weights, configuration, tokenizer and text length; reads all weights on first use."""
        return folder.fingerprint(self.folder, text_length=self.max_length)

    @property
    def text_fingerprint(self) -> str:
        """Content id of what the text states depend on now: text encoders with their changes, tokenizers, length."""
        return self._changed_text.fingerprint(self._text_as_loaded)

    @cached_property
    def _text_as_loaded(self) -> str:
        return folder.fingerprint(self.folder, text_length=self.max_length, only_text=True)

    def text_marks(self) -> dict[str, str]:
        """See `backbones.text_marks`; reads the text encoders' files."""
        return text_marks.of_folder(self.folder)

    @property
    def device(self) -> torch.device:
        """The U-Net's current device. A trainer may move the U-Net; everything else follows it."""
        return next(self.unet.parameters()).device

    # --- text --------------------------------------------------------------------------------------------------------

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """See `TextEncoder.__call__`, and `with_vectors` for vectors; on the U-Net's device, always in float32. With
        gradients for text encoders that are trained."""
        device = self.device
        self.text.to(device)
        with torch.autocast(device.type, enabled=False):
            if vectors is None:
                return self.text(texts, to_end, self._changed_text.state)
            return self.text.with_vectors(texts, vectors.to(device))

    def check_not_truncated(self, prompts: Sequence[NamedPrompt]) -> None:
        """See `TextEncoder.rows`."""
        for prompt in prompts:
            self.text.rows(prompt)

    def token_vectors(self, text: str) -> Tensor:
        return self.text.vectors(text)

    def tokens(self, texts: Sequence[str]) -> list[set[int]]:
        return self.text.tokens(texts)

    def words(self) -> list[str]:
        return self.text.words()

    def token_embeddings(self) -> Tensor:
        """See `attack_contract.HasTokens`, also for the next three."""
        self.text.to(self.device)
        return self.text.token_embeddings()

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.text.token_ids(texts)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.text.text_of(ids)

    def writable_tokens(self) -> list[int]:
        return self.text.writable_tokens()

    # --- weights -----------------------------------------------------------------------------------------------------

    def text_projections(self) -> dict[str, nn.Linear]:
        return dict(self._base.cross_attention)

    @torch.inference_mode(False)  # weights made in inference mode could never be trained
    @torch.no_grad()
    def apply(self, edit: Edit) -> None:
        """Applies W = W @ map (in float64, then rounded once) or the given weights, on top of earlier edits."""
        self._refuse_inside_original()
        self._base.apply(edit)

    @contextmanager
    def original(self, edited: bool = False) -> Iterator[None]:
        """The model as loaded, without adapters, inside this context. Gradients are off: they would be those of other
        weights.

        edited: keep the edited base weights. Contexts may be nested; the outermost one decides.
        """
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                with ExitStack() as stack:
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(adapters.disabled(self.unet))
                    stack.enter_context(erasers.disabled(self.unet))
                    stack.enter_context(self._changed_text.original(edited))
                    stack.enter_context(nullcontext() if edited else self._base.swapped())
                    yield
        finally:
            self._depth -= 1

    @torch.inference_mode(False)
    def add_adapter(self, spec: Adapter, generator: Generator, concepts: int = 1) -> list[nn.Parameter]:
        """See `adapters.add` and `erasers.add`. The adapter is float32 for every dtype of the U-Net. Only one adapter
        is allowed, and erasers only behind the U-Net's attention."""
        self._refuse_inside_original()
        self._base.refuse_adapting_float16()
        if adapters.layers(self.unet) or adapters.layers(self._changed_text.network) or erasers.found(self.unet):
            raise RuntimeError("an adapter is in place: call merge_adapter() or remove_adapter() first")
        if isinstance(spec, EraserSpec):
            return erasers.add(self.unet, spec, generator)
        self._forget_text()
        return adapters.add(self.trained, spec, generator, self.name, concepts)

    def adapter_scale(self, scale: Tensor) -> AbstractContextManager[None]:
        """See `adapters.scaled`."""
        return adapters.scaled(self.unet, scale)

    def eraser_outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        """See `erasers.outputs`."""
        return erasers.outputs(self.unet)

    @torch.inference_mode(False)
    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        """Makes the network's own weights trainable, for methods without a LoRA; see `BaseWeights.unfreeze`."""
        self._refuse_inside_original()
        if self.trained is self.unet:
            return self._base.unfreeze(targets)
        self._forget_text()
        return self._changed_text.base.unfreeze(targets)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_adapter(self) -> None:
        """Adds (alpha / rank) B A to the base weights and removes the adapter; images change only by rounding. Erasers
        stay: they cannot be merged."""
        self._refuse_inside_original()
        self._forget_text()
        self._base.merge(adapters.taken(self.unet))
        self._changed_text.base.merge(adapters.taken(self._changed_text.network))

    def remove_adapter(self) -> None:
        """Removes the adapter without merging it."""
        self._refuse_inside_original()
        self._forget_text()
        adapters.remove(self.unet)
        adapters.remove(self._changed_text.network)
        erasers.remove(self.unet)

    def erased_state(self) -> dict[str, Tensor]:
        """{"edit.<layer>.weight": changed base weight, "lora.<layer>.down|up|alpha": adapter,
        "eraser.<attn2>.down.weight ...": eraser}, copies on the CPU. Layers of a text encoder begin with the name of
        its folder."""
        self._refuse_inside_original()
        changed = {**self._base.changed(), **self._changed_text.base.changed()}
        lora = {**adapters.state(self.unet), **self._changed_text.adapter_state()}
        return {
            **{EDIT + name: value for name, value in changed.items()},
            **{LORA + name: value for name, value in lora.items()},
            **{ERASER + name: value for name, value in erasers.state(self.unet).items()},
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_erased(self, state: Mapping[str, Tensor]) -> None:
        """Restores the original model and applies `state` to it. Nothing is trainable afterwards.

        Raises UserError for a state of another model and for one that is not finite; the model is then the original.
        """
        self._refuse_inside_original()
        self._restore()
        if unknown := [key for key in state if not key.startswith((EDIT, LORA, ERASER))]:
            raise UserError(
                f"The erased weights contain {unknown[0]!r}, which is neither an edit nor an adapter; give an "
                "erased.safetensors."
            )
        finite.refuse(state, "The erased weight", "erase again, with a larger ridge or a lower method.align.lr")
        edit, lora, eraser = (
            {key.removeprefix(kind): value for key, value in state.items() if key.startswith(kind)}
            for kind in (EDIT, LORA, ERASER)
        )
        text_edit, text_lora = self._changed_text.own(edit), self._changed_text.own(lora)
        try:
            self._base.set({name: value for name, value in edit.items() if name not in text_edit})
            self._changed_text.base.set(text_edit)
            adapters.load(self.unet, {n: value for n, value in lora.items() if n not in text_lora}, self.name)
            self._changed_text.load_adapter(text_lora)
            erasers.load(self.unet, eraser, self.name)
        except UserError:
            self._restore()
            raise

    def _restore(self) -> None:
        """The model as loaded, without adapters."""
        self.remove_adapter()
        self._base.restore()
        self._changed_text.base.restore()

    def _forget_text(self) -> None:
        """No text state is used again: the text encoders change now, or may have."""
        self.text.forget()
        self._empty = {}

    def _refuse_inside_original(self) -> None:
        if self._depth:
            raise RuntimeError("the weights cannot change inside original(): leave that context first")

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
        """The noise prediction (B, C, h, w) float32, with gradients; timesteps (B,) or (), pooled (B, E) if the U-Net
        takes one (SDXL).

        The output of a v-prediction checkpoint is converted to noise, so a loss on the noise weights the timesteps as
        it does for a checkpoint that predicts noise.
        """
        out = self._denoise(latents, timesteps, states, pooled)
        return self._schedule.noise_of(out, latents.to(out), timesteps)

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
        sampling.refuse_course(course, chosen)
        if len(seeds) != len(states.states):
            raise ValueError(f"{len(states.states)} prompts but {len(seeds)} seeds")
        if stop_at is not None and not 0 <= stop_at <= chosen.steps:
            raise ValueError(f"stop_at={stop_at} is not among the steps 0 .. {chosen.steps}")
        size = (self.latent_channels, chosen.height // self.pixels_per_latent, chosen.width // self.pixels_per_latent)
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

    def _no_prompt(self) -> TextStates:
        """The unconditional text states (1 prompt): the encoded empty text, or zeros if SDXL's index says so."""
        state = self._changed_text.state
        if state is not None and state in self._empty:
            return self._empty[state]
        empty = self.encode([""])
        if self._zeros and empty.pooled is not None:
            empty = replace(empty, states=torch.zeros_like(empty.states), pooled=torch.zeros_like(empty.pooled))
        if state is not None:
            self._empty[state] = empty
        return empty

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents, self.vae_slicing)

    def encode_images(self, images: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, images, self.vae_slicing)

    def generate(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler | None = None,
        guide: Guide | None = None,
        negative: str = "",
        each_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """uint8 (B, H, W, 3). All B images are generated in one batch, so the caller chooses B by the memory."""
        with torch.no_grad(), nullcontext() if guide is None else guide.around(self, texts):
            latents = self.sample(self.encode(texts), seeds, sampler, guide, None, negative, each_step)
        return self.decode(latents)

    # --- devices -----------------------------------------------------------------------------------------------------

    def to(self, device: Any) -> UNetBackbone:
        """Moves the U-Net. Text encoder and autoencoder follow at their next use."""
        self.unet.to(device)
        return self

    def park(self) -> None:
        """Moves text encoders and autoencoder to the CPU until their next use: the training loop needs neither, unless
        it trains the text encoders."""
        if self.trained is self.unet:
            self.text.to("cpu")
        self.vae.to("cpu")
