"""The miniature's VAE: an AutoencoderKL of f = 4, 32 px -> 8 x 8 x 8. Its latents are whitened, so scaling_factor is
1."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from realera.miniature.training_tools import Log, fast_norms, fit, to_tensor

CHANNELS = 8


def new_autoencoder() -> AutoencoderKL:
    """1.7 M parameters; SD's blocks at a tenth of their widths. Eight latent channels, because with four 32 px pictures
    were blurred."""
    return AutoencoderKL(
        sample_size=32,
        latent_channels=CHANNELS,
        block_out_channels=[32, 64, 96],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


def reconstruction_loss(drawn: Tensor, picture: Tensor) -> Tensor:
    """L1 + MSE + half the L1 of horizontal and vertical differences, because the eye is sensitive to edges."""
    error = drawn - picture
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def train_autoencoder(
    pictures: np.ndarray, held_out: np.ndarray, workdir: Path, steps: int, seed: int, log: Log, batch: int = 16
) -> AutoencoderKL:
    """Trains, whitens, and returns the averaged autoencoder (float32, eval)."""
    torch.manual_seed(seed)
    vae = new_autoencoder()
    fast_norms(vae)
    vae.to(memory_format=torch.channels_last)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        picture = to_tensor(pictures[np.sort(rng.integers(len(pictures), size=batch))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(picture).latent_dist
            std = torch.exp(0.5 * posterior.logvar.float())
            noise = torch.randn(posterior.mean.shape, generator=generator)
            drawn = vae.decode(posterior.mean.float() + std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        result: Tensor = reconstruction_loss(drawn, picture) + 2e-4 * divergence
        return result

    def probe(model: nn.Module, step: int) -> str:
        return f"held-out PSNR {psnr(cast(AutoencoderKL, model), held_out[:512]):.2f} dB"

    average = cast(
        AutoencoderKL,
        fit(vae, loss, workdir / "vae.pt", steps, 1.5e-3, seed, log, decay=0.998, probe=probe, weight_decay=1e-4),
    )
    whiten(average, pictures[:: max(1, len(pictures) // 8000)])
    return average


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over pictures of the PSNR in dB of decode(mean of encode)."""
    values = []
    for start in range(0, len(pictures), 128):
        batch = to_tensor(pictures[start : start + 128])
        drawn = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (drawn - batch).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Posterior means (N, 8, 8, 8) float32."""
    parts = [vae.encode(to_tensor(pictures[i : i + 256])).latent_dist.mean for i in range(0, len(pictures), 256)]
    return torch.cat(parts).contiguous()


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Folds ZCA whitening of the latent channels into quant_conv and post_quant_conv: covariance 1, scaling_factor 1.

    Without whitening the eigenvalues of the covariance differ by orders of magnitude, and a diffusion model mostly fits
    the largest. The posterior's standard deviation becomes a constant per channel (its mean over the data).
    """
    latents = encode_all(vae, pictures).permute(0, 2, 3, 1).reshape(-1, CHANNELS).double()
    mean = latents.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T))
    white = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    colour = vectors @ torch.diag(values.sqrt()) @ vectors.T
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and post is not None
    posterior = vae.encode(to_tensor(pictures[:256])).latent_dist
    spread = posterior.std.double().square().mean((0, 2, 3))
    weight, bias = quant.weight.double(), quant.bias.double()
    quant.weight[:CHANNELS] = torch.einsum("ij,jkhw->ikhw", white, weight[:CHANNELS]).float()
    quant.bias[:CHANNELS] = (white @ (bias[:CHANNELS] - mean)).float()
    quant.weight[CHANNELS:] = 0
    quant.bias[CHANNELS:] = torch.log(white.square() @ spread).float()
    after = post.weight.double()
    post.bias.copy_((post.bias.double() + torch.einsum("ikhw,k->i", after, mean)).float())
    post.weight.copy_(torch.einsum("ikhw,kj->ijhw", after, colour).float())


def tune_decoder(
    vae: AutoencoderKL, pictures: np.ndarray, held_out: np.ndarray, workdir: Path, steps: int, seed: int, log: Log
) -> AutoencoderKL:
    """Trains only the decoder further, on fixed latents: sharper images for a U-Net that is already trained."""
    encoder = vae
    decoder = cast(AutoencoderKL, fast_copy(vae))
    decoder.encoder.requires_grad_(False)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        picture = to_tensor(pictures[np.sort(rng.integers(len(pictures), size=16))])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = encoder.encode(picture).latent_dist.mean.float()
        latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)  # latents from a U-Net are not exact
        with torch.autocast("cpu", torch.bfloat16):
            drawn = decoder.decode(latents).sample.float()
        return reconstruction_loss(drawn, picture)

    def probe(model: nn.Module, step: int) -> str:
        return f"held-out PSNR {psnr(cast(AutoencoderKL, model), held_out[:512]):.2f} dB"

    return cast(
        AutoencoderKL,
        fit(decoder, loss, workdir / "decoder.pt", steps, 4e-4, seed, log, decay=0.998, probe=probe, weight_decay=1e-4),
    )


def fast_copy(vae: AutoencoderKL) -> AutoencoderKL:
    """A trainable copy with fast norms."""
    copy = new_autoencoder()
    copy.load_state_dict(vae.state_dict())
    fast_norms(copy)
    copy.to(memory_format=torch.channels_last)
    return copy
