"""The part that backbones of diffusers models share: text states, the denoiser's weights, adapters, images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from realera.backbones import adapters, autoencoder, erasers
from realera.backbones.base import BaseWeights
from realera.backbones.changed_text import ChangedText
from realera.contracts import (
    PROJECTIONS,
    Adapter,
    Course,
    Edit,
    EraserSpec,
    Guide,
    NamedPrompt,
    Network,
    Read,
    Sampler,
    TextStates,
    UserError,
)
from realera.files import finite

EDIT, LORA, ERASER = "edit.", "lora.", "eraser."
Own = TypeVar("Own", bound="DiffusersBackbone")


class Text(Protocol):
    """Encodes prompts: `text.TextEncoder`, or several encoders as one. length: T, width: D, pooled_width: E or 0."""

    length: int
    width: int
    pooled_width: int

    def __call__(
        self, texts: Sequence[str | NamedPrompt], to_end: bool = False, weights: str | None = "loaded"
    ) -> TextStates: ...
    def with_vectors(self, texts: Sequence[str | NamedPrompt], vectors: Tensor) -> TextStates: ...
    def vectors(self, text: str) -> Tensor: ...
    def tokens(self, texts: Sequence[str]) -> list[set[int]]: ...
    def words(self) -> list[str]: ...
    def token_embeddings(self) -> Tensor: ...
    def token_ids(self, texts: Sequence[str]) -> list[list[int]]: ...
    def text_of(self, ids: Sequence[int]) -> str: ...
    def writable_tokens(self) -> list[int]: ...
    def rows(self, prompt: NamedPrompt) -> tuple[int, int]: ...
    def forget(self) -> None: ...
    def to(self, device: Any) -> None: ...


class DiffusersBackbone:
    """Members of `contracts.Backbone` that do not depend on the kind of denoiser. A subclass sets the attributes below
    and adds loading, `attention`, noise, timesteps and `sample`."""

    name: str
    text: Text
    vae: AutoencoderKL
    vae_slicing: bool
    latent_channels: int
    pixels_per_latent: int
    _base: BaseWeights
    _denoise: Any  # the denoiser as a function; `passes` counts its images
    _depth: int = 0  # nesting level of original()
    _text_passes: int = 0
    _trained: nn.Module
    _text_as_loaded: Any  # content id of the text encoders as loaded: str, in subclasses a property

    @property
    def denoiser(self) -> nn.Module:
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        return self._trained

    def choose(self, network: Network) -> None:
        self._trained = self._changed_text.network if network == "text_encoder" else self.denoiser

    def _init_weights(self, text_models: Sequence[nn.Module]) -> None:
        """To be called by a subclass's constructor when the denoiser is there."""
        self._changed_text = ChangedText(text_models, self.name)
        self._trained = self.denoiser
        self._empty: dict[str, TextStates] = {}  # states of the empty prompt, by the state of the text encoders

    @property
    def text_fingerprint(self) -> str:
        """Content id of what the text states depend on now: text encoders with their changes, tokenizers, length."""
        return self._changed_text.fingerprint(self._text_as_loaded)

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
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The denoiser's current device. A trainer may move the denoiser; everything else follows it."""
        return next(self.denoiser.parameters()).device

    # --- text --------------------------------------------------------------------------------------------------------

    def encode(
        self, texts: Sequence[str | NamedPrompt], *, vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """See `TextEncoder.__call__`, and `with_vectors` for vectors; on the denoiser's device, always in float32. With
        gradients for text encoders that are trained."""
        self._text_passes += len(texts)
        return self._states(texts, vectors, to_end)

    def _states(
        self, texts: Sequence[str | NamedPrompt], vectors: Tensor | None = None, to_end: bool = False
    ) -> TextStates:
        """`encode`, without counting."""
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

    def _no_prompt(self) -> TextStates:
        """The unconditional text states (1 prompt), kept until the text encoders change."""
        state = self._changed_text.state
        if state is not None and state in self._empty:
            return self._empty[state]
        empty = self._encoded_empty()
        if state is not None:
            self._empty[state] = empty
        return empty

    def _encoded_empty(self) -> TextStates:
        return self._states([""])

    # --- weights -----------------------------------------------------------------------------------------------------

    def text_projections(self, read: Read = "both") -> dict[str, nn.Linear]:
        return {name: layer for name, layer in self._base.readers.items() if self._base.takes(name, PROJECTIONS[read])}

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
                    stack.enter_context(adapters.disabled(self.denoiser))
                    stack.enter_context(erasers.disabled(self.denoiser))
                    stack.enter_context(self._changed_text.original(edited))
                    stack.enter_context(nullcontext() if edited else self._base.swapped())
                    yield
        finally:
            self._depth -= 1

    @torch.inference_mode(False)
    def add_adapter(self, spec: Adapter, generator: Generator, concepts: int = 1) -> list[nn.Parameter]:
        """See `adapters.add` and `erasers.add`. The adapter is float32 for every dtype of the denoiser. Only one
        adapter is allowed, and erasers only behind the attention of a U-Net."""
        self._refuse_inside_original()
        self._base.refuse_adapting_float16()
        if (
            adapters.layers(self.denoiser)
            or adapters.layers(self._changed_text.network)
            or erasers.found(self.denoiser)
        ):
            raise RuntimeError("an adapter is in place: call merge_adapter() or remove_adapter() first")
        if isinstance(spec, EraserSpec):
            self._refuse_erasers()
            return erasers.add(self.denoiser, spec, generator)
        self._forget_text()
        return adapters.add(self.trained, spec, generator, self.name, concepts)

    def adapter_scale(self, scale: Tensor) -> AbstractContextManager[None]:
        """See `adapters.scaled`."""
        return adapters.scaled(self.denoiser, scale)

    def _refuse_erasers(self) -> None:
        """Raises UserError if the denoiser has no cross-attention that erasers could stand behind."""

    def eraser_outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        """See `erasers.outputs`."""
        return erasers.outputs(self.denoiser)

    @torch.inference_mode(False)
    def unfreeze(self, targets: Sequence[str]) -> list[nn.Parameter]:
        """Makes the network's own weights trainable, for methods without a LoRA; see `BaseWeights.unfreeze`."""
        self._refuse_inside_original()
        if self.trained is self.denoiser:
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
        self._base.merge(adapters.taken(self.denoiser))
        self._changed_text.base.merge(adapters.taken(self._changed_text.network))

    def remove_adapter(self) -> None:
        """Removes the adapter without merging it."""
        self._refuse_inside_original()
        self._forget_text()
        adapters.remove(self.denoiser)
        adapters.remove(self._changed_text.network)
        erasers.remove(self.denoiser)

    def erased_state(self) -> dict[str, Tensor]:
        """{"edit.<layer>.weight": changed base weight, "lora.<layer>.down|up|alpha": adapter,
        "eraser.<attn2>.down.weight ...": eraser}, copies on the CPU. Layers of a text encoder begin with the name of
        its folder."""
        self._refuse_inside_original()
        changed = {**self._base.changed(), **self._changed_text.base.changed()}
        lora = {**adapters.state(self.denoiser), **self._changed_text.adapter_state()}
        return {
            **{EDIT + name: value for name, value in changed.items()},
            **{LORA + name: value for name, value in lora.items()},
            **{ERASER + name: value for name, value in erasers.state(self.denoiser).items()},
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
            adapters.load(self.denoiser, {n: value for n, value in lora.items() if n not in text_lora}, self.name)
            self._changed_text.load_adapter(text_lora)
            erasers.load(self.denoiser, eraser, self.name)
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

    @property
    def passes(self) -> int:
        """Images that went through the denoiser so far, the teacher's and the unconditional ones included."""
        count: int = self._denoise.passes
        return count

    @property
    def text_passes(self) -> int:
        """Texts that `encode` was given so far. Those whose states are still in memory count too, so that the number
        does not depend on the process; the empty prompt of guided images does not."""
        return self._text_passes

    # --- images -----------------------------------------------------------------------------------------------------

    def _latent_size(self, sampler: Sampler) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents."""
        pixels = self.pixels_per_latent
        return self.latent_channels, sampler.height // pixels, sampler.width // pixels

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
        own: Any = self  # the members of `Backbone` that a subclass adds are not known here
        with torch.no_grad(), nullcontext() if guide is None else guide.around(own, texts):
            latents = self.sample(self.encode(texts), seeds, sampler, guide, None, negative, each_step)
        return self.decode(latents)

    # --- devices -----------------------------------------------------------------------------------------------------

    def to(self: Own, device: Any) -> Own:
        """Moves the denoiser. Text encoder and autoencoder follow at their next use."""
        self.denoiser.to(device)
        return self

    def park(self) -> None:
        """Moves text encoders and autoencoder to the CPU until their next use: the training loop needs neither."""
        self.text.to("cpu")
        self.vae.to("cpu")
