"""Checks a checkpoint's settings files and file headers. It does not import torch, so errors are reported fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realera.contracts import UserError
from realera.files.headers import Stored

MOST = 10_000_000  # largest accepted count, of rows or channels
LAYERS = 1000  # most layers of a network
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "relu", "silu", "swish", "mish", "tanh", "sigmoid")
TIMESTEPS = 1000  # in the training of every Stable Diffusion
FLOATS = ("F16", "BF16", "F32", "F64")
COUNTERS = ("position_ids", "num_batches_tracked")  # integer tensors; they are not used
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
Check = tuple[str, Callable[[Any], bool]]


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAYERS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _are(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(test, value))


def _or(*tests: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(test(value) for test in tests)


WHOLE: Check = ("a whole number above 0", _is_whole)
WHOLES: Check = ("a list of whole numbers above 0", _are(_is_whole))
WHOLE_OR_WHOLES: Check = ("a whole number above 0, or a list of them", _or(_is_whole, _are(_is_whole)))
SIDES: Check = (
    "a whole number above 0, a list of them, or null",
    lambda value: value is None or WHOLE_OR_WHOLES[1](value),
)
FEW: Check = (f"a whole number from 1 to {LAYERS}", lambda value: _is_whole(value) and value <= LAYERS)
FEW_OR_FEWS: Check = (f"{FEW[0]}, or a list of them", _or(FEW[1], _are(FEW[1])))
NUMBER: Check = ("a number above 0", _is_number)
NAMES: Check = ("a list of names", _are(lambda value: isinstance(value, str)))
UNET: Check = ("UNet2DConditionModel", lambda value: value == "UNet2DConditionModel")
VAE: Check = ("AutoencoderKL", lambda value: value == "AutoencoderKL")
CLIP: Check = ("clip_text_model", lambda value: value in ("clip_text_model", "clip"))
SCHEDULER: Check = (
    "a scheduler that adds noise (not one of flow matching)",
    lambda value: isinstance(value, str) and value.endswith("Scheduler") and not value.startswith("FlowMatch"),
)
FLOW: Check = ("FlowMatchEulerDiscreteScheduler", lambda value: value == "FlowMatchEulerDiscreteScheduler")
T5: Check = ("t5", lambda value: value == "t5")
OFF: Check = ("false or null, because this is not supported", lambda value: value is False or value is None)
WHOLE_OR_NONE: Check = ("a list of whole numbers, or null", lambda v: v is None or v == [] or _are(_is_count)(v))
TOKEN: Check = ("a token id", lambda value: type(value) is int and 0 <= value <= MOST)
SHARE: Check = ("a number from 0 to below 1", lambda value: type(value) in (int, float) and 0 <= value < 1)
ACTIVATION: Check = ("one of " + ", ".join(ACTIVATIONS), lambda value: value in ACTIVATIONS)
TRUTH: Check = ("true or false", lambda value: type(value) is bool)
T5_TEXT: dict[str, Check] = {  # the settings of a T5 encoder that are used (see `t5_settings`), and "model_type"
    "model_type": T5,
    **dict.fromkeys(("d_model", "d_kv", "d_ff", "vocab_size"), WHOLE),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), WHOLE),
    **dict.fromkeys(("num_layers", "num_heads"), FEW),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "decoder_start_token_id"), TOKEN),
    "layer_norm_epsilon": NUMBER,
    "dropout_rate": SHARE,
    "feed_forward_proj": ("gated-gelu, relu or gated-silu", lambda v: v in ("gated-gelu", "relu", "gated-silu")),
}
TEXT: dict[str, Check] = {  # the settings of a text encoder that are used (see `text_settings`), and "model_type"
    "model_type": CLIP,
    **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), WHOLE),
    **dict.fromkeys(("projection_dim", "vocab_size"), WHOLE),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), FEW),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": NUMBER,
    "attention_dropout": SHARE,
}
# Settings that make a library load code, other kernels or quantised weights.
NEVER = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
CHECKS: Mapping[
    str, Mapping[str, Check]
] = {  # the check of each key, if it is present; otherwise the library's default is used
    "unet": {
        "_class_name": UNET,
        **dict.fromkeys(("in_channels", "out_channels", "cross_attention_dim"), WHOLE),
        **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), FEW_OR_FEWS),
        "attention_head_dim": WHOLE_OR_WHOLES,
        "norm_num_groups": WHOLE,
        "norm_eps": NUMBER,
        "act_fn": ACTIVATION,
        "sample_size": SIDES,
        "block_out_channels": WHOLES,
        "down_block_types": NAMES,
        "up_block_types": NAMES,
    },
    "vae": {
        "_class_name": VAE,
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), WHOLE),
        "layers_per_block": FEW,
        "act_fn": ACTIVATION,
        "scaling_factor": NUMBER,
        "block_out_channels": WHOLES,
        "down_block_types": NAMES,
        "up_block_types": NAMES,
    },
    "text_encoder": TEXT,
    "text_encoder_2": TEXT,
    "t5": T5_TEXT,
    "sd3_transformer": {
        "_class_name": ("SD3Transformer2DModel", lambda value: value == "SD3Transformer2DModel"),
        **dict.fromkeys(("sample_size", "in_channels", "out_channels", "attention_head_dim"), WHOLE),
        **dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), WHOLE),
        **dict.fromkeys(("patch_size", "num_layers", "num_attention_heads", "pos_embed_max_size"), FEW),
        "dual_attention_layers": WHOLE_OR_NONE,
        "qk_norm": ("rms_norm or null", lambda value: value in (None, "rms_norm")),
    },
    "flux_transformer": {
        "_class_name": ("FluxTransformer2DModel", lambda value: value == "FluxTransformer2DModel"),
        **dict.fromkeys(("in_channels", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim"), WHOLE),
        **dict.fromkeys(("num_layers", "num_single_layers", "num_attention_heads"), FEW),
        "patch_size": ("1", lambda value: value == 1),
        "out_channels": ("null", lambda value: value is None),
        "guidance_embeds": TRUTH,
        "axes_dims_rope": WHOLES,
    },
    "flow_scheduler": {
        "_class_name": FLOW,
        "num_train_timesteps": (f"{TIMESTEPS}", lambda value: type(value) is int and value == TIMESTEPS),
        **dict.fromkeys(("shift", "base_shift", "max_shift"), NUMBER),
        **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), WHOLE),
        "use_dynamic_shifting": TRUTH,
        "time_shift_type": ("exponential or linear", lambda value: value in ("exponential", "linear")),
        **dict.fromkeys(("invert_sigmas", "stochastic_sampling", "shift_terminal"), OFF),
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), OFF),
    },
    "scheduler": {
        "_class_name": SCHEDULER,
        "num_train_timesteps": (f"{TIMESTEPS}", lambda value: type(value) is int and value == TIMESTEPS),
        "beta_start": NUMBER,
        "beta_end": NUMBER,
        "beta_schedule": (" or ".join(SCHEDULES), lambda value: value in SCHEDULES),
        "steps_offset": (
            f"a whole number from 0 to {LAYERS}",
            lambda value: type(value) is int and 0 <= value <= LAYERS,
        ),
        "timestep_spacing": (" or ".join(SPACINGS), lambda value: value in SPACINGS),
        **dict.fromkeys(("clip_sample", "set_alpha_to_one", "skip_prk_steps", "thresholding"), TRUTH),
        "trained_betas": ("null, or a list of numbers", _or(lambda value: value is None, _are(_is_number))),
    },
}


def check_settings(file: Path, part: str, config: Mapping[str, Any]) -> None:
    """Raises UserError for settings of another kind of model, invalid values, and the keys in `NEVER`."""
    if found := next((key for key in NEVER if config.get(key) is not None), None):
        raise UserError(
            f"The file {str(file)!r} sets {found}, which is not allowed in a checkpoint; remove it, or give another "
            "checkpoint as backbone.pretrained."
        )
    for key, (wanted, fits) in CHECKS[part].items():
        if key in config and not fits(config[key]):
            said = repr(config[key])
            raise UserError(
                f"The file {str(file)!r} says {key}={said if len(said) <= 60 else said[:57] + '...'} where {wanted} is "
                "needed; copy or download it again, or give another checkpoint as backbone.pretrained."
            )


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a text encoder is built with. Precision, kernels and code are not taken from the checkpoint, so
    that the same weights give the same states; transformers 5 would keep a float16."""
    return {key: value for key, value in config.items() if key in TEXT and key != "model_type"} | {"dtype": "float32"}


