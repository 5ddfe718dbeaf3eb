"""Writes Stable Diffusion 1.4 or XL in full size with random weights:

python experiments/full_size/folder.py FOLDER [sd14 | sdxl] [float32 | float16] [cpu | cuda]

Every component is built from the config values of CompVis/stable-diffusion-v1-4 or of
stabilityai/stable-diffusion-xl-base-1.0. The tokenizer is built from the word list in open_clip, which is CLIP's.
SD 1.4 in float32 takes 4.3 GB on disk and 4 GB of memory while it is made; SDXL in float16 takes 7 GB and 14 GB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from realera.backbones import standard

KINDS = {"sd14": "v1", "sdxl": "xl"}  # in the words of `standard`
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "PNDMScheduler": PNDMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def build(folder: Path, kind: str = "sd14", dtype: str = "float32", device: str = "cpu") -> None:
    torch.manual_seed(0)
    with torch.device(device):
        parts = {part: part_of(part, config) for part, config in standard.MODELS[KINDS[kind]].items()}
    tokenizers = 2 if kind == "sdxl" else 1
    parts |= {name: tokenizer() for name in ("tokenizer", "tokenizer_2")[:tokenizers]}
    index: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(getattr(torch, dtype)).save_pretrained(folder / name, max_shard_size="20GB")
        else:
            part.save_pretrained(folder / name)
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    if kind == "sd14":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    pipeline = {"sd14": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[kind]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}, indent=2))


def part_of(part: str, config: dict[str, Any]) -> Any:
    """A model with random weights, or the scheduler."""
    if part.startswith("text_encoder"):
        return CLASSES[part](CLIPTextConfig(**{key: value for key, value in config.items() if key != "model_type"}))
    return CLASSES[config["_class_name"] if part == "scheduler" else part].from_config(config)


def tokenizer() -> CLIPTokenizer:
    words, merges = standard.tokenizer()
    return CLIPTokenizer(vocab=words, merges=[tuple(merge.split()) for merge in merges], model_max_length=77)


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
