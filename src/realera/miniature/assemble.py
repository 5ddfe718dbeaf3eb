"""Combines the trained parts into one float16 folder for `StableDiffusionPipeline.from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from realera.miniature.denoiser import SCHEDULE
from realera.system.disk import atomic


def assemble(parts: Path, out: Path) -> None:
    """parts/{tokenizer,text_encoder,vae,unet,judge} -> out/, completely or not at all; `card.py` writes the card."""
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
    config = beside / "text_encoder" / "config.json"  # transformers loads in this dtype, diffusers the U-Net in float32
    config.write_text(config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"'), "utf-8")
    shutil.copytree(parts / "judge", beside / "judge")
    for extra in ("vocab.json", "merges.txt"):  # older programs need these two files besides tokenizer.json
        if (parts / "tokenizer" / extra).is_file():
            shutil.copy(parts / "tokenizer" / extra, beside / "tokenizer" / extra)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def prefixed(file: Path) -> None:
    """Adds the prefix `text_model.` to a text encoder's tensor names, as in hub checkpoints. Transformers 5 writes
    names without the prefix and reads both forms; transformers 4 reads only names with it."""
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
        tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118 (safe_open is no mapping)
    renamed = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in tensors.items()}
    with atomic(file) as beside:
        save_file(renamed, beside, metadata=metadata)


def megabytes(folder: Path) -> float:
    """Size of a folder's files in MB (1e6 bytes)."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
