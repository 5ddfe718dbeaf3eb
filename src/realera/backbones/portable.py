"""Exports an erasure for other programs, as a pipeline folder or a LoRA file. Uses only tensors and files, no models.

Layer names are the U-Net's module paths ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from realera.backbones import folder as checkpoint
from realera.contracts import UserError
from realera.files import finite, plain_data
from realera.files.headers import read_json
from realera.system import disk

EDIT, LORA = "edit.", "lora."
SAFETY_CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # a class of diffusers, in model_index.json
Lora = dict[str, tuple[Tensor, Tensor]]  # {layer: (down (r, in, ...), up (out, r, ...))}, W + up @ down


def adapters(erased: Mapping[str, Tensor]) -> Lora:
    """The trained adapters of an erased.safetensors, alpha / rank folded into `up`."""
    names = dict.fromkeys(key[len(LORA) :].rpartition(".")[0] for key in erased if key.startswith(LORA))
    found: Lora = {}
    for name in names:
        down, up = erased[f"{LORA}{name}.down"], erased[f"{LORA}{name}.up"]
        alpha = erased.get(f"{LORA}{name}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        found[name] = (down, up * scale)
    return found


def differences(base: Mapping[str, Tensor], erased: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: erased weight - original weight}, float64, adapters included."""
    change = {
        key[len(EDIT) :].removesuffix(".weight"): value.double() - base[key[len(EDIT) :]].double()
        for key, value in erased.items()
        if key.startswith(EDIT) and key.endswith(".weight")
    }
    for name, (down, up) in adapters(erased).items():
        delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(base[f"{name}.weight"].shape)
        change[name] = change.get(name, 0) + delta
    return change


