"""Puts the trained parts together as one folder that `StableDiffusionPipeline.from_pretrained` reads, in float16."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from realera.miniature.denoiser import SCHEDULE
from realera.system.disk import whole


def assemble(parts: Path, out: Path) -> None:
    """parts/{tokenizer,text_encoder,vae,unet,judge} -> out/, a whole folder or none; the card is left to `card.py`."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(beside, safe_serialization=True)
    prefixed(beside / "text_encoder" / "model.safetensors")
    shutil.copytree(parts / "judge", beside / "judge")
    for extra in ("vocab.json", "merges.txt"):  # readers of the older layout want these two beside tokenizer.json
        if (parts / "tokenizer" / extra).is_file():
            shutil.copy(parts / "tokenizer" / extra, beside / "tokenizer" / extra)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def prefixed(file: Path) -> None:
    """Renames a text encoder's tensors as hub checkpoints name them, with `text_model.` in front. Transformers 5 writes
    them without it and reads both; transformers 4 reads this form only."""
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
        tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118 (safe_open is no mapping)
    renamed = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in tensors.items()}
    with whole(file) as beside:
        save_file(renamed, beside, metadata=metadata)


def megabytes(folder: Path) -> float:
    """Size of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
