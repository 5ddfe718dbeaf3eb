"""The original layout of Stable Diffusion checkpoints: the tensor names of CompVis's and Stability AI's single files.

A1111, ComfyUI, stable-diffusion.cpp and most model sites read one .safetensors file in this layout. The weights are the
same as in a diffusers folder, apart from their names and three shapes: attention of the autoencoder (a 1 x 1
convolution there, a linear layer in diffusers), query, key and value of OpenCLIP's encoders (one matrix there), and
OpenCLIP's text projection (transposed).

Names are mapped by a prefix table that is derived from the weights themselves, so that U-Nets of any depth can be
written. Only tensors and names, no models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from realera.contracts import UserError

Kind = Literal["v1", "v2", "xl"]  # of the original code: Stable Diffusion 1.x, 2.x, XL
Encoder = Literal["clip", "open_clip"]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODERS: dict[Kind, tuple[tuple[str, Encoder], ...]] = {  # prefix and code of each text encoder
    "v1": (("cond_stage_model.transformer.", "clip"),),
    "v2": (("cond_stage_model.model.", "open_clip"),),
    "xl": (("conditioner.embedders.0.transformer.", "clip"), ("conditioner.embedders.1.model.", "open_clip")),
}
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.attentions.0.": "middle_block.1.",
}
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
VAE_OLD = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}  # diffusers before 0.15
CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
QKV = ("q_proj", "k_proj", "v_proj")


def from_diffusers(parts: Mapping[str, Mapping[str, Tensor]], kind: Kind) -> dict[str, Tensor]:
    """The tensors of a single file.

    parts: {"unet": state, "vae": state, "text_encoder": state}, for "xl" also "text_encoder_2", with the names of
    diffusers and transformers. Raises UserError for a tensor that has no place in the layout.
    """
    unet, vae = parts["unet"], _new_names(parts["vae"])
    made = {UNET + name: value for name, value in _renamed(unet, _unet_prefixes(unet), "U-Net")}
    for name, value in _renamed(vae, _vae_prefixes(vae), "autoencoder"):
        made[VAE + name] = value[:, :, None, None] if _is_vae_attention(name) and value.dim() == 2 else value
    for part, (prefix, code) in zip(("text_encoder", "text_encoder_2"), ENCODERS[kind]):
        state = _without_model_prefix(parts[part])
        own = {f"text_model.{name}": value for name, value in state.items()} if code == "clip" else _open_clip(state)
        made |= {prefix + name: value for name, value in own.items()}
    return made


def to_diffusers(
    state: Mapping[str, Tensor], kind: Kind, template: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Tensor]]:
    """{part: state} with the names of diffusers and transformers, the inverse of `from_diffusers`.

    template: {part: the names of its weights in a diffusers folder}. Tensors that are in the file for training (EMA,
    the noise schedule) are left out. Raises UserError if a weight is missing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part, prefix, prefixes in (
        ("unet", UNET, _unet_prefixes(template["unet"])),
        ("vae", VAE, _vae_prefixes(template["vae"])),
    ):
        own = {}
        for name in template[part]:
            value = _taken(state, prefix + _rename(name, prefixes, part))
            is_linear = part == "vae" and ".attentions." in name and value.dim() == 4
            own[name] = value[:, :, 0, 0].contiguous() if is_linear else value
        found[part] = own
    return found | text_parts(state, kind, template)


def text_parts(
    state: Mapping[str, Tensor], kind: Kind, template: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Tensor]]:
    """{part: state} of the text encoders alone; see `to_diffusers`."""
    found: dict[str, dict[str, Tensor]] = {}
    for part, (prefix, code) in zip(("text_encoder", "text_encoder_2"), ENCODERS[kind]):
        read = _clip_value if code == "clip" else _open_clip_value
        found[part] = {name: read(state, prefix, name.removeprefix("text_model.")) for name in template[part]}
    return found


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """{name in diffusers: name in a single file} of all weights of a U-Net."""
    names = list(names)
    prefixes = _unet_prefixes(names)
    return {name: UNET + _rename(name, prefixes, "U-Net") for name in names}


