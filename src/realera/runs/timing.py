"""What a pass of the denoiser takes on this machine. A plan that has no finished runs to go by is made from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realera import console, paths
from realera.contracts import UserError
from realera.files import plain_data
from realera.runs import folders
from realera.settings.run_settings import Settings
from realera.system import devices, disk

FOLDER = "timings"  # of the cache
DAY = 86_400.0  # seconds; an older figure is measured again
USUAL_ROWS = 77  # token rows of a prompt, in most text encoders
SMALL = "mini"  # the only backbone that is timed on a CPU: elsewhere a pass takes minutes


@dataclass(frozen=True)
class Rate:
    """seconds: of one pass of the denoiser (one latent, one timestep). half: the same in half precision, None if
    unknown or if `seconds` is already of half precision. source: of both figures."""

    seconds: float
    source: str
    half: float | None = None


def rate_of(config: Mapping[str, Any], device: str) -> Rate | None:
    """Times a pass of a resolved config's U-Net in float32, and on a GPU in bfloat16 too, in some ten seconds.
    The cache keeps the figure for a day. device: "cpu" or "gpu". None if this machine has no such device, or not the
    U-Net's config."""
    settings = Settings(config)
    backbone = settings.backbone
    if (device == "gpu") != (devices.number() > 0) or (device == "cpu" and backbone.name != SMALL):
        return None
    import torch  # diffusers with it takes seconds

    from realera.backbones import probe

    unet = probe.unet_config(backbone.pretrained)
    if unet is None or (device == "gpu" and not torch.cuda.is_available()):
        return None
    place = "cuda" if device == "gpu" else "cpu"
    name = torch.cuda.get_device_name() if device == "gpu" else f"CPU, {torch.get_num_threads()} threads"
    rows, images = int(backbone.text.max_length or USUAL_ROWS), settings.images_at_once
    file = paths.cache_dir() / FOLDER / f"{folders.digest([unet, rows, images, name, torch.__version__])}.json"
    if (kept := _kept(file)) is not None:
        return kept
    dtypes = ["float32", "bfloat16"] if device == "gpu" else ["float32"]
    seconds = []
    with console.bar("timing a pass of the denoiser", len(dtypes)) as advance:
        for dtype in dtypes:
            seconds.append(probe.seconds_per_pass(unet, rows, images, dtype, place))
            advance(1)
    source = f"timed on this machine: {name}, {images} images at once"
    rate = Rate(seconds[0], source, seconds[1] if len(seconds) > 1 else None)
    with suppress(OSError, UserError):  # a plan needs no cache
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(file, plain_data.json_text(asdict(rate)) + "\n")
    return rate


def _kept(file: Path) -> Rate | None:
    """The rate in a file of the cache; None if there is no such file, or if it is older than a day or not ours."""
    try:
        if time.time() - file.stat().st_mtime > DAY:
            return None
        found = plain_data.read_json(file)
    except (OSError, UserError, ValueError):
        return None
    if not isinstance(found, dict) or found.keys() != {"seconds", "source", "half"}:
        return None
    numbers = [found["seconds"]] if found["half"] is None else [found["seconds"], found["half"]]
    if not all(isinstance(one, float) and 0 < one < math.inf for one in numbers) or not isinstance(
        found["source"], str
    ):
        return None
    return Rate(found["seconds"], found["source"], found["half"])
