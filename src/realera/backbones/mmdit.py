"""Calls a diffusion transformer of Stable Diffusion 3 or FLUX: its inputs, its precision, and block-wise offloading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 1000  # Stable Diffusion 3 reads the noise level as a timestep of this many
PACK = 2  # FLUX reads squares of 2 x 2 latents as one token


class JointDenoiser:
    """The transformer as a function (latents, sigmas, states, pooled, guidance) -> velocity.

    flux: FLUX's interface, else Stable Diffusion 3's. guidance: a scale that FLUX dev reads, else unused.
    """

    def __init__(self, network: Any, flux: bool, backbone: str) -> None:
        self.network = network
        self.flux = flux
        self.backbone = backbone
        self.reads_guidance = flux and bool(self.network.config.guidance_embeds)
        self._weight: Tensor = self.network.context_embedder.weight  # has the network's device and dtype
        self.passes = 0  # images that went through the transformer so far

    def __call__(
        self, latents: Tensor, sigmas: Tensor, states: Tensor, pooled: Tensor | None, guidance: float
    ) -> Tensor:
        """The raw output (B, C, h, w) float32; sigmas (B,) or ()."""
        if pooled is None:
            raise ValueError(f"the transformer of backbone {self.backbone} takes the pooled text state: give it")
        device, dtype = self._weight.device, self._weight.dtype
        count = len(latents)
        self.passes += count
        given: dict[str, Any] = {
            "encoder_hidden_states": states.to(device, dtype),
            "pooled_projections": pooled.to(device, dtype),
            "return_dict": False,
        }
        times = STEPS * sigmas.to(device, torch.float32).expand(count)
        z = latents.to(device, dtype)
        # without the cache of half-precision copies: see `denoiser.Denoiser`
        kind = device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            if not self.flux:
                out: Tensor = self.network(hidden_states=z, timestep=times, **given)[0]
                return out.float()
            height, width = (side // PACK for side in z.shape[-2:])
            if self.reads_guidance:
                given["guidance"] = torch.full((count,), guidance, device=device)
            out = self.network(
                hidden_states=packed(z),
                timestep=times.to(dtype) / STEPS,
                txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
                img_ids=image_ids(height, width).to(device, dtype),
                **given,
            )[0]
        return unpacked(out.float(), height, width)


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): each token is a square of 2 x 2 latents."""
    return nn.functional.pixel_unshuffle(latents, PACK).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`; height, width: in tokens."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PACK)


def image_ids(height: int, width: int) -> Tensor:
    """(height width, 3): 0, the row and the column of each image token."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


# --- offloading ------------------------------------------------------------------------------------------------------


class BlockOffload:
    """Keeps the weights of all transformer blocks in the CPU's memory and copies those of one block to the device while
    the block runs. Everything else of the network, adapters too, is on the device.

    Weights that are saved for a gradient stay on the device until it is computed. So training needs gradient
    checkpointing, which saves only the blocks' inputs.
    """

    def __init__(self, network: Any) -> None:
        stacks = (getattr(network, name, ()) for name in ("transformer_blocks", "single_transformer_blocks"))
        self.blocks: list[Any] = [block for stack in stacks for block in stack]
        self.parameters = [list(block.parameters()) for block in self.blocks]  # without adapters, which are added later
        self.homes = [[parameter.data for parameter in own] for own in self.parameters]  # their tensors on the CPU
        self.where: Tensor = network.context_embedder.weight  # is on the device of everything else
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self._load, number))
            block.register_forward_hook(partial(self._unload, number), always_call=True)
            block._apply = partial(self._apply_to_adapters, number)

    def to(self, network: nn.Module, device: Any) -> None:
        """Moves the network's other weights."""
        if torch.device(device).type == "cuda":  # page-locked memory is copied several times faster
            self.homes = [[home if home.is_pinned() else home.pin_memory() for home in homes] for homes in self.homes]
            for number in range(len(self.blocks)):
                self._unload(number)
        network.to(device)

    def _apply_to_adapters(self, number: int, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """In place of `nn.Module._apply`: `module.to` moves only what was added to the block."""
        kept = set(map(id, self.parameters[number]))
        for parameter in self.blocks[number].parameters():
            if id(parameter) not in kept:
                with torch.no_grad():
                    parameter.data = move(parameter.data)
                    if parameter.grad is not None:
                        parameter.grad.data = move(parameter.grad.data)
        block: nn.Module = self.blocks[number]
        return block

    def _load(self, number: int, *call: Any) -> None:
        for parameter, home in zip(self.parameters[number], self.homes[number]):
            parameter.data = home.to(self.where.device, non_blocking=True)

    def _unload(self, number: int, *call: Any) -> None:
        for parameter, home in zip(self.parameters[number], self.homes[number]):
            parameter.data = home