def kind_of(names: Iterable[str]) -> Kind | None:
    """The kind of a single file by its tensor names; None for something else, such as a LoRA or a U-Net alone."""
    known = set(names)
    for kind, encoders in ENCODERS.items():
        if all(any(name.startswith(prefix) for name in known) for prefix in (UNET, VAE, *(one[0] for one in encoders))):
            return kind
    return None


def _renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str], part: str) -> Iterator[tuple[str, Tensor]]:
    return ((_rename(name, prefixes, part), value) for name, value in state.items())


def _rename(name: str, prefixes: Mapping[str, str], part: str) -> str:
    """The name with its longest known prefix replaced."""
    pieces = name.split(".")
    for length in range(len(pieces) - 1, 0, -1):
        if (known := prefixes.get(".".join(pieces[:length]) + ".")) is not None:
            return known + ".".join(pieces[length:])
    raise UserError(
        f"The {part} has a weight {name!r}, for which the original layout of Stable Diffusion has no name: give "
        "to=diffusers."
    )


def _unet_prefixes(names: Iterable[str]) -> dict[str, str]:
    """{prefix in diffusers: prefix in the original layout} of a U-Net with these weights.

    The original code numbers the blocks of both halves one after the other: a residual block with its attention is one
    block, a downsampler is one, an upsampler belongs to the last block of its level.
    """
    levels = _levels(names)
    prefixes = dict(UNET_ENDS)
    for number in (0, 1):
        prefixes |= _resnet(f"mid_block.resnets.{number}.", f"middle_block.{2 * number}.")
    at = 1
    for level, level_names in levels("down_blocks"):
        for number in range(_count(level_names, "resnets")):
            prefixes |= _resnet(f"down_blocks.{level}.resnets.{number}.", f"input_blocks.{at}.0.")
            prefixes[f"down_blocks.{level}.attentions.{number}."] = f"input_blocks.{at}.1."
            at += 1
        if _count(level_names, "downsamplers"):
            prefixes[f"down_blocks.{level}.downsamplers.0.conv."] = f"input_blocks.{at}.0.op."
            at += 1
    at = 0
    for level, level_names in levels("up_blocks"):
        attends = _count(level_names, "attentions") > 0
        blocks = _count(level_names, "resnets")
        for number in range(blocks):
            prefixes |= _resnet(f"up_blocks.{level}.resnets.{number}.", f"output_blocks.{at}.0.")
            prefixes[f"up_blocks.{level}.attentions.{number}."] = f"output_blocks.{at}.1."
            if number == blocks - 1 and _count(level_names, "upsamplers"):
                prefixes[f"up_blocks.{level}.upsamplers.0.conv."] = f"output_blocks.{at}.{2 if attends else 1}.conv."
            at += 1
    return prefixes


def _vae_prefixes(names: Iterable[str]) -> dict[str, str]:
    """As `_unet_prefixes`, of an autoencoder. The original code numbers the decoder's levels from the finest."""
    names = list(names)
    prefixes = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    for half, blocks, level_name, sampler, sampler_name in (
        ("encoder", "down_blocks", "down", "downsamplers", "downsample"),
        ("decoder", "up_blocks", "up", "upsamplers", "upsample"),
    ):
        own = [name.removeprefix(f"{half}.") for name in names if name.startswith(f"{half}.")]
        levels = list(_levels(own)(blocks))
        for level, level_names in levels:
            index = level if half == "encoder" else len(levels) - 1 - level
            for number in range(_count(level_names, "resnets")):
                there, here = (
                    f"{half}.{level_name}.{index}.block.{number}.",
                    f"{half}.{blocks}.{level}.resnets.{number}.",
                )
                prefixes[here] = there
                prefixes[f"{here}conv_shortcut."] = f"{there}nin_shortcut."
            prefixes[f"{half}.{blocks}.{level}.{sampler}.0.conv."] = f"{half}.{level_name}.{index}.{sampler_name}.conv."
        prefixes |= {f"{half}.mid_block.resnets.{number}.": f"{half}.mid.block_{number + 1}." for number in (0, 1)}
        prefixes |= {
            f"{half}.mid_block.attentions.0.{here}": f"{half}.mid.attn_1.{there}"
            for here, there in VAE_ATTENTION.items()
        }
        prefixes |= {f"{half}.conv_in.": f"{half}.conv_in.", f"{half}.conv_out.": f"{half}.conv_out."}
        prefixes[f"{half}.conv_norm_out."] = f"{half}.norm_out."
    return prefixes


