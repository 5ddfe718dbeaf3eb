"""Loads the components of a diffusion transformer's folder, frozen and in a defined precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from realera.backbones import configs, fitting, folder, kinds, loading, vocabulary
from realera.backbones.common import Text
from realera.backbones.joint_text import FluxText, SD3Text, T5Encoder, quantise
from realera.backbones.text import TextEncoder
from realera.contracts import UserError
from realera.files.headers import read_json

T5 = Literal["float32", "bfloat16", "int8", False]
T5_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
T5_LENGTH = {kinds.SD3: 256, kinds.FLUX: 512}  # T5's token rows in diffusers' pipelines


@dataclass(frozen=True)
class TransformerParts:
    """The loaded components. clips: tokenizer and model of each CLIP. t5: T5's; None = left out, or there is none. Of
    the scheduler only the config is kept."""

    kind: kinds.Kind
    clips: list[tuple[PreTrainedTokenizerBase, CLIPTextModel | CLIPTextModelWithProjection]]
    t5: tuple[PreTrainedTokenizerBase, T5EncoderModel] | None
    transformer: SD3Transformer2DModel | FluxTransformer2DModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]

    @property
    def text_models(self) -> list[nn.Module]:
        models: list[nn.Module] = [model for _, model in self.clips]
        return models if self.t5 is None else [*models, self.t5[1]]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """{part: network}, as in a folder."""
        names = ["text_encoder", "text_encoder_2", "text_encoder_3"]
        return {**dict(zip(names, self.text_models)), "transformer": self.transformer, "vae": self.vae}


def load(place: Path, dtype: torch.dtype, t5: T5 | None) -> TransformerParts:
    """All components in eval mode, without gradients, on the CPU: the transformer in `dtype`, T5 as `t5` says (None =
    bfloat16), CLIP and the autoencoder in float32.

    Raises UserError if the files are not those of a Stable Diffusion 3 or FLUX, or if `t5` does not fit them.
    """
    kind = kinds.of(place)
    fitting.refuse_other_denoiser(place, kind, transformer=True)
    encoders = kinds.encoders(kind, place)
    forms = {part: kinds.form(kind, part) for part in encoders}
    fitting.refuse_t5(kind, t5, kinds.T5 in forms.values())
    projected = CLIPTextModelWithProjection if kind == kinds.SD3 else CLIPTextModel
    network = FluxTransformer2DModel if kind == kinds.FLUX else SD3Transformer2DModel
    clips, third = [], None
    try:
        with loading.quiet():
            for part, form in forms.items():
                tokens = folder.place_of(place, part.replace("text_encoder", "tokenizer"))
                if form != kinds.T5:
                    config = loading.clip_settings(projected, folder.place_of(place, part))
                    clips.append((loading.tokenizer(tokens), loading.model(projected, place, part, config=config)))
                elif t5 is not False:
                    third = _t5_tokenizer(tokens), _t5(place, part, t5 or "bfloat16")
            transformer = loading.model(network, place, "transformer", torch_dtype=dtype)
            vae = loading.model(AutoencoderKL, place, "vae", torch_dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # constructors raise anything for settings that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The checkpoint {str(place)!r} cannot be loaded ({reason}); give a complete folder of Stable Diffusion 3 "
            "or FLUX."
        ) from error
    own = [part for part in encoders if forms[part] != kinds.T5]
    checked: Mapping[str, nn.Module] = {
        **{part: model for part, (_, model) in zip(own, clips)},
        "transformer": transformer,
        "vae": vae,
    }
    loading.refuse_not_finite(place, checked, dtype)
    scheduler = read_json(folder.settings_file(place, "scheduler"))
    return TransformerParts(kind, clips, third, transformer, vae, scheduler)


def text_encoder(parts: TransformerParts, t5_length: int | None) -> Text:
    """The encoder of prompts for this checkpoint's transformer. Raises UserError if their widths do not fit."""
    config = parts.transformer.config
    width, pooled = int(config.joint_attention_dim), int(config.pooled_projection_dim)
    if parts.kind == kinds.ONE_CLIP:
        if t5_length is not None:
            raise UserError("backbone.t5_length has no effect, because this checkpoint has no T5: leave it out.")
        text: Text = TextEncoder(*parts.clips[0], pooled=True)
    else:
        rows = T5_LENGTH[parts.kind] if t5_length is None else t5_length
        t5 = None if parts.t5 is None else T5Encoder(*parts.t5, rows)
        if parts.kind == kinds.SD3:
            one, two = (TextEncoder(*clip, penultimate=True) for clip in parts.clips)
            text = SD3Text(one, two, t5, width, rows)
        else:
            assert t5 is not None
            text = FluxText(TextEncoder(*parts.clips[0], pooled=True), t5)
    own = text.width if parts.t5 is None else int(parts.t5[1].config.d_model)
    for name, found, reads in (("states", own, width), ("pooled states", text.pooled_width, pooled)):
        if found != reads:
            raise UserError(
                f"The text encoders give {name} of width {found} and the transformer reads {reads}; give a checkpoint "
                "whose parts fit together."
            )
    return text


def _t5(place: Path, part: str, precision: str) -> T5EncoderModel:
    settings = configs.t5_settings(read_json(folder.settings_file(place, part)))
    config = T5Config(**settings, dtype=str(T5_DTYPES[precision]).removeprefix("torch."))
    model: T5EncoderModel = loading.model(T5EncoderModel, place, part, config=config, dtype=T5_DTYPES[precision])
    if precision == "int8":
        quantise(model)
    return model


def _t5_tokenizer(place: Path) -> PreTrainedTokenizerBase:
    """As `loading.tokenizer`, with T5's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=loading.copy_of(vocabulary.read(place)),
        model_max_length=vocabulary.FAR,
        model_input_names=["input_ids", "attention_mask"],
        **vocabulary.T5_SPECIAL,
    )
