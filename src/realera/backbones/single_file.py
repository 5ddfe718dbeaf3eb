"""Checkpoints of one file: Stable Diffusion 1.x, 2.x and XL in the original layout, as A1111 and ComfyUI read them.

A file is unpacked once, into a diffusers folder in the cache, and everything else reads that folder. The file has no
settings and no tokenizer: those of the standard model are used (`standard`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realera import paths
from realera.backbones import standard, vocabulary
from realera.contracts import UserError
from realera.files import headers, plain_data
from realera.system import disk, locks

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
FOLDERS = "single_file"  # in the cache
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # of a part's weights; others: "model"
FLOATS = ("float32", "float16", "bfloat16", "float64")
APPLIED = "realera.applied"  # key of the metadata: the content of realera_applied.json, if the weights have maps
INPAINTING = 9  # channels that the U-Net of an inpainting model reads


def unpacked(file: Path) -> Path:
    """The diffusers folder of a single file, in the cache. It is made at the first call, which takes some seconds and
    as much disk as the file. Raises UserError for a file that is not such a checkpoint."""
    if file.suffix.lower() in PICKLED:
        raise UserError(
            f"{file} is a pickle, which can run any code when it is opened: convert it to .safetensors first, on a "
            "machine that you can lose, or download the .safetensors of the same model."
        )
    if file.suffix.lower() != ".safetensors":
        raise UserError(f"{file} is not a checkpoint: give a .safetensors file, a diffusers folder or a hub id.")
    stored = headers.tensors(file)
    kind = _kind(file, stored)
    place = _place(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    with locks.exclusive(place):
        if not place.is_dir():
            log.info("unpacking %s (Stable Diffusion %s) into %s", file, kind.lstrip("v").upper(), place)
            _unpack(file, kind, place)
    return place


def kind_of(file: Path) -> str | None:
    """The kind of a single file; None for one that is not a whole checkpoint. Raises UserError for a torn file."""
    from realera.backbones import original_layout

    return original_layout.kind_of(headers.tensors(file))


def folder_of(file: Path) -> Path | None:
    """The folder that a file has been unpacked into; None if it has not."""
    try:
        place = _place(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return place if place.is_dir() else None


def _place(file: Path) -> Path:
    return paths.cache_dir() / FOLDERS / f"{paths.as_file_name(file.stem)}-{headers.quick_digest(file)[:16]}"


def _kind(file: Path, stored: Mapping[str, headers.Stored]) -> Any:
    from realera.backbones import original_layout

    if kind := original_layout.kind_of(stored):
        first = stored.get(f"{original_layout.UNET}input_blocks.0.0.weight")
        if first is not None and len(first.shape) == 4 and first.shape[1] == INPAINTING:
            raise UserError(f"{file} is a model for inpainting: give a text-to-image checkpoint.")
        return kind
    if any(".lora_" in name or "lora_A" in name for name in stored):
        what = "is a LoRA, not a whole model"
    elif any("double_blocks." in name or "joint_blocks." in name for name in stored):
        what = "is a diffusion transformer, such as SD 3 or FLUX, which is not supported"
    else:
        what = "lacks the U-Net, the autoencoder or the text encoder of a Stable Diffusion 1.x, 2.x or XL"
    raise UserError(f"{file} {what}: give a whole checkpoint as one .safetensors file, or a diffusers folder.")


def _unpack(file: Path, kind: Any, place: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from realera.backbones import original_layout

    settings = {part: dict(values) for part, values in standard.MODELS[kind].items()}
    with safe_open(file, "pt") as reader, disk.atomic(place) as beside:
        metadata = reader.metadata() or {}
        settings["scheduler"]["prediction_type"] = _prediction(file, kind, metadata, set(reader.keys()))
        template = _template(kind)
        parts = original_layout.to_diffusers(_Stored(reader), kind, template)
        _refuse_other_tensors(file, kind, parts, template)
        for part, config in settings.items():
            (beside / part).mkdir(parents=True)
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (beside / part / name).write_text(plain_data.json_text(config, indent=2), encoding="utf-8")
            if part in parts:
                weights = beside / part / f"{STEMS.get(part, 'model')}.safetensors"
                save_file(parts.pop(part), weights, {"format": "pt"})
        tokenizers = ["tokenizer", "tokenizer_2"] if kind == "xl" else ["tokenizer"]
        for name in tokenizers:
            _write_tokenizer(beside / name, pad="!" if name == "tokenizer_2" or kind == "v2" else standard.END)
        index = _index(kind, settings, tokenizers)
        (beside / "model_index.json").write_text(plain_data.json_text(index, indent=2), encoding="utf-8")
        if APPLIED in metadata:
            (beside / paths.APPLIED).write_text(metadata[APPLIED], encoding="utf-8")


def _prediction(file: Path, kind: str, metadata: Mapping[str, str], names: set[str]) -> str:
    """ "epsilon" or "v_prediction", by the file's metadata, by ComfyUI's mark (a tensor "v_pred"), or as usual for the
    kind."""
    said = str(metadata.get("modelspec.prediction_type", "")).lower()
    if said in ("epsilon", "v", "v_prediction"):
        return "epsilon" if said == "epsilon" else "v_prediction"
    if "v_pred" in names:
        return "v_prediction"
    usual = str(standard.MODELS[kind]["scheduler"]["prediction_type"])
    if kind == "v2":
        log.warning(
            "%s does not say what its U-Net predicts: v is assumed, as in Stable Diffusion 2.1 at 768 pixels; for a "
            "512-pixel model that predicts noise, give a diffusers folder",
            file,
        )
    return usual


class _Stored(Mapping[str, "Tensor"]):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._names = dict.fromkeys(reader.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: Tensor = self._reader.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _refuse_other_tensors(
    file: Path, kind: str, parts: Mapping[str, Mapping[str, Tensor]], template: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raises UserError for quantised weights, and for other shapes than those of the standard model."""
    for part, state in parts.items():
        for name, value in state.items():
            stored, wanted = str(value.dtype).removeprefix("torch."), tuple(template[part][name].shape)
            if stored not in FLOATS:
                raise UserError(
                    f"{file} has the weight {name} of its {part} as {stored}, and only {', '.join(FLOATS)} are "
                    "supported: give a copy that is not quantised."
                )
            if tuple(value.shape) != wanted:
                raise UserError(
                    f"{file} has the weight {name} of its {part} in the shape {tuple(value.shape)}, and Stable "
                    f"Diffusion {kind.lstrip('v').upper()} has it in {wanted}: give another checkpoint, or a diffusers "
                    "folder."
                )