def merged(base: Mapping[str, Tensor], erased: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's whole state, float32, with edits and adapters merged."""
    state = {key: value.float() for key, value in base.items()}
    state |= {key[len(EDIT) :]: value.float() for key, value in erased.items() if key.startswith(EDIT)}
    for name, change in differences(base, erased).items():
        state[f"{name}.weight"] = (base[f"{name}.weight"].double() + change).float()
    return state


def low_rank(changes: Mapping[str, Tensor], rank: int) -> tuple[Lora, float]:
    """Each change truncated to its `rank` largest singular values, and the relative error ||change - truncated|| /
    ||change|| over all layers (Frobenius). Smaller layers are padded with zeros, because programs that read LoRA files
    expect one rank and one alpha for all layers."""
    lora: Lora = {}
    lost = whole = 0.0
    for name, change in changes.items():
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        root = values[:rank].sqrt()
        lacking = max(0, rank - len(root))
        down = pad(root[:, None] * right[:rank], (0, 0, 0, lacking))
        up = pad(left[:, :rank] * root, (0, lacking))
        if change.dim() > 2:  # a convolution: the kernel goes to `down`, `up` is 1 x 1
            down, up = down.reshape(-1, *change.shape[1:]), up[:, :, None, None]
        lora[name] = (down.float().contiguous(), up.float().contiguous())
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    return lora, (lost / whole) ** 0.5 if whole else 0.0


def lora_of(base: Mapping[str, Tensor], erased: Mapping[str, Tensor], rank: int | None) -> tuple[Lora, float]:
    """The adapters as trained (rank None), or the whole difference truncated to `rank`; and the relative error of the
    truncation.

    Raises:
        UserError: weights were changed and rank is None. That change has a high rank, and without it the concept would
            not be erased. Also if nothing was changed.
    """
    edited = any(key.startswith(EDIT) for key in erased)
    if rank is None and edited:
        raise UserError(
            "this run changed the weights themselves, which a LoRA can only approximate: give rank=16 (the error is "
            "printed), or export the exact weights with to=diffusers."
        )
    if rank is None:
        if not (found := adapters(erased)):
            raise UserError("this run changed nothing, so there is no LoRA to export.")
        return found, 0.0
    return low_rank(differences(base, erased), rank)


def save_lora(lora: Lora, file: Path, style: str) -> None:
    """Writes a LoRA file. style: "lora" = diffusers' keys (load_lora_weights), "kohya" = the keys of A1111, ComfyUI."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        if style == "lora":
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            flat = f"lora_unet_{name.replace('.', '_')}"
            state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            state[f"{flat}.alpha"] = torch.tensor(float(down.shape[0]))  # alpha = rank: a scale of 1
    with disk.atomic(file) as beside:
        save_file({key: value.contiguous() for key, value in state.items()}, beside, {"format": "pt"})


def base_unet(source: Path) -> dict[str, Tensor]:
    """The original U-Net's state, from a diffusers folder. Raises UserError if a weight is not finite."""
    state: dict[str, Tensor] = {}
    for file in checkpoint.weight_files(source):
        if file.parent.name == "unet":
            state |= load_file(file)
    finite.refuse(state, f"The U-Net in {str(source)!r} cannot be exported: its weight", "copy or download it again")
    return state


def save_pipeline(source: Path, erased: Mapping[str, Tensor], out: Path) -> None:
    """Writes a diffusers folder like `source` with the erased U-Net (float32), completely or not at all.

    The other parts are copied, under the names that from_pretrained looks for without a variant. A safety checker and
    other extras are not copied.
    """
    models = checkpoint.models(source)
    with disk.atomic(out) as beside:
        beside.mkdir()
        for part in (*models, *checkpoint.tokenizers(source), "scheduler"):
            (beside / part).mkdir()
            for file in _files_to_copy(source, part):
                shutil.copyfile(file, beside / part / file.name.replace(".fp16.", "."))
            if part.startswith("text_encoder"):
                _promise_float32(beside / part / "config.json")
        save_file(
            merged(base_unet(source), erased),
            beside / "unet" / f"{models['unet']}.safetensors",
            {"format": "pt"},
        )
        (beside / "model_index.json").write_text(plain_data.json_text(_index(source), indent=2), encoding="utf-8")


def save_changed(
    source: Path, change: Callable[[str, Tensor], Tensor], out: Path, texts: Mapping[str, str] | None = None
) -> None:
    """Writes a diffusers folder like `source`, completely or not at all, whose U-Net has the weights change(name, W).

    Every weight keeps its dtype, and the U-Net its shards, of which one is in memory at a time. The other parts are
    copied, also a safety checker that is stored as safetensors, under the names that from_pretrained looks for without
    a variant. texts: {name: content} of further files. Raises UserError if an original or a changed weight is not
    finite.
    """
    extras = _extras(source)
    variant, shards = checkpoint.part_files(source, "unet")
    stem, mark = checkpoint.models(source)["unet"], f".{variant}" if variant else ""
    whole = shards[0].name == f"{stem}{mark}.safetensors"
    with disk.atomic(out) as beside:
        beside.mkdir()
        for part in (*checkpoint.models(source), *checkpoint.tokenizers(source), "scheduler", *extras):
            (beside / part).mkdir()
            for file in extras[part] if part in extras else _files_to_copy(source, part):
                shutil.copyfile(file, beside / part / file.name.replace(".fp16.", "."))
            if part.startswith("text_encoder"):
                _promise_float32(beside / part / "config.json")
        for shard in shards:
            state = _changed(source, load_file(shard), change)
            save_file(state, beside / "unet" / (f"{stem}.safetensors" if whole else shard.name), {"format": "pt"})
        if not whole:
            index = f"{stem}.safetensors.index"
            shutil.copyfile(source / "unet" / f"{index}{mark}.json", beside / "unet" / f"{index}.json")
        written = {"model_index.json": plain_data.json_text(_index(source, extras), indent=2), **(texts or {})}
        for name, text in written.items():
            (beside / name).write_text(text, encoding="utf-8")


def _changed(source: Path, state: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    finite.refuse(state, f"The U-Net in {str(source)!r} cannot be changed: its weight", "copy or download it again")
    changed = {name: change(name, weight).to(weight.dtype) for name, weight in state.items()}
    remedy = "use a smaller weight, or a copy of the checkpoint in float32 or bfloat16"
    finite.refuse(changed, f"The changed U-Net of {str(source)!r} cannot be saved: its weight", remedy)
    return {name: weight.contiguous() for name, weight in changed.items()}


def _extras(source: Path) -> dict[str, list[Path]]:
    """{part: its files} of diffusers' own safety checker and the image processor that it needs, if the folder has both
    in formats that run no code."""
    checker = [source / "safety_checker" / "config.json", source / "safety_checker" / "model.safetensors"]
    half = source / "safety_checker" / "model.fp16.safetensors"
    checker[1] = checker[1] if checker[1].is_file() or not half.is_file() else half
    processor = [source / "feature_extractor" / "preprocessor_config.json"]
    index = source / "model_index.json"
    named = read_json(index).get("safety_checker") if index.is_file() else None
    if named != SAFETY_CHECKER or not all(file.is_file() for file in (*checker, *processor)):
        return {}
    return {"safety_checker": checker, "feature_extractor": processor}


def _promise_float32(file: Path) -> None:
    """transformers loads a text encoder in its config's dtype, and diffusers loads the U-Net in float32: without
    torch_dtype both must agree."""
    settings = plain_data.read_json(file)
    settings.pop("torch_dtype", None)
    file.write_text(plain_data.json_text({**settings, "dtype": "float32"}, indent=2), encoding="utf-8")


def _files_to_copy(source: Path, part: str) -> list[Path]:
    """The files of one part that a pipeline needs: its settings, and its weights except the U-Net's, which are written
    anew. Shards keep their names, because the index lists them."""
    settings = [file for file in (source / part).iterdir() if file.suffix in (".json", ".txt", ".model")]
    kept = [file for file in settings if ".safetensors.index." not in file.name]
    stem = checkpoint.models(source).get(part)
    if stem is None or part == "unet":
        return kept
    variant, weights = checkpoint.part_files(source, part)
    mark = f".{variant}" if variant else ""
    if weights[0].name != f"{stem}{mark}.safetensors":
        kept.append(source / part / f"{stem}.safetensors.index{mark}.json")
    return [*kept, *weights]


def _index(source: Path, extras: Collection[str] = ()) -> dict[str, object]:
    """The folder's index, with only the copied parts. extras: copied parts besides the usual ones."""
    networks, tokenizers = checkpoint.models(source), checkpoint.tokenizers(source)
    parts = {*networks, *tokenizers, "scheduler", *extras}
    file = source / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # a class of another library is left out: loading the exported folder would run its code
    known = {
        key: value
        for key, value in index.items()
        if not isinstance(value, list)
        or value[:1] in (["diffusers"], ["transformers"], [None])
        or (key in extras and value == SAFETY_CHECKER)
    }
    if not isinstance(index.get("_class_name", ""), str):
        known.pop("_class_name", None)
    kept = {
        key: [None, None] if isinstance(value, list) and key not in parts else value for key, value in known.items()
    }
    standard: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if "text_encoder_2" in networks:
        standard["_class_name"] = "StableDiffusionXLPipeline"
        standard["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        return {**standard, **kept}
    checked = {} if extras else {"requires_safety_checker": False}
    return {**standard, "safety_checker": [None, None], **kept, **checked}
