"""The miniature's U-Net: a UNet2DConditionModel like SD's at a hundredth of its size; it predicts the noise on whitened
latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from realera.miniature.training_tools import Log, fast_norms, fit
from realera.miniature.world import Subject, World

Encode = Callable[[Sequence[str]], Tensor]

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def new_denoiser(text_width: int, channels: int) -> UNet2DConditionModel:
    """7.5 M parameters, seven attn2 blocks (14 K/V matrices)."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[96, 160],
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def text_states(parts: Path) -> Encode:
    """A function texts -> (B, 32, 256) float32 of the distilled encoder, with the pipeline's padding."""
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = encoder(ids).last_hidden_state
        return states

    return encode


class Captions:
    """The text states of all captions, encoded once. `draw` picks a caption of a subject by weight."""

    def __init__(self, world: World, encode: Encode, empty_share: float) -> None:
        self.world, self.empty_share = world, empty_share
        texts = ["", *world.all_captions()]
        self.row = {text: row for row, text in enumerate(texts)}
        self.states = torch.cat([encode(texts[i : i + 256]).half() for i in range(0, len(texts), 256)])
        self._choices: dict[Subject, tuple[np.ndarray, np.ndarray]] = {}

    def draw(self, subject: Subject, rng: np.random.Generator) -> int:
        """The row of a caption for this subject; row 0, the empty caption, in a share `empty_share` of the draws."""
        if rng.random() < self.empty_share:
            return 0
        if subject not in self._choices:
            texts, weights = zip(*self.world.captions(subject), strict=True)
            total = np.cumsum(np.array(weights) / sum(weights))
            self._choices[subject] = (np.array([self.row[text] for text in texts]), total)
        rows, total = self._choices[subject]
        return int(rows[min(int(np.searchsorted(total, rng.random())), len(rows) - 1)])


def train_denoiser(
    latents: Tensor,
    subjects: Sequence[Subject],
    captions: Captions,
    workdir: Path,
    steps: int,
    seed: int,
    log: Log,
    batch: int = 64,
    lr: float = 1e-3,
) -> UNet2DConditionModel:
    """Min-SNR-5 weighted epsilon loss on latents (N, C, 8, 8); returns the averaged U-Net (float32)."""
    torch.manual_seed(seed)
    unet = new_denoiser(captions.states.shape[-1], latents.shape[1])
    # SDPA's backward pass is slow on CPUs for heads this small
    unet.set_attn_processor(AttnProcessor())
    fast_norms(unet)
    unet.to(memory_format=torch.channels_last)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        index = rng.integers(len(latents), size=batch)
        states = captions.states[[captions.draw(subjects[i], rng) for i in index]].float()
        clean = latents[torch.from_numpy(index)]
        # stratified over the batch, so every step has timesteps from the whole range
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * 1000 / batch).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=generator)
        a = alphas[t][:, None, None, None]
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, states).sample
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        result: Tensor = (error * weight[t]).mean()
        return result

    return cast(
        UNet2DConditionModel,
        fit(unet, loss, workdir / "unet.pt", steps, lr, seed, log, warmup=200, decay=0.9995, weight_decay=0.01),
    )
