"""What a pass of the denoiser, and of the text encoder, takes on this machine. Plans are made from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from realera import console, paths
from realera.contracts import UserError
from realera.files import plain_data
from realera.runs import folders
from realera.settings.run_settings import BackboneSettings, Settings
from realera.system import cores, devices, disk

FOLDER = "timings"  # of the cache
DAY = 86_400.0  # seconds; an older figure is measured again
USUAL_ROWS = 77  # token rows of a prompt, in most text encoders
SHARE = 0.3  # of the cores; if more are busy before a pass is timed on the CPU, the next plan times it again
SMALL = "mini"  # the only backbone that is timed on a CPU: elsewhere a pass takes minutes


@dataclass(frozen=True)
class Rate:
    """seconds: of one pass of the denoiser (one latent, one timestep) or of the text encoder (one text). half: the same
    in half precision, None if unknown or if `seconds` is already of half precision. source: of both figures."""

    seconds: float
    source: str
    half: float | None = None


def rate_of(config: Mapping[str, Any], device: str) -> Rate | None:
    """Times a pass of a resolved config's U-Net in float32, and on a GPU in bfloat16 too, in some ten seconds.
    The cache keeps the figure for a day. device: "cpu" or "gpu". None if this machine has no such device, or not the
    U-Net's config."""
    settings = Settings(config)
    if (machine := _machine(settings.backbone, device)) is None:
        return None
    from realera.backbones import probe

    if (unet := probe.unet_config(settings.backbone.pretrained)) is None:
        return None
    rows, images = int(settings.backbone.text.max_length or USUAL_ROWS), settings.images_at_once
    dtypes = ["float32", "bfloat16"] if device == "gpu" else ["float32"]

    def timed() -> Rate:
        seconds = []
        with console.bar("timing a pass of the denoiser", len(dtypes)) as advance:
            for dtype in dtypes:
                seconds.append(probe.seconds_per_pass(unet, rows, images, dtype, machine.place))
                advance(1)
        source = f"timed on this machine: {machine.name}, {images} images at once"
        return Rate(seconds[0], source, seconds[1] if len(seconds) > 1 else None)

    return _once_a_day([unet, rows, images, machine.name, machine.torch], timed)


def text_rate_of(config: Mapping[str, Any], device: str) -> Rate | None:
    """As `rate_of`, for a text of full length through the text encoder, which is always in float32; None for several
    text encoders that the timing does not know (those of diffusion transformers)."""
    backbone = Settings(config).backbone
    if (machine := _machine(backbone, device)) is None:
        return None
    from realera.backbones import probe

    if not (encoders := probe.text_configs(backbone.pretrained)):
        return None
    rows = int(backbone.text.max_length or USUAL_ROWS)

    def timed() -> Rate:
        with console.bar("timing a pass of the text encoder", 1) as advance:
            seconds = sum(probe.seconds_per_text(one, rows, machine.place) for one in encoders)
            advance(1)
        return Rate(seconds, f"timed on this machine: {machine.name}, {probe.TEXTS} texts at once")

    return _once_a_day(["text", encoders, rows, machine.name, machine.torch], timed)


@dataclass(frozen=True)
class Machine:
    """name: for people. place: torch's name of the device. torch: its version."""

    name: str
    place: str
    torch: str


def _machine(backbone: BackboneSettings, device: str) -> Machine | None:
    """The device on which a backbone is timed; None if this machine has no such device, or would take minutes."""
    if (device == "gpu") != (devices.number() > 0) or (device == "cpu" and backbone.name != SMALL):
        return None
    import torch  # takes seconds

    cores.limit_threads()
    if device == "gpu" and not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name() if device == "gpu" else f"CPU, {torch.get_num_threads()} threads"
    return Machine(name, "cuda" if device == "gpu" else "cpu", str(torch.__version__))


def _once_a_day(about: Sequence[Any], timed: Callable[[], Rate]) -> Rate:
    """The rate that the cache has for `about`, or else a new one, which is kept, unless other work slowed it down."""
    file = paths.cache_dir() / FOLDER / f"{folders.digest(list(about))}.json"
    if (kept := _kept(file)) is not None:
        return kept
    slowed = devices.number() == 0 and cores.busy() > SHARE
    rate = timed()
    if slowed:
        return replace(rate, source=f"{rate.source}, while other work ran")
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
