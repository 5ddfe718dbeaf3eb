"""Latents to images and back, with the KL autoencoder; always in float32, also under the caller's autocast."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from realera.files import finite

AT_ONCE = 8  # images of 512 x 512 pixels in one pass: each takes about 1 GB


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, one_by_one: bool) -> Tensor:
    """uint8 (B, H, W, 3) from latents (B, C, h, w), on their device; the autoencoder is moved there."""
    vae.to(latents.device)
    scale, shift = _scale_and_shift(vae)
    pixels = latents.shape[-2] * latents.shape[-1] * pixels_per_latent(vae) ** 2
    parts = (latents.float() / scale + shift).split(_at_once(pixels, one_by_one))
    with torch.autocast(latents.device.type, enabled=False):
        images = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
    finite.refuse(
        [("output", images)],
        "An image cannot be decoded, because the autoencoder's",
        "lower backbone.sampler.guidance_scale, or copy the checkpoint again",
    )
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, one_by_one: bool) -> Tensor:
    """Latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1], on their device.

    They are the mode of the encoder's distribution, so equal images have equal latents.
    """
    vae.to(images.device)
    scale, shift = _scale_and_shift(vae)
    parts = images.float().split(_at_once(images.shape[-2] * images.shape[-1], one_by_one))
    with torch.autocast(images.device.type, enabled=False):
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
    return (latents - shift) * scale


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """The factor between image and latents, for each side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _scale_and_shift(vae: AutoencoderKL) -> tuple[float, float]:
    return float(vae.config.scaling_factor), float(vae.config.get("shift_factor") or 0.0)


def _at_once(pixels: int, one_by_one: bool) -> int:
    """The number of images with `pixels` pixels in one pass."""
    return 1 if one_by_one else min(AT_ONCE, max(1, AT_ONCE * 512**2 // max(1, pixels)))