def _resnet(here: str, there: str) -> dict[str, str]:
    return {here + own: there + original for own, original in RESNET.items()}


def _levels(names: Iterable[str]):  # type: ignore[no-untyped-def]
    """A function from "down_blocks" or "up_blocks" to (level, its names without the prefix), in order."""
    names = list(names)

    def of(blocks: str) -> Iterator[tuple[int, list[str]]]:
        count = 1 + max((int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}.")), default=-1)
        for level in range(count):
            prefix = f"{blocks}.{level}."
            yield level, [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    return of


def _count(names: Iterable[str], what: str) -> int:
    """The number of modules `what`.0, `what`.1, ... among the names."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{what}.")})


def _new_names(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights with the attention names of today's diffusers; linear weights as matrices."""
    made = {}
    for name, value in vae.items():
        head, mark, tail = name.partition(".attentions.0.")
        for old, new in VAE_OLD.items() if mark else ():
            if tail.startswith(old):
                tail = new + tail.removeprefix(old)
        made[head + mark + tail] = value
    return made


def _is_vae_attention(name: str) -> bool:
    return re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None


def _without_model_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights as transformers 5 names them: without "text_model.", and without the row numbers."""
    return {
        name.removeprefix("text_model."): value for name, value in state.items() if not name.endswith("position_ids")
    }


def _open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, value in state.items():
        if ".self_attn." in name and name.split(".")[-2] in QKV:
            if name.split(".")[-2] != "q_proj":
                continue
            joined = torch.cat([state[name.replace("q_proj", part)] for part in QKV])
            layer = name.split(".")[2]
            made[f"transformer.resblocks.{layer}.attn.in_proj_{name.rpartition('.')[2]}"] = joined
        elif name == "text_projection.weight":
            made["text_projection"] = value.T.contiguous()
        else:
            made[_open_clip_name(name)] = value
    return made


def _open_clip_name(name: str) -> str:
    """The name of a weight that both codes store alike."""
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    if name in ends:
        return ends[name]
    if name.startswith("final_layer_norm."):
        return name.replace("final_layer_norm.", "ln_final.")
    _, _, layer, rest = name.split(".", 3)
    for own, original in CLIP_LAYER.items():
        if rest.startswith(own):
            return f"transformer.resblocks.{layer}.{original}{rest.removeprefix(own)}"
    raise UserError(f"The text encoder has a weight {name!r}, which OpenCLIP's does not have: give to=diffusers.")


def _clip_value(state: Mapping[str, Tensor], prefix: str, name: str) -> Tensor:
    """Some merged files name these weights without "text_model."."""
    return _taken(state, prefix + name if prefix + name in state else f"{prefix}text_model.{name}")


def _open_clip_value(state: Mapping[str, Tensor], prefix: str, name: str) -> Tensor:
    if name == "text_projection.weight":
        return _taken(state, f"{prefix}text_projection").T.contiguous()
    part = name.split(".")[-2] if ".self_attn." in name else ""
    if part in QKV:
        layer, end = name.split(".")[2], name.rpartition(".")[2]
        joined = _taken(state, f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{end}")
        return joined.chunk(3)[QKV.index(part)].contiguous()
    return _taken(state, prefix + _open_clip_name(name))


def _taken(state: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return state[name]
    except KeyError:
        raise UserError(
            f"The file lacks the weight {name!r} of a whole Stable Diffusion checkpoint: give another file, or a "
            "diffusers folder, which may also have fewer layers (realera's miniature has)."
        ) from None
