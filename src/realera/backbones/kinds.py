"""The kinds of checkpoints, by their files, and which parts each kind has. It does not import torch.

A folder with transformer/ is a diffusion transformer: Stable Diffusion 3 and 3.5 (two CLIPs and, optionally, T5),
FLUX.1 (CLIP and T5), or a small Stable Diffusion 3 with one CLIP, as the built-in one. Every other folder is a U-Net's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from realera.files.headers import read_json

Kind = Literal["unet", "sd3", "flux", "one-clip"]
UNET: Kind = "unet"
SD3: Kind = "sd3"
FLUX: Kind = "flux"
ONE_CLIP: Kind = "one-clip"
SEVERAL_SPLITS = (SD3, FLUX)  # their text encoders, CLIP and T5, split a name into different numbers of tokens
MINI_DIT = "mini-dit"  # as backbone.pretrained: the built-in transformer
T5 = "t5"  # the form of T5's settings
T5_EMBEDDING = "shared.weight"
SHARED = ("text_encoder", "tokenizer", "vae")  # parts that the built-in transformer has in common with the U-Net
MODELS = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model", "text_encoder_3": "model"}
NETWORKS = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
DENOISERS = {"unet": "U-Net", "transformer": "transformer"}  # {part: its name in a sentence}


def of(folder: Path) -> Kind:
    """The kind of a checkpoint folder, which may be incomplete."""
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        return SD3 if (folder / "transformer").is_dir() else UNET
    found = NETWORKS.get(str(read_json(config).get("_class_name")), SD3)
    if found == SD3 and not (folder / "text_encoder_2").is_dir() and not _lists(folder, "text_encoder_2"):
        return ONE_CLIP
    return found


def denoiser(folder: Path) -> str:
    """The part that predicts the noise: a key of `DENOISERS`."""
    return "unet" if of(folder) == UNET else "transformer"


def encoders(kind: Kind, folder: Path) -> list[str]:
    """The text encoders' parts in their order. Stable Diffusion 3's third, T5, may be missing."""
    if kind == UNET:
        return ["text_encoder", "text_encoder_2"]
    if kind == ONE_CLIP:
        return ["text_encoder"]
    if kind == FLUX:
        return ["text_encoder", "text_encoder_2"]
    third = ["text_encoder_3"] if (folder / "text_encoder_3").is_dir() or _lists(folder, "text_encoder_3") else []
    return ["text_encoder", "text_encoder_2", *third]


def left_out(folder: Path) -> dict[str, None]:
    """The keywords that diffusers' from_pretrained must be given as None: those of a Stable Diffusion 3 without T5."""
    lacks = of(folder) == SD3 and "text_encoder_3" not in encoders(SD3, folder)
    return dict.fromkeys(("text_encoder_3", "tokenizer_3")) if lacks else {}


def parts(kind: Kind, folder: Path) -> list[str]:
    """The networks of a transformer's checkpoint."""
    return [*encoders(kind, folder), "transformer", "vae"]


def form(kind: Kind, part: str) -> str:
    """The form of a part's settings: a key of `configs.CHECKS`."""
    if kind != UNET and part == "scheduler":
        return "flow_scheduler"
    if part == "text_encoder_3" or (kind == FLUX and part == "text_encoder_2"):
        return T5
    return kind_of_transformer(kind) if part == "transformer" else part


def kind_of_transformer(kind: Kind) -> str:
    return "flux_transformer" if kind == FLUX else "sd3_transformer"


def patch(folder: Path) -> int:
    """Latents of a transformer's image token, on each side."""
    config = read_json(folder / "transformer" / "config.json")
    return 2 if config.get("_class_name") == "FluxTransformer2DModel" else int(config.get("patch_size", 2))


def _lists(folder: Path, part: str) -> bool:
    """Whether the folder's index names a class for this part."""
    index = folder / "model_index.json"
    named = read_json(index).get(part) if index.is_file() else None
    return isinstance(named, list) and any(named)
