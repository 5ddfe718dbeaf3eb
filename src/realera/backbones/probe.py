"""How long one pass of a checkpoint's U-Net takes on this machine, timed with constant weights: none are read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from realera.backbones import folder
from realera.backbones.denoiser import DTYPES

LONGEST = 3.0  # seconds of one probe
MOST = 10  # passes of one probe
GUIDED = 2  # latents that one guided image gives to a pass


def unet_config(pretrained: str | None) -> dict[str, Any] | None:
    """The U-Net's config.json of a checkpoint: the miniature (None), a folder, a single file, or a hub id in the local
    cache; None if it is not on this machine."""
    place = folder.on_disk(pretrained)
    file = place / "unet" / "config.json" if place is not None else None
    if file is None and folder.HUB_ID.fullmatch(str(pretrained)):
        found = try_to_load_from_cache(str(pretrained), "unet/config.json")
        file = Path(found) if isinstance(found, str) else None
    if file is None or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


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

    def draw() -> None:
        unet(latents, 500, states, added_cond_kwargs=more or None)
        if device != "cpu":
            torch.cuda.synchronize(device)

    draw()  # the first pass also allocates and chooses kernels
    since, fastest, passes = time.perf_counter(), math.inf, 0
    while passes < MOST and (passes == 0 or time.perf_counter() - since < LONGEST):
        begun = time.perf_counter()
        draw()
        fastest, passes = min(fastest, time.perf_counter() - begun), passes + 1
    return fastest / batch
