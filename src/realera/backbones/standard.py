"""The settings and tokenizer of the standard models, for checkpoints that come as one file without them.

Values of CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1 and stabilityai/stable-diffusion-xl-base-1.0.
The tokenizer is CLIP's; its list of merges comes with open_clip. It does not import torch.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from realera.contracts import UserError

WORDS = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, a file of open_clip
MERGES = 49152 - 256 - 2  # that CLIP uses of them
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

_TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,  # transformers reads 2 as "the row of the largest id"
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
    "dtype": "float32",
}
_CLIP_L = {
    **_TEXT,
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_H = {  # without its last layer, whose output Stable Diffusion 2 does not read
    **_TEXT,
    "architectures": ["CLIPTextModel"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_CLIP_BIG_G = {
    **_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}
_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
_UNET_1: dict[str, Any] = {
    **_UNET,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_UNET_2: dict[str, Any] = {
    **_UNET_1,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_XL: dict[str, Any] = {
    **_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_PNDM = {**_SCHEDULE, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
_DDIM = {**_SCHEDULE, "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_EULER = {**_SCHEDULE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}

MODELS: dict[str, dict[str, dict[str, Any]]] = {  # {kind of `original_layout`: {part: config.json}}
    "v1": {"text_encoder": _CLIP_L, "unet": _UNET_1, "vae": {**_VAE, "sample_size": 512}, "scheduler": _PNDM},
    "v2": {
        "text_encoder": _CLIP_H,
        "unet": _UNET_2,
        "vae": {**_VAE, "sample_size": 768},
        "scheduler": {**_DDIM, "prediction_type": "v_prediction"},
    },
    "xl": {
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_BIG_G,
        "unet": _UNET_XL,
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "scheduler": _EULER,
    },
}


@cache
def tokenizer() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary, {word: id}, and its merges as merges.txt has them: 256 bytes, the same at the end of a word,
    48,894 merges, two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    spec = importlib.util.find_spec("open_clip")
    packed = Path(str(spec.origin)).with_name(WORDS) if spec and spec.origin else None
    if packed is None or not packed.is_file():
        raise UserError(f"open_clip_torch lacks its file {WORDS}: install it again (pip install open_clip_torch).")
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : MERGES + 1]
    # CLIP's order of the bytes: printable bytes first, then the rest, which are mapped to U+0100 and after.
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    return {word: number for number, word in enumerate([*words, BEGIN, END])}, merges
