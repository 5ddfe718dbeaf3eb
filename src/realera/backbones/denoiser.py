"""Calls the U-Net: handles its precision, attention, compilation and, for SDXL, pooled text states and image sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from realera.backbones import attention
from realera.contracts import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "plain", "sliced"]
SMALL_MAP = 32 * 32  # up to this number of latent pixels, plain attention trains faster on a CPU


class Denoiser:
    """The U-Net as a function (latents, timesteps, states, pooled) -> output.

    attention: "plain" (matrix products; on CPUs its backward pass is faster for small maps), "sdpa", "sliced" (plain,
    one head at a time: less memory, slower), or "auto" = plain for small maps on a CPU, else sdpa. compiled: use
    torch.compile with this backend, or with the default backend if True. The module itself is not changed, so adapters
    and edits find their layers; after a change of layers it is compiled again. While a layer has a hook (scaled
    adapters, AC's detached rows) the uncompiled U-Net runs, because a compiled graph would ignore the change of hooks.
    Raises UserError for unknown settings.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        attention: Attention,
        compiled: bool | str,
        pixels_per_latent: int,
        backbone: str,
    ) -> None:
        if attention not in (known := get_args(Attention)):  # otherwise sdpa would be used silently
            raise UserError(f"backbone.attention={attention!r} is not known; choose among {', '.join(known)}.")
        self.unet = unet
        self.attention = attention
        self.pixels_per_latent = pixels_per_latent
        self.backbone = backbone
        self.takes_pooled = unet.config.get("addition_embed_type") == "text_time"
        self._weight = next(unet.parameters())  # has the U-Net's device and dtype, with or without adapters
        self._attention_device = ""  # the device type that the attention was chosen for
        self.passes = 0  # images that went through the denoiser so far
        self._forward: Callable[..., Any] = unet
        if compiled:
            backends = torch.compiler.list_backends(exclude_tags=())
            if compiled is not True and compiled not in backends:
                raise UserError(
                    f"backbone.compile={compiled!r} is not known; give false, true, or one of {', '.join(backends)}."
                )
            self._forward = torch.compile(unet) if compiled is True else torch.compile(unet, backend=compiled)

    def __call__(self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor | None) -> Tensor:
        """The raw output (B, C, h, w) float32; timesteps (B,) or (), pooled (B, E) for a U-Net that takes one."""
        device, dtype = self._weight.device, self._weight.dtype
        self.passes += len(latents)
        self._choose_attention(device)
        more: dict[str, Any] = {}
        if self.takes_pooled:
            if pooled is None:
                raise ValueError(f"the U-Net of backbone {self.backbone} takes the pooled text state: give it")
            more["added_cond_kwargs"] = {
                "text_embeds": pooled.to(device, dtype),
                "time_ids": self._time_ids(latents).to(device),
            }
        elif pooled is not None:
            raise ValueError(f"the U-Net of backbone {self.backbone} takes no pooled text state")
        # The caller's autocast is used, but without its cache of half-precision copies of trainable weights, which
        # lives until the outermost region ends (in a trainer: the whole step). original() swaps the data of the same
        # tensors, and a copy that was made without gradients could not give any to the next forward pass.
        kind = device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            forward = self.unet if self._hooked() else self._forward
            out: Tensor = forward(
                latents.to(device, dtype),
                timesteps.to(device),
                encoder_hidden_states=states.to(device, dtype),
                return_dict=False,
                **more,
            )[0]
        return out.float()

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """See `attention.recorded`. Runs uncompiled, because storing the maps would break every compiled graph."""
        forward, self._forward = self._forward, self.unet
        self._choose_attention(self._weight.device)  # otherwise the first pass would replace the processors
        try:
            with attention.recorded(self.unet) as maps:
                yield maps
        finally:
            self._forward = forward

    def with_cached_text(self) -> Callable[..., Tensor]:
        """A denoiser for passes without gradients, with the same text states and the same weights. On a CPU,
        uncompiled, keys and values of the text are computed once and reused. On a GPU the memory is better spent on
        larger batches."""
        unet: nn.Module = self.unet
        if self._forward is not unet or self._weight.device.type != "cpu":
            return self
        read_once = attention.ReadOnce(unet)

        def denoise(*given: Any) -> Tensor:
            with read_once():
                return self(*given)

        return denoise

    def _hooked(self) -> bool:
        """Whether compiled code would ignore a hook: torch._dynamo has no guards for it (skip_nnmodule_hook_guards)."""
        if self._forward is self.unet:
            return False
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.unet.modules())

    def _time_ids(self, latents: Tensor) -> Tensor:
        """SDXL's image sizes (B, 6) in pixels: original height and width, crop top and left, target height and width.
        The original size is the target size and nothing is cropped, as in diffusers' pipeline."""
        height, width = (size * self.pixels_per_latent for size in latents.shape[-2:])
        sizes = [float(height), float(width), 0.0, 0.0, float(height), float(width)]
        return torch.tensor(sizes).expand(len(latents), -1)

    def forget_attention(self) -> None:
        """Chooses the attention again at the next pass: other code may have changed the U-Net's processors."""
        self._attention_device = ""

    def _choose_attention(self, device: torch.device) -> None:
        if device.type == self._attention_device:
            return
        self._attention_device = device.type
        if self.attention == "sliced":
            self.unet.set_attention_slice("max")
            return
        side = self.unet.config.sample_size  # null where the checkpoint does not say
        small = side is not None and (math.prod(side) if isinstance(side, list | tuple) else side**2) <= SMALL_MAP
        plain = self.attention == "plain" or (self.attention == "auto" and device.type == "cpu" and small)
        self.unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