def t5_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `text_settings`, of a T5 encoder; its precision is the backbone's setting."""
    return {key: value for key, value in config.items() if key in T5_TEXT and key != "model_type"}


def check_transformer(place: Path, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raises UserError for a transformer that reads more than noisy latents, as for editing or inpainting."""
    flux = transformer.get("_class_name") == "FluxTransformer2DModel"
    channels, latents = int(transformer.get("in_channels", 64 if flux else 16)), int(vae.get("latent_channels", 4))
    if channels != latents * (4 if flux else 1):
        raise UserError(
            f"The transformer of {str(place)!r} reads {channels} channels and its autoencoder makes {latents}: it is a "
            "model for editing, filling or depth; give a text-to-image checkpoint."
        )


def check_unet(place: Path, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raises UserError for a U-Net with inputs besides latents, timesteps and text, as for inpainting or upscaling."""
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"The U-Net of {str(place)!r} reads {channels} channels and its autoencoder makes {latents}: it is a model "
            "for inpainting, depth or upscaling; give a text-to-image checkpoint."
        )
    for name in ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
        if unet.get(name) is not None:
            raise UserError(
                f"The U-Net of {str(place)!r} has {name}={unet[name]}, which is not supported; give a Stable "
                "Diffusion 1.x, 2.x or XL."
            )
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(
            f"The U-Net of {str(place)!r} has the additional input {unet['addition_embed_type']!r}, which is not "
            "supported; give a Stable Diffusion 1.x, 2.x or XL."
        )


