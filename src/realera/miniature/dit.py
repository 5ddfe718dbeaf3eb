"""The miniature's diffusion transformer: an SD3Transformer2DModel, small, trained with flow matching on the latents and
text states of the miniature's U-Net."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from realera.backbones import kinds
from realera.miniature.denoiser import Captions
from realera.miniature.training_tools import Log, fit
from realera.miniature.world import Subject
from realera.paths import MINIATURE, MINIATURE_DIT
from realera.system.disk import write_text

SHIFT = 1.0  # of the noise schedule: images of 8 x 8 latents need no shift towards noise
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT}
# Chosen by the validation loss after 90 s of one core: width 256 and 4 layers 1.31, width 192 and 7 layers 1.38, and
# with patches of one latent 1.63. All have 9 M parameters, which are 18 MB in half precision.
WIDTH, LAYERS, HEAD, PATCH = 256, 4, 32, 2
RATE = 1.5e-3  # 2e-3 is better than 1e-3 after 90 s (1.28 and 1.31), but a long training needs more care


def new_transformer(
    text_width: int, channels: int, width: int = WIDTH, layers: int = LAYERS, patch: int = PATCH
) -> SD3Transformer2DModel:
    """9.1 M parameters in four joint blocks. The pooled text state is the encoder's end-of-text state, as in FLUX."""
    made = SD3Transformer2DModel(
        sample_size=8,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8 // patch,
        qk_norm="rms_norm",
    )
    for name, module in made.named_modules():  # the modulations and the output start at zero (arXiv 2212.09748)
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return made


class PooledCaptions(Captions):
    """`Captions` that also knows each caption's pooled state: the row of its first end-of-text token."""

    def __init__(self, world: Any, parts: Path, empty_share: float) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32).eval()
        pooled = []

        @torch.no_grad()
        def encode(texts: Sequence[str]) -> Tensor:
            ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = encoder(ids)
            pooled.append(out.pooler_output.half())
            states: Tensor = out.last_hidden_state
            return states

        super().__init__(world, encode, empty_share)
        self.pooled = torch.cat(pooled)


def train_transformer(
    latents: Tensor,
    subjects: Sequence[Subject],
    captions: PooledCaptions,
    workdir: Path,
    steps: int,
    seed: int,
    log: Log,
    batch: int = 64,
    lr: float = RATE,
    **size: int,
) -> SD3Transformer2DModel:
    """Minimises ||v - (noise - x)||^2 on latents (N, C, 8, 8) at logit-normal noise levels, which weights the middle of
    the schedule (arXiv 2403.03206, section 3.1); returns the averaged transformer (float32).

    A share of the captions is empty (`Captions.draw`), for guidance.
    """
    torch.manual_seed(seed)
    model = new_transformer(captions.states.shape[-1], latents.shape[1], **size)
    held = np.arange(0, len(latents), max(1, len(latents) // 512))[:512]  # of the training pictures: a probe, no test

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        index = rng.integers(len(latents), size=batch)
        return flow_loss(model, latents, subjects, captions, index, rng, generator)

    def probe(average: nn.Module, step: int) -> str:
        return f"loss of the average {validation_loss(average, latents, subjects, captions, held):.4f}"

    return cast(
        SD3Transformer2DModel,
        fit(
            model,
            loss,
            workdir / "transformer.pt",
            steps,
            lr,
            seed,
            log,
            warmup=300,
            decay=0.9995,
            weight_decay=0.01,
            probe=probe,
        ),
    )


def flow_loss(
    model: nn.Module,
    latents: Tensor,
    subjects: Sequence[Subject],
    captions: PooledCaptions,
    index: np.ndarray,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """The flow-matching loss of the pictures `index`, each with a caption and a noise level drawn for it."""
    rows = [captions.draw(subjects[i], rng) for i in index]
    clean = latents[torch.from_numpy(index)]
    # stratified over the batch, so every step has noise levels from the whole range
    share = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
    sigma = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)).sigmoid()
    noise = torch.randn(clean.shape, generator=generator)
    level = sigma[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        predicted = model(
            hidden_states=(1 - level) * clean + level * noise,
            encoder_hidden_states=captions.states[rows].float(),
            pooled_projections=captions.pooled[rows].float(),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
    return F.mse_loss(predicted.float(), noise - clean)


@torch.no_grad()
def validation_loss(
    model: nn.Module, latents: Tensor, subjects: Sequence[Subject], captions: PooledCaptions, index: np.ndarray
) -> float:
    """`flow_loss` of fixed pictures with fixed captions, noise and levels."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    return float(flow_loss(model, latents, subjects, captions, index, rng, generator))


def save_transformer(model: SD3Transformer2DModel, out: Path) -> None:
    """Writes the folder of a checkpoint in float16, completely or not at all. Text encoder, tokenizer and autoencoder
    are those of the miniature: in the package's own folder they are left out, any other folder gets copies."""
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    half = SD3Transformer2DModel.from_config(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(beside / "transformer")
    (beside / "scheduler").mkdir()
    write_text(beside / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=2) + "\n")
    for part in () if out == MINIATURE_DIT else kinds.SHARED:
        shutil.copytree(MINIATURE / part, beside / part)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