def _template(kind: str) -> dict[str, dict[str, Tensor]]:
    """{part: its weights} of the standard model, without memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = standard.MODELS[kind]
    found: dict[str, dict[str, Tensor]] = {}
    with torch.device("meta"):
        for part, config in settings.items():
            if part == "scheduler":
                continue
            model: Any
            if part == "unet":
                model = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                model = AutoencoderKL.from_config(config)
            else:
                of = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
                model = of(CLIPTextConfig(**{key: value for key, value in config.items() if key != "model_type"}))
            found[part] = dict(model.named_parameters())
    return found


def _write_tokenizer(place: Path, pad: str) -> None:
    words, merges = standard.tokenizer()
    place.mkdir()
    (place / vocabulary.VOCABULARY).write_text(plain_data.json_text(words), encoding="utf-8")
    (place / vocabulary.MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {**vocabulary.SPECIAL, "pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (place / "tokenizer_config.json").write_text(plain_data.json_text(settings, indent=2), encoding="utf-8")


def _index(kind: str, settings: Mapping[str, Mapping[str, Any]], tokenizers: list[str]) -> dict[str, Any]:
    libraries = {"text_encoder": "transformers", "text_encoder_2": "transformers"}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if kind == "xl" else "StableDiffusionPipeline",
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
    }
    for part, config in settings.items():
        own = config["architectures"][0] if part in libraries else config["_class_name"]
        index[part] = [libraries.get(part, "diffusers"), own]
    if kind == "xl":
        return {
            **index,
            "force_zeros_for_empty_prompt": True,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
        }
    return {
        **index,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
