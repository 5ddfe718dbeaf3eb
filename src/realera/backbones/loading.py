"""Loads the components of a checkpoint folder, frozen and in a defined precision."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from realera.backbones import configs, fitting, folder, vocabulary
from realera.backbones import kinds as kinds_of
from realera.backbones.text import PairedTextEncoder, TextEncoder
from realera.contracts import UserError
from realera.files import finite, headers, plain_data
from realera.files.headers import read_json
from realera.setting_types import Count, Number, Positive

Rows = Annotated[int, Number(3, 4096, whole=True)]


class TextFigures(TypedDict, total=False):
    """width D, row_norm (mean norm of the text-state rows of a concept's name), max_length T."""

    width: Count
    row_norm: Positive
    max_length: Rows


log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes of a file that are checked at once
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors' spelling


@dataclass(frozen=True)
class Parts:
    """The loaded components. Of the scheduler only the config is kept; each sampling builds a new scheduler.
    tokenizers, text_models: one of each, or two if `xl`. zeros_for_no_prompt: see `folder`."""

    tokenizers: list[PreTrainedTokenizerBase]
    text_models: list[CLIPTextModel | CLIPTextModelWithProjection]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    xl: bool
    zeros_for_no_prompt: bool


def load(place: Path, dtype: torch.dtype, channels_last: bool) -> Parts:
    """All components in eval mode, without gradients, on the CPU; the U-Net in `dtype`, the others in float32.

    The autoencoder is always float32, because that of SDXL gives black images in float16.

    Raises UserError if the files are not those of a Stable Diffusion.
    """
    fitting.refuse_other_denoiser(place, kinds_of.of(place), transformer=False)
    xl = folder.is_xl(place)
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if xl:
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    try:
        with quiet():
            tokenizers = [tokenizer(place / part) for part in folder.tokenizers(place)]
            text_models = [
                model(kind, place, part, config=clip_settings(kind, place / part)) for part, kind in kinds.items()
            ]
            unet = model(UNet2DConditionModel, place, "unet", torch_dtype=dtype)
            vae = model(AutoencoderKL, place, "vae", torch_dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # constructors raise anything for settings that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The checkpoint {str(place)!r} cannot be loaded ({reason}); give a complete Stable Diffusion folder."
        ) from error
    refuse_not_finite(place, {**dict(zip(kinds, text_models)), "unet": unet, "vae": vae}, dtype)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    scheduler = read_json(place / "scheduler" / "scheduler_config.json")
    return Parts(tokenizers, text_models, unet, vae, scheduler, xl, folder.zeros_for_no_prompt(place))


def text_encoder(parts: Parts, length: int | None) -> TextEncoder | PairedTextEncoder:
    """The encoder of prompts for this checkpoint's U-Net."""
    encoders = [
        TextEncoder(tokenizer, model, length, penultimate=parts.xl)
        for tokenizer, model in zip(parts.tokenizers, parts.text_models, strict=True)
    ]
    return PairedTextEncoder(*encoders) if parts.xl else encoders[0]


def refuse_not_finite(place: Path, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Checks all weights in one pass. The billion weights of Stable Diffusion 1.x take a second on one core."""
    for part, model in parts.items():
        is_half = part in ("unet", "transformer") and dtype == torch.float16
        remedy = "set backbone.dtype=bfloat16, or " if is_half else ""
        whose = f"The checkpoint {str(place / part)!r} cannot be used{' in float16' if is_half else ''}: its weight"
        files = folder.part_files(place, part)[1]
        as_stored = {stored.dtype for file in files for stored in headers.tensors(file).values()}
        if as_stored == {STORED[next(model.parameters()).dtype]}:
            for file in files:
                for block in _blocks(file, next(model.parameters()).dtype):
                    finite.refuse([block], whose, f"{remedy}copy or download it again")
        else:
            finite.refuse(model.state_dict(), whose, f"{remedy}copy or download it again")


def _blocks(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, numbers) of a file, block by block, in one reused buffer. Weights that are not converted are
    memory-mapped and take no memory until they are used; checking them through the mapping would load them all."""
    buffer = memoryview(bytearray(BLOCK))
    with plain_data.opened(file) as stream:
        for name, (begin, stop) in headers.byte_ranges(file).items():
            stream.seek(begin)
            for start in range(begin, stop, BLOCK):
                size = stream.readinto(buffer[: stop - start])  # type: ignore[attr-defined]  # not typed in BinaryIO
                yield name, torch.frombuffer(buffer[:size], dtype=dtype)


def refuse_other_text(
    name: str, promised: Mapping[str, Any], text: TextEncoder | PairedTextEncoder, unet: Mapping[str, Any]
) -> None:
    """Raises UserError unless text encoder, U-Net config and the `text` settings have the same width and length."""
    width, length = text.width, text.length
    if width != unet["cross_attention_dim"]:
        raise UserError(
            f"The text encoder of backbone {name} gives states of width {width} and its U-Net reads "
            f"{unet['cross_attention_dim']}; give a checkpoint whose parts fit together."
        )
    if text.pooled_width:
        reads = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]  # 6 image sizes
        if reads != text.pooled_width:
            raise UserError(
                f"The second text encoder of backbone {name} gives pooled states of width {text.pooled_width} and its "
                f"U-Net reads {reads}, not counting the image sizes; give a checkpoint whose parts fit together."
            )
    fitting.refuse_other_text(promised, {"width": width, "max_length": length})


def tokenizer(place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `vocabulary` reads and checks. transformers' own loader would follow the folder's settings and
    could even run code from the folder."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy_of(vocabulary.read(place)),
        model_max_length=vocabulary.longest(place),
        model_input_names=["input_ids", "attention_mask"],
        **vocabulary.special(place),
    )


def copy_of(tokenizer: Any) -> Any:
    """A copy of a tokenizer that `vocabulary` keeps: truncation and padding are set in it."""
    return copy.deepcopy(tokenizer)


def clip_settings(kind: Any, place: Path) -> Any:
    """A text encoder's config, made only of the settings that are accepted from a checkpoint."""
    return kind.config_class.from_dict(configs.text_settings(read_json(place / "config.json")))


def model(kind: Any, place: Path, part: str, **options: Any) -> Any:
    """One frozen model. Raises ValueError if a weight is not in the files: it would silently stay random."""
    if variant := folder.part_files(place, part)[0]:
        options["variant"] = variant
    loaded, info = kind.from_pretrained(
        folder.place_of(place, part), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if lost := sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"{part} lacks {len(lost)} weights such as {lost[0]}")
    if more := [str(name) for name in info["unexpected_keys"] if not str(name).endswith("position_ids")]:
        log.warning("%s has %d tensors that its model does not use, such as %s", place / part, len(more), min(more))
    frozen: nn.Module = loaded.eval().requires_grad_(False)
    return frozen


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bar inside this context."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
