"""Writes FLUX.1 dev with random weights: flux.py FOLDER [float32 | bfloat16] [cpu | cuda] [small]

The transformer, CLIP and the autoencoder are built from the config values of black-forest-labs/FLUX.1-dev. T5 has its
widths but one block in place of 24, and a tokenizer of letters. In bfloat16 that is 25 GB on disk. small: one block of
each kind, for a rehearsal on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from folder import part_of, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from realera.backbones import standard

TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 1,
    "feed_forward_proj": "gated-gelu",
}
SCHEDULE: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SMALL = {
    "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64},
    "vae": {"block_out_channels": (32, 32, 32, 32)},
    "t5": {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_heads": 4},
}


def build(folder: Path, dtype: str = "bfloat16", device: str = "cpu", size: str = "full") -> None:
    own = SMALL if size == "small" else {}
    kept = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))  # 12 billion weights would take 48 GB in float32
    try:
        with torch.device(device):
            parts = {
                "text_encoder": part_of("text_encoder", standard.MODELS["v1"]["text_encoder"]),
                "text_encoder_2": T5EncoderModel(T5Config(**{**T5, **own.get("t5", {})})),
                "transformer": FluxTransformer2DModel(**{**TRANSFORMER, **own.get("transformer", {})}),
                "vae": AutoencoderKL(**{**AUTOENCODER, **own.get("vae", {})}),
            }
    finally:
        torch.set_default_dtype(kept)
    for name, part in parts.items():
        part.to(getattr(torch, dtype)).save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / "tokenizer")
    letters().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {name: ["transformers", type(parts[name]).__name__] for name in list(parts)[:2]}
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    }
    index |= {name: ["diffusers", type(parts[name]).__name__] for name in ("transformer", "vae")}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}, indent=2))


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's, with a piece for each letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -3.0)]
    pieces += [(letter, -8.0) for letter in map(chr, range(33, 127))]
    own = Tokenizer(models.Unigram(pieces, unk_id=2))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Metaspace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=512, **special)


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
