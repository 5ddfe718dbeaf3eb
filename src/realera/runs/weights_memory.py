"""How much memory the weights of a base model take, and how much is downloaded, for plans. It does not import torch.

The figures are numbers of weights times bytes: of the files if they are on this machine, otherwise of the published
checkpoints. Activations and gradients are not in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from realera.backbones import folder, kinds
from realera.contracts import UserError
from realera.files.headers import tensors
from realera.runs import suitability
from realera.settings.run_settings import BackboneSettings

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.")
WORTH_SAYING = 1.0  # GB
WORTH_SAVING = 8.0  # GB: from here on the sentence names the settings that need less


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights. clip: of all CLIPs. t5_tokens: T5's token embeddings, which int8 leaves alone. resident: of
    the denoiser, with sequential offloading: everything outside of the blocks, and the largest block. stored: bytes of
    a weight in the hub's files."""

    denoiser: int
    clip: int
    vae: int
    t5: int = 0
    t5_tokens: int = 0
    resident: int = 0
    stored: int = 4


CLIP_L, CLIP_L_PROJECTED, BIG_G = 123_060_480, 123_650_304, 694_659_840
T5 = {"t5": 4_762_310_656, "t5_tokens": 32_128 * 4096}
VAE, VAE_16 = 83_653_863, 83_819_683  # latents of 4 and of 16 channels
SD1 = Sizes(859_520_964, CLIP_L, VAE)
FLUX = Sizes(11_901_408_320, CLIP_L, VAE_16, resident=403_956_288, stored=2, **T5)
# Counted in tests/runs/test_weights_memory.py, by the published settings.
PUBLISHED: Mapping[str, Sizes] = {
    "sd14": SD1,
    "sd15": SD1,
    "sd21": Sizes(865_910_724, 340_387_840, VAE),
    "sdxl": Sizes(2_567_463_684, CLIP_L + BIG_G, VAE),
    "sd3-medium": Sizes(2_084_951_104, CLIP_L_PROJECTED + BIG_G, VAE_16, resident=161_080_384, stored=2, **T5),
    "sd35-medium": Sizes(2_469_663_936, CLIP_L_PROJECTED + BIG_G, VAE_16, resident=347_475_904, stored=2, **T5),
    "flux-dev": FLUX,
    "flux-schnell": FLUX,
}


@dataclass(frozen=True)
class Precision:
    """The settings of a backbone that its memory depends on."""

    dtype: str
    t5: str | bool
    offload: bool

    @classmethod
    def of(cls, backbone: BackboneSettings) -> Precision:
        t5 = "bfloat16" if backbone.t5 is None else backbone.t5
        return cls(backbone.dtype, t5, backbone.offload == "sequential")

    def gigabytes(self, sizes: Sizes) -> tuple[float, float, float]:
        """Of the denoiser, the text encoders and the autoencoder, on the GPU while images are drawn."""
        denoiser = sizes.resident if self.offload else sizes.denoiser
        clip, vae = BYTES["float32"] * sizes.clip, BYTES["float32"] * sizes.vae
        t5 = 0
        if self.t5 == "int8":
            t5 = sizes.t5 + sizes.t5_tokens  # a byte for a weight, two for an embedding
        elif self.t5:
            t5 = BYTES[str(self.t5)] * sizes.t5
        return BYTES[self.dtype] * denoiser / GB, (clip + t5) / GB, vae / GB

    def smaller(self, sizes: Sizes, trains_weights: bool) -> tuple[Precision, list[str]]:
        """The precision that needs the least memory, and the settings that choose it. trains_weights: the method trains
        the denoiser's own weights, which must be float32 and on the GPU."""
        found = self
        words: list[str] = []
        if self.dtype == "float32" and not trains_weights:
            found, words = replace(found, dtype="bfloat16"), [*words, "backbone.dtype=bfloat16"]
        if sizes.resident and not self.offload and not trains_weights:
            found, words = replace(found, offload=True), [*words, "backbone.offload=sequential"]
        if sizes.t5 and self.t5 not in ("int8", False):
            found, words = replace(found, t5="int8"), [*words, "backbone.t5=int8"]
        return found, words


def sentences(backbone: BackboneSettings, trains_weights: bool) -> list[str]:
    """For a plan: the GPU memory of the weights, with the settings that need less if it is much, and the size of the
    download. [] for a small model, and for one whose size is not known."""
    place = folder.on_disk(backbone.pretrained)
    try:
        sizes = PUBLISHED.get(str(backbone.name)) if place is None else of_folder(place)
    except (UserError, OSError, ValueError):  # its loading says why
        return []
    if sizes is None:
        return []
    own = Precision.of(backbone)
    denoiser, text, vae = own.gigabytes(sizes)
    total = denoiser + text + vae
    if total < WORTH_SAYING:
        return []
    network = "U-Net" if suitability.kind_of(backbone, place) == kinds.UNET else "transformer"
    part = ", one block at a time" if own.offload else ""
    said = (
        f"memory, computed and not measured: {total:.1f} GB of the GPU for the weights ({network} in {own.dtype}"
        f"{part} {denoiser:.1f}, text encoders {text:.1f}, autoencoder {vae:.1f}); activations and gradients need more."
    )
    smaller, words = own.smaller(sizes, trains_weights)
    if words and total >= WORTH_SAVING:
        said += f" With {' '.join(words)}: {sum(smaller.gigabytes(sizes)):.1f} GB."
    found = [said]
    if place is None and folder.HUB_ID.fullmatch(str(backbone.pretrained)):
        weights = sizes.denoiser + sizes.clip + sizes.vae + sizes.t5
        found.append(f"download: about {sizes.stored * weights / GB:.0f} GB, once.")
    return found


def of_folder(place: Path) -> Sizes:
    """Counted from the headers of a checkpoint's files."""
    kind = kinds.of(place)
    network = kinds.denoiser(place)
    counts = {"clip": 0, "vae": 0, "t5": 0, "t5_tokens": 0, "denoiser": 0}
    blocks: dict[str, int] = {}
    for part in folder.models(place):
        form = kinds.form(kind, part)
        key = "denoiser" if part == network else "vae" if part == "vae" else "t5" if form == kinds.T5 else "clip"
        for file in folder.part_files(place, part)[1]:
            for name, stored in tensors(file).items():
                number = prod(stored.shape)
                counts[key] += number
                if key == "t5" and name.endswith(kinds.T5_EMBEDDING):
                    counts["t5_tokens"] += number
                if key == "denoiser" and kind != kinds.UNET and (block := BLOCK.match(name)):
                    blocks[block[1]] = blocks.get(block[1], 0) + number
    resident = counts["denoiser"] - sum(blocks.values()) + max(blocks.values()) if blocks else 0
    return Sizes(**counts, resident=resident)
