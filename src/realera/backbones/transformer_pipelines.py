"""Stable Diffusion 3 and FLUX pipelines in memory as backbones, and the choice between them and U-Net pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from realera.backbones import kinds, pipelines, text_marks
from realera.backbones.pipelines import IN_MEMORY, InMemory, PipelineBackbone, files_of, own_tokenizer, refuse_changed
from realera.backbones.transformer import TransformerBackbone
from realera.backbones.transformer_parts import TransformerParts
from realera.contracts import Sampler, UserError

KINDS = "a Stable Diffusion 1.x, 2.x, XL, 3, 3.5 or a FLUX.1"


class TransformerPipeline(InMemory, TransformerBackbone):
    """`contracts.Backbone` for the components of a Stable Diffusion 3 or FLUX pipeline. settings: those of
    conf/backbone that the components do not say: like, text, t5_length, reading."""

    network_part = "transformer"

    def __init__(self, pipe: DiffusionPipeline, name: str, sampler: Sampler, settings: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.vae_slicing = False
        self.parts = parts = parts_of(pipe)
        self.networks = parts.modules
        given = {key: settings[key] for key in ("text", "t5_length", "reading") if settings.get(key) is not None}
        self._init_from_parts(parts, name, sampler, settings["like"], **given)
        self.also = "" if parts.t5 is None else f" t5 {t5_of(parts)}"
        self.without = "text_encoder_3" if parts.kind == kinds.SD3 and parts.t5 is None else ""
        read = parts.clips if parts.t5 is None else [*parts.clips, parts.t5]
        self._describe([tokenizer for tokenizer, _ in read], parts.scheduler_config)

    def text_marks(self) -> dict[str, str]:
        return text_marks.of_transformer(self.parts)


Pipeline = PipelineBackbone | TransformerPipeline


def backbone_of(pipe: DiffusionPipeline, name: str, sampler: Sampler, settings: Mapping[str, Any]) -> Pipeline:
    """A pipeline in memory as a backbone. settings: of conf/backbone. Raises UserError for an unknown pipeline."""
    if getattr(pipe, "transformer", None) is not None:
        return TransformerPipeline(pipe, name, sampler, settings)
    return PipelineBackbone(pipe, name, sampler, settings.get("text"))


def for_maps(pipe: DiffusionPipeline) -> Pipeline:
    """A pipeline as a backbone that maps are applied to: its sampler is never used. Raises UserError for an unknown
    pipeline."""
    name, found = described(pipe)
    if getattr(pipe, "transformer", None) is None:
        return PipelineBackbone(pipe, name, Sampler())
    side = found["sampler"]
    return TransformerPipeline(pipe, name, Sampler("euler", **side), {"like": list(kinds.NETWORKS.values())})


def device_of(pipe: Any) -> Any:
    """The device of a pipeline's denoiser."""
    network = getattr(pipe, "transformer", None)
    return (pipe.unet if network is None else network).device


def described(pipe: DiffusionPipeline) -> tuple[str, dict[str, Any]]:
    """(name of the conf/backbone yaml to use for a pipeline, the backbone settings that come from the pipeline)."""
    if getattr(pipe, "transformer", None) is None:
        unet = pipelines.parts_of(pipe)
        return pipelines.kind_of(unet), pipelines.settings_of(pipe, unet)
    parts = parts_of(pipe)
    config = parts.transformer.config
    place = files_of(pipe, "transformer")
    side = 64 if parts.kind == kinds.FLUX else int(config.sample_size)
    pixels = 2 ** (len(parts.vae.config.block_out_channels) - 1) * side * (2 if parts.kind == kinds.FLUX else 1)
    found = {
        "pretrained": place[0] if place else IN_MEMORY,
        "dtype": str(next(parts.transformer.parameters()).dtype).removeprefix("torch."),
        "text": {"width": int(config.joint_attention_dim)},
        "sampler": {"height": pixels, "width": pixels},
    }
    if parts.kind == kinds.ONE_CLIP:
        return "mini-dit", found
    name = {kinds.SD3: "sd3-medium", kinds.FLUX: "flux-schnell"}[parts.kind]
    if parts.kind == kinds.FLUX and config.guidance_embeds:
        name = "flux-dev"
    if parts.kind == kinds.SD3 and config.dual_attention_layers:
        name = "sd35-medium"
    return name, {**found, "t5": t5_of(parts)}


def t5_of(parts: TransformerParts) -> Any:
    """The setting `t5` of loaded components."""
    if parts.t5 is None:
        return False
    dtype = str(next(parts.t5[1].parameters()).dtype).removeprefix("torch.")
    return dtype if dtype == "float32" else "bfloat16"


def parts_of(pipe: Any) -> TransformerParts:
    """A pipeline's components, in the form that `transformer_parts.load` returns. Raises UserError if they cannot be
    used."""
    network, vae = getattr(pipe.transformer, "_orig_mod", pipe.transformer), getattr(pipe, "vae", None)
    known = isinstance(network, SD3Transformer2DModel | FluxTransformer2DModel)
    if not known or not isinstance(vae, AutoencoderKL) or getattr(pipe, "scheduler", None) is None:
        raise UserError(
            f"The pipeline {type(pipe).__name__} is not supported: give {KINDS} with all of its components."
        )
    flux = isinstance(network, FluxTransformer2DModel)
    if network.config.in_channels != vae.config.latent_channels * (4 if flux else 1):
        raise UserError(
            f"The pipeline's transformer takes {network.config.in_channels} channels, as in models for filling or "
            "editing: give a text-to-image pipeline."
        )
    clips, t5 = [], None
    for suffix in ("", "_2", "_3"):
        model, tokenizer = (getattr(pipe, f"{part}{suffix}", None) for part in ("text_encoder", "tokenizer"))
        if model is None or tokenizer is None:
            continue
        if isinstance(model, T5EncoderModel):
            t5 = own_tokenizer(tokenizer), model
        else:
            clips.append((own_tokenizer(tokenizer), model))
    kind = kinds.FLUX if flux else kinds.SD3 if len(clips) > 1 else kinds.ONE_CLIP
    needed = {kinds.FLUX: 1, kinds.SD3: 2, kinds.ONE_CLIP: 1}[kind]
    projected = kind != kinds.SD3 or all(isinstance(model, CLIPTextModelWithProjection) for _, model in clips)
    if len(clips) != needed or (flux and t5 is None) or not projected:
        raise UserError(f"The pipeline {type(pipe).__name__} lacks a text encoder: load it with all of its components.")
    refuse_changed(network, "transformer", [*(model for _, model in clips), vae])
    return TransformerParts(kind, clips, t5, network, vae, dict(pipe.scheduler.config))
