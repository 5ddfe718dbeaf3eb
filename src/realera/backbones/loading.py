"""The components of a checkpoint folder, loaded, frozen and in a known precision."""

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

from realera.backbones import configs, folder, vocabulary
from realera.backbones.text import PairedTextEncoder, TextEncoder
from realera.contracts import UserError
from realera.files import finite, headers, plain_data
from realera.setting_types import Count, Number, Positive

Rows = Annotated[int, Number(3, 4096, whole=True)]


class TextFigures(TypedDict, total=False):
    """width D, row_norm (mean norm of the rows a concept stands in), max_length T."""

    width: Count
    row_norm: Positive
    max_length: Rows


log = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes of a file that are looked at together
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors' spelling


@dataclass(frozen=True)
class Parts:
    """What `load` found. The scheduler is only its config: each sampling builds a fresh one. tokenizers, text_models:
    one of each, and two where `xl`. zeros_for_no_prompt: see `folder`."""

    tokenizers: list[PreTrainedTokenizerBase]
    text_models: list[CLIPTextModel | CLIPTextModelWithProjection]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    xl: bool
    zeros_for_no_prompt: bool


def load(place: Path, dtype: torch.dtype, channels_last: bool) -> Parts:
    """All components in eval mode, without gradients, on the CPU; the U-Net in `dtype`, the others in float32.

    The autoencoder stays in float32 whatever the U-Net's precision: SDXL's gives black images in float16.

    Raises UserError where the files do not make a Stable Diffusion.
    """
    xl = folder.is_xl(place)
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    if xl:
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    try:
        with quiet():
            tokenizers = [_tokenizer(place / part) for part in folder.tokenizers(place)]
            text_models = [
                _whole(kind, place, part, config=_settings(kind, place / part)) for part, kind in kinds.items()
            ]
            unet = _whole(UNet2DConditionModel, place, "unet", torch_dtype=dtype)
            vae = _whole(AutoencoderKL, place, "vae", torch_dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor makes of settings that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The checkpoint {str(place)!r} cannot be loaded ({reason}); give a whole Stable Diffusion folder."
        ) from error
    _refuse_not_finite(place, {**dict(zip(kinds, text_models)), "unet": unet, "vae": vae}, dtype)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    scheduler = folder.read_json(place / "scheduler" / "scheduler_config.json")
    return Parts(tokenizers, text_models, unet, vae, scheduler, xl, folder.zeros_for_no_prompt(place))


def text_encoder(parts: Parts, length: int | None) -> TextEncoder | PairedTextEncoder:
    """What turns prompts into the states that this checkpoint's U-Net reads."""
    encoders = [
        TextEncoder(tokenizer, model, length, penultimate=parts.xl)
        for tokenizer, model in zip(parts.tokenizers, parts.text_models, strict=True)
    ]
    return PairedTextEncoder(*encoders) if parts.xl else encoders[0]


def _refuse_not_finite(place: Path, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """One pass over all weights: a second for the billion of Stable Diffusion 1.x, on one core."""
    for part, model in parts.items():
        small = part == "unet" and dtype == torch.float16
        remedy = "set backbone.dtype=bfloat16, or " if small else ""
        whose = f"The checkpoint {str(place / part)!r} cannot be used{' in float16' if small else ''}: its weight"
        files = folder.part_files(place, part)[1]
        as_stored = {stored.dtype for file in files for stored in headers.tensors(file).values()}
        if as_stored == {STORED[next(model.parameters()).dtype]}:
            for file in files:
                for block in _blocks(file, next(model.parameters()).dtype):
                    finite.refuse([block], whose, f"{remedy}copy or download it again")
        else:
            finite.refuse(model.state_dict(), whose, f"{remedy}copy or download it again")


def _blocks(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A file's numbers under their tensor's name, part by part, in one buffer. Weights that are not converted are
    mapped from their file, and take no memory before they are used: so they are not looked at where they are mapped."""
    buffer = memoryview(bytearray(BLOCK))
    with plain_data.opened(file) as stream:
        for name, (begin, stop) in headers.places(file).items():
            stream.seek(begin)
            for start in range(begin, stop, BLOCK):
                size = stream.readinto(buffer[: stop - start])  # type: ignore[attr-defined]  # BinaryIO does not say so
                yield name, torch.frombuffer(buffer[:size], dtype=dtype)


def refuse_other_text(
    name: str, promised: Mapping[str, Any], text: TextEncoder | PairedTextEncoder, unet: Mapping[str, Any]
) -> None:
    """UserError unless text encoder, U-Net (its config) and the config's `text` node speak of the same states."""
    width, length = text.width, text.length
    if width != unet["cross_attention_dim"]:
        raise UserError(
            f"The text encoder of backbone {name} gives states of width {width} and its U-Net reads "
            f"{unet['cross_attention_dim']}; give a checkpoint whose parts belong together."
        )
    if text.pooled_width:
        reads = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]  # six sizes
        if reads != text.pooled_width:
            raise UserError(
                f"The second text encoder of backbone {name} gives pooled states of width {text.pooled_width} and its "
                f"U-Net reads {reads} (sizes apart); give a checkpoint whose parts belong together."
            )
    for key, found in (("width", width), ("max_length", length)):
        wanted = promised.get(key, found)
        if wanted != found:
            raise UserError(
                f"backbone.text.{key} is {wanted} but the checkpoint's is {found}; set backbone.text.{key}={found} or "
                "choose the backbone that this checkpoint belongs to."
            )


def _tokenizer(place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `vocabulary` reads and checks. transformers' own loader would follow the folder's settings, to
    code that lies in it among others."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(vocabulary.read(place)),
        model_max_length=vocabulary.longest(place),
        model_input_names=["input_ids", "attention_mask"],
        **vocabulary.special(place),
    )


def _settings(kind: Any, place: Path) -> Any:
    """A text encoder's config, of the settings that are taken from a checkpoint."""
    return kind.config_class.from_dict(configs.text_settings(folder.read_json(place / "config.json")))


def _whole(kind: Any, place: Path, part: str, **options: Any) -> Any:
    """One model, frozen, every weight from the file: a missing one would silently stay random."""
    if variant := folder.part_files(place, part)[0]:
        options["variant"] = variant
    model, info = kind.from_pretrained(
        place / part, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if lost := sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"{part} lacks {len(lost)} weights such as {lost[0]}")
    if more := [str(name) for name in info["unexpected_keys"] if not str(name).endswith("position_ids")]:
        log.warning("%s holds %d tensors that its model has not, such as %s", place / part, len(more), sorted(more)[0])
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar over a second of loading."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
