"""The components of a checkpoint folder, loaded, frozen and in a known precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from realera.backbones.folder import read_json
from realera.contracts import UserError


@dataclass(frozen=True)
class Parts:
    """What `load` found. The scheduler is only its config: each sampling builds a fresh one."""

    tokenizer: PreTrainedTokenizerBase
    text_model: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]


def load(folder: Path, dtype: torch.dtype, channels_last: bool) -> Parts:
    """All components in eval mode, without gradients, on the CPU; the U-Net in `dtype`, the others in float32.

    Raises UserError where the files do not make a Stable Diffusion.
    """
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", use_fast=True, local_files_only=True)
            # Not asked of the library: transformers 5 keeps a file's float16 unless told, and renamed the option.
            text_model = _whole(CLIPTextModel, folder / "text_encoder").float()
            unet = _whole(UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
            vae = _whole(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The checkpoint {str(folder)!r} cannot be loaded ({reason}); give a whole Stable Diffusion folder."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of {str(folder)!r} gives no character offsets; save it with a tokenizer.json.")
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    return Parts(tokenizer, text_model, unet, vae, read_json(folder / "scheduler" / "scheduler_config.json"))


def refuse_other_text(name: str, promised: Mapping[str, Any], width: int, length: int, unet_width: int) -> None:
    """UserError unless text encoder, U-Net and the config's `text` node speak of the same states."""
    if width != unet_width:
        raise UserError(
            f"The text encoder of backbone {name} gives states of width {width} and its U-Net reads {unet_width}; give "
            "a checkpoint whose parts belong together."
        )
    for key, found in (("width", width), ("max_length", length)):
        wanted = promised.get(key, found)
        if wanted != found:
            raise UserError(
                f"backbone.text.{key} is {wanted} but the checkpoint's is {found}; set backbone.text.{key}={found} or "
                "choose the backbone that this checkpoint belongs to."
            )


def _whole(kind: Any, folder: Path, **options: Any) -> Any:
    """One model, frozen, every weight from the file: a missing one would silently stay random."""
    model, info = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if lost := sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"{folder.name} lacks {len(lost)} weights such as {lost[0]}")
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar over a second of loading."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
