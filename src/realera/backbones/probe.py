"""How long one pass of a checkpoint's U-Net, or of its text encoder, takes on this machine, timed with constant
weights: none are read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTextConfig, CLIPTextModel

from realera.backbones import folder
from realera.backbones.changed_text import FOLDERS
from realera.backbones.denoiser import DTYPES

LONGEST = 3.0  # seconds of one probe
MOST = 10  # passes of one probe
TEXTS = 64  # in one batch, as `text.BATCH`
GUIDED = 2  # latents that one guided image gives to a pass


def unet_config(pretrained: str | None) -> dict[str, Any] | None:
    """The U-Net's config.json of a checkpoint: the miniature (None), a folder, a single file, or a hub id in the local
    cache; None if it is not on this machine."""
    return _config(pretrained, "unet")


def text_configs(pretrained: str | None) -> list[dict[str, Any]]:
    """The config.json of every text encoder of a checkpoint (see `unet_config`); [] if one is no CLIP, or if none is on
    this machine."""
    found = [_config(pretrained, name) for name in FOLDERS]
    there = [config for config in found if config is not None]
    return there if all(config.get("model_type") == "clip_text_model" for config in there) else []


def _config(pretrained: str | None, part: str) -> dict[str, Any] | None:
    place = folder.on_disk(pretrained)
    file = place / part / "config.json" if place is not None else None
    if file is None and folder.HUB_ID.fullmatch(str(pretrained)):
        found = try_to_load_from_cache(str(pretrained), f"{part}/config.json")
        file = Path(found) if isinstance(found, str) else None
    if file is None or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


@torch.no_grad()
def seconds_per_text(config: Mapping[str, Any], rows: int, device: str) -> float:
    """Seconds of one text of `rows` token rows through a CLIP text model in float32, of a batch of `TEXTS`: the fastest
    of a few passes. config: of the model. The tokenizer is not timed."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig.from_dict(dict(config))).eval()
    model.to_empty(device=device)
    for values in (*model.parameters(), *model.buffers()):
        values.fill_(0 if values.dtype == torch.int64 else 0.01)
    ids = torch.full((TEXTS, rows), int(model.config.eos_token_id), device=device)
    return _fastest(lambda: model(input_ids=ids), device) / TEXTS


@torch.no_grad()
def seconds_per_pass(config: Mapping[str, Any], rows: int, images: int, dtype: str, device: str) -> float:
    """Seconds of one pass, for one latent of a batch: the fastest of a few passes, because other work slows some down.

    config: of the U-Net. rows: of the text states. images: drawn together, with guidance: a pass is given twice as many
    latents. dtype: "float32", "bfloat16" or "float16". Weights and inputs are constants, which changes no time.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config)).eval()
    torch.nn.Module.to(unet, DTYPES[dtype])  # diffusers' own warns of weights, and none are loaded
    unet.to_empty(device=device)
    for values in (*unet.parameters(), *unet.buffers()):
        values.fill_(0.01)
    batch, side = GUIDED * images, int(unet.config.sample_size)
    like: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device}
    latents = torch.ones(batch, int(unet.config.in_channels), side, side, **like)
    states = torch.ones(batch, rows, int(unet.config.cross_attention_dim), **like)
    more = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        more = {"text_embeds": torch.ones(batch, pooled, **like), "time_ids": torch.ones(batch, 6, **like)}

    return _fastest(lambda: unet(latents, 500, states, added_cond_kwargs=more or None), device) / batch


def _fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few calls."""

    def done() -> None:
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)

    done()  # the first one also allocates and chooses kernels
    since, fastest, passes = time.perf_counter(), math.inf, 0
    while passes < MOST and (passes == 0 or time.perf_counter() - since < LONGEST):
        begun = time.perf_counter()
        done()
        fastest, passes = min(fastest, time.perf_counter() - begun), passes + 1
    return fastest