def check_weights(place: Path, form: str, config: Mapping[str, Any], stored: Mapping[str, Stored], part: str) -> None:
    """Raises UserError if a part's tensors do not match its settings. Some are checked here; loading checks all.

    form: a key of `CHECKS`.
    """
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS and not name.endswith(COUNTERS):
            raise UserError(
                f"The weights in {str(place / part)!r} have {name} as {tensor.dtype}, and only floating-point weights "
                "are supported; give a checkpoint that is not quantised."
            )
    for ending, wanted in _wanted(form, config):
        found = {name: tensor.shape for name, tensor in stored.items() if name.endswith(ending)}
        if not found:
            raise UserError(
                f"The weights in {str(place / part)!r} lack {ending}, so they belong to another model; copy or "
                "download the checkpoint again."
            )
        for name, shape in found.items():
            if len(shape) != len(wanted) or any(size not in (None, own) for size, own in zip(wanted, shape)):
                expected = " x ".join("?" if size is None else str(size) for size in wanted)
                raise UserError(
                    f"The weight {name} in {str(place / part)!r} is {' x '.join(map(str, shape))}, but its config.json "
                    f"says {expected}; copy or download the checkpoint again."
                )


def _wanted(part: str, config: Mapping[str, Any]) -> Sequence[tuple[str, tuple[int | None, ...]]]:
    """(suffix of a name, its shape); None for a size that the settings do not give."""
    get = config.get
    first = (get("block_out_channels") or [None])[0]
    last = (get("block_out_channels") or [None])[-1]
    if part == "unet":
        return [
            ("conv_in.weight", (first, get("in_channels"), None, None)),
            ("attn2.to_k.weight", (None, get("cross_attention_dim"))),
            ("attn2.to_v.weight", (None, get("cross_attention_dim"))),
            ("conv_out.weight", (get("out_channels"), first, None, None)),
        ]
    if part == "t5":
        return [("encoder.block.0.layer.0.SelfAttention.q.weight", (None, get("d_model")))]
    if part.endswith("_transformer"):
        return [("context_embedder.weight", (None, get("joint_attention_dim")))]
    if part == "vae":
        return [("decoder.conv_in.weight", (last, get("latent_channels"), None, None))]
    return [
        ("token_embedding.weight", (get("vocab_size"), get("hidden_size"))),
        ("position_embedding.weight", (get("max_position_embeddings"), get("hidden_size"))),
    ]
