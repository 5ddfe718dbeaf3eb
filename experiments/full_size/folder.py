"""Writes Stable Diffusion 1.4 or XL in full size with random weights:

python experiments/full_size/folder.py FOLDER [sd14 | sdxl] [float32 | float16] [cpu | cuda]

Every component is built from the config values of CompVis/stable-diffusion-v1-4 or of
stabilityai/stable-diffusion-xl-base-1.0. The tokenizer is built from the word list in open_clip, which is CLIP's.
SD 1.4 in float32 takes 4.3 GB on disk and 4 GB of memory while it is made; SDXL in float16 takes 7 GB and 14 GB.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {
    **TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_BIG_G = {
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def build(folder: Path, kind: str = "sd14", dtype: str = "float32", device: str = "cpu") -> None:
    torch.manual_seed(0)
    models, scheduler, tokenizers = {
        "sd14": (sd14, PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SCHEDULE), 1),
        "sdxl": (sdxl, EulerDiscreteScheduler(timestep_spacing="leading", **SCHEDULE), 2),
    }[kind]
    with torch.device(device):
        parts: dict[str, Any] = models()
    parts |= {"scheduler": scheduler}
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


def sd14() -> dict[str, torch.nn.Module]:
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "vae": AutoencoderKL(sample_size=512, **VAE),
        "unet": UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
    }


def sdxl() -> dict[str, torch.nn.Module]:
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)),
        "vae": AutoencoderKL(sample_size=1024, scaling_factor=0.13025, force_upcast=True, **VAE),
        "unet": UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
    }


def tokenizer() -> CLIPTokenizer:
    """CLIP's: 256 bytes, the same bytes at the end of a word, 48,894 merges, two special tokens."""
    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # CLIP's order of the bytes: printable bytes first, then the rest, which are mapped to U+0100 and after.
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
